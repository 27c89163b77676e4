"""Let first steps choose among optimizers, and go on with the best. `python examples/learn_to_learn/portfolio.py`"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import lopt


def main(steps: int = 200) -> tuple[str, list[float]]:
    torch.manual_seed(0)
    images, classes = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    model = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))
    order = torch.randperm(len(images))

    def measure(step: int) -> torch.Tensor:
        rows = order.roll(-90 * step)[:90]  # the same batch each time that a step is asked for
        return F.cross_entropy(model(images[rows].float() / 16), classes[rows])

    losses = [measure(0).item()]
    choice = lopt.choose(model, measure, num_steps=steps)
    for step in range(choice.steps, steps):  # the model is trained so far: go on
        loss = measure(step)
        choice.optimizer.zero_grad()
        loss.backward()
        choice.optimizer.step(loss=loss)
        losses.append(loss.item())
    return choice.setting.describe(), losses


if __name__ == "__main__":
    setting, losses = main()
    print(f"chosen: {setting}; losses:", *(f"{loss:.3f}" for loss in losses[::20]))
