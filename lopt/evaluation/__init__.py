"""Judging rules: the same held-out tasks for a learned rule and for baselines with tuned learning rates."""
