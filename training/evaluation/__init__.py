"""Evaluations of trained models. Every module here can be run: `python -m nextflow_hf.training.evaluation.<name>`."""
