"""The student as a model: loading, adapters, packed rows, head, what it costs, and its export."""
