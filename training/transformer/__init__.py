"""Training of the transformer (§3.2)."""
