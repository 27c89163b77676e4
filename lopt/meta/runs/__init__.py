"""Runs of meta-training as folders: what is in one, who has it for itself, and whether its machine is large enough."""
