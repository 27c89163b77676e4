"""The learning stage: unroll the training of many small tasks, estimate the meta-gradient, train the rule."""
