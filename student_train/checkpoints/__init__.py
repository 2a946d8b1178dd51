"""Checkpoints of a training: what they hold, how they are verified, copied and resumed."""
