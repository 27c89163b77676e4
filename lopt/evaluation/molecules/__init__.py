"""Measured properties of molecules from a few labels: `measured.py` draws the labels and lets rules learn them,
`kernels.py` is what people do without learning to learn, on the same labels; `closed_form.py` and `deep_kernel.py`
learn what a head is solved on; `unseen.py` judges the latter on other properties, `pictures.py` draws.
"""
