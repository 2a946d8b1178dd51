"""What can be seen of a training while it runs, and which of its students is exported."""
