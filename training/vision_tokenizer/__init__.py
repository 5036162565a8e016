"""Training of the vision tokenizer (§3.1)."""
