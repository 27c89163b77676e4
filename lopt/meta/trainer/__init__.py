"""The outer loop: from the meta-gradients of all sources and ranks to trained meta-weights and a rule file.

`trainer.py` is the loop; `source.py` gives it estimates, `merging.py` makes one gradient of them, `outer_optimizer.py`
steps with it, `validation.py` judges, `best.py` keeps the best, `state.py` is what a run goes on from. `checkpoint.py`,
`log.py`, `ranks.py` and `stop.py` deal with the world outside.
"""
