"""Reinforcement learning of the first scales (§3.2.5)."""
