"""Training of the diffusion decoder (§3.3)."""
