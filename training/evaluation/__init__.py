"""Evaluations of trained models. `nextflow-hf evaluate` runs them; `comparison` is a command of its own."""
