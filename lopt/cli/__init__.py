"""The `lopt` command: its commands, the folders of runs and sweeps, progress on a terminal, and what ails a run.

Only here are arguments read and is the process ended; what computes is in the folders below.
"""
