"""Measured properties of molecules from a few labels: `measured.py` draws the labels and lets rules learn them,
`kernels.py` is what people do without learning to learn, on the same labels; `pictures.py` draws both.
"""
