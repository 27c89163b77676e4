"""The application stage: a learned rule as a `torch.optim.Optimizer`.

`learned_optimizer` is the door; a step goes from there through `units` and `backend` to one of the two backends.
Nothing here trains a rule.
"""
