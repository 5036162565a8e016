"""A teacher, a text tokenizer and a denoiser, small enough for a CPU."""
