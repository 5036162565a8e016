"""From rows of `messages` and `images` to batches of tokens and codes."""
