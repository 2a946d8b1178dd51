"""From cached labels to the micro-batches of a rank: which samples, in which order, packed how."""
