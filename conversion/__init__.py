"""Checkpoints of other models as NextFlow's. Models do not import it."""
