"""Few-shot classification: how often classifiers are right that know a few examples of each class.

`episodes.py` draws the tasks and lets rules learn them; `nearest.py` and `fine_tuning.py` are what people do without
learning to learn, on the same tasks.
"""
