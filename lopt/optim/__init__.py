"""The application stage: a learned rule as a `torch.optim.Optimizer`."""
