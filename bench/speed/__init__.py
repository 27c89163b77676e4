"""How fast steps and meta-training are."""
