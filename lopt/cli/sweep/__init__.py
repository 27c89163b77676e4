"""Sweeps on Optuna: what trials may be, the study that processes share, the processes, and which rule is kept. Used by
`lopt sweep`.
"""
