"""Liger's names that NextFlow uses, by what they compute, for machines that cannot run Triton. See test_liger.py."""
