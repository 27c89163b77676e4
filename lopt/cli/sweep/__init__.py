"""Meta-training with several settings."""
