"""What the shipped starts reach on tasks that they never saw, by their names."""

from __future__ import annotations

import torch
from torch.func import functional_call, vmap
from torch.nn import functional as F

import lopt
from lopt.core.random import derive_seeds
from lopt.tasks.glyphs import Glyphs
from lopt.tasks.sinusoid import Sinusoid


def test_starts_are_bound_to_a_model_and_say_how_they_were_trained() -> None:
    assert {"glyphs-anil", "sinusoid-curvature"} <= set(lopt.list_starts())
    assert not set(lopt.list_starts()) & set(lopt.list_rules())
    for name in lopt.list_starts():
        assert {"command", "description", "config", "licence", "note"} <= set(lopt.load_card(name))


def test_sine_waves_of_ten_points_are_learned_in_ten_steps() -> None:
    family = Sinusoid(shots=10)
    tasks = family.sample_all(derive_seeds(0, "task", torch.arange(200)), "test")
    support = family.batch(tasks, tasks["strip"])
    module = family.batched.module
    found = lopt.adapt_all(module, "sinusoid-curvature", (support["x"], support["y"]), loss=F.mse_loss, steps=10)
    queries = family.full_batch(tasks, 200, "inner_valid")
    assert queries is not None
    errors = family.losses(found, queries)
    assert errors.mean() < 0.09  # 0.044 with a standard error of 0.007
    again = lopt.adapt(module, "sinusoid-curvature", (support["x"][0], support["y"][0]), loss=F.mse_loss, steps=10)
    torch.testing.assert_close(F.mse_loss(again(queries["x"][0]), queries["y"][0]), errors[0], rtol=1e-3, atol=1e-5)


def test_letters_of_unseen_scripts_are_told_after_one_step() -> None:
    family = Glyphs()
    tasks = family.sample_all(derive_seeds(0, "task", torch.arange(60)), "test")
    support, queries = family.batch(tasks, torch.arange(60)), family.batch(tasks, torch.arange(60), "inner_valid")
    module = family.build_network()
    found = lopt.adapt_all(module, "glyphs-anil", (support["x"], support["y"]), loss=F.cross_entropy)
    logits = vmap(lambda p, x: functional_call(module, p, (x,)))(found, queries["x"])
    assert (logits.argmax(-1) == queries["y"]).double().mean() > 0.96  # .989 on 600 tasks
