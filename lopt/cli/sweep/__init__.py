"""Sweeps: what their trials are, how they run in worker processes, stop and go on, and which one is kept. Used by `lopt
sweep`.
"""
