"""A safety net under a learned rule: who makes the next step, and how it is made safe.

`decisions` listens to the losses, `state` is what it remembers, and `steps` does to tensors what was decided.
"""
