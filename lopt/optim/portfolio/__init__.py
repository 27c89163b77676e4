"""Portfolios: a few settings in the order in which they are worth trying, and the choice among them for a new model."""
