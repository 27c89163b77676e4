"""Formulas of one coordinate: one file per rule."""
