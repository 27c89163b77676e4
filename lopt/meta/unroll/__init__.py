"""The inner loop: slots with tasks, their draws and horizons, and three ways of making their steps.

`inner_loop.py` is the definition; `compiled.py` and `on_gpu.py` make the same steps faster where nothing is
differentiated. `curves.py` runs whole tasks for those who judge a rule.
"""
