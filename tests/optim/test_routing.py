"""Which parameters the rule gets and which AdamW, and where rules take the loss from."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import lopt
from lopt import LearnedOptimizer
from lopt.core.random import make_generator
from lopt.rules import RULES, Rule

READS_LOSS = [name for name in sorted(RULES) if RULES[name].needs_loss]


def draw(seed: int, *shape: int) -> Tensor:
    """Rows of very different scale."""
    x = torch.randn(shape, generator=make_generator(seed))
    return x * 10.0 ** torch.arange(shape[0]).view(-1, *[1] * (x.ndim - 1)) if shape else x


def step_with(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int = 3, **options: object) -> None:
    for i in range(steps):
        for j, p in enumerate(params):
            p.grad = draw(10 * i + j, *p.shape)
        optimizer.step(**options)


def make_params(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(draw(90 + i, *shape)) for i, shape in enumerate(shapes)]


class Model(nn.Module):
    """Every kind of parameter, and an output layer tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 3)
        self.conv = nn.Conv1d(3, 4, 2)
        self.norm = nn.LayerNorm(4)
        self.hidden = nn.Linear(4, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(3, 2)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.tokens.weight


def names(group: dict[str, object]) -> set[str]:
    return {name for name, _ in group["params"]}  # type: ignore[attr-defined]


# -- groups ------------------------------------------------------------------------------------------------------------


def test_vectors_embeddings_and_named_layers_go_to_adamw() -> None:
    mine, rest = lopt.group_parameters(Model(), adamw=["head.*"], lr=0.5)
    assert names(mine) == {"conv.weight", "hidden.weight"}
    assert names(rest) == {
        *("tokens.weight", "conv.bias", "norm.weight", "norm.bias", "hidden.bias", "scale", "head.weight", "head.bias")
    }
    assert mine["lr"] == 0.5
    assert rest["rule"] == "adamw"


def test_groups_of_a_model_train_it() -> None:
    model = Model()
    before = copy.deepcopy(model.state_dict())
    optimizer = LearnedOptimizer(lopt.group_parameters(model), RULES["celo2"]())
    step_with(optimizer, [p for group in optimizer.param_groups for p in group["params"]])
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if not name.startswith("frozen")}


def test_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'heads\.\*'; the first are scale"):
        lopt.group_parameters(Model(), adamw=["heads.*"])


def test_model_with_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="require gradients"):
        lopt.group_parameters(nn.Linear(2, 2).requires_grad_(False))


def test_group_flagged_adamw_is_torchs_adamw() -> None:
    ours, theirs = (make_params((3, 4), (5,)) for _ in range(2))
    options = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    matrix = make_params((2, 2))
    optimizer = LearnedOptimizer(
        [{"params": matrix}, {"params": ours, "rule": "adamw", **options}], RULES["small_fc"]()
    )
    step_with(optimizer, [*ours, *matrix], 20)
    step_with(torch.optim.AdamW(theirs, **options), theirs, 20)  # type: ignore[arg-type]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.detach().abs().max()))


@pytest.mark.parametrize(("name", "lr", "betas"), [("small_fc", 5e-4, (0.9, 0.999)), ("celo2", 0.01, (0.9, 0.95))])
def test_adamw_takes_what_the_group_does_not_say_from_the_rule(
    name: str, lr: float, betas: tuple[float, float]
) -> None:
    group = {"params": make_params((2, 2)), "rule": "adamw"}
    optimizer = LearnedOptimizer([group], RULES[name](), lr=0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)
    assert optimizer.param_groups[0]["betas"] == betas


@pytest.mark.parametrize(
    ("option", "message"), [({"betas": (0.9, 1.0)}, "betas"), ({"eps": -1.0}, "eps"), ({"rule": "adam"}, "adam")]
)
def test_bad_option_of_an_adamw_group_is_refused_by_name(option: dict[str, object], message: str) -> None:
    group = {"params": make_params((2, 2)), "rule": "adamw"} | option
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer([group], RULES["small_fc"]())


def test_adamw_group_needs_no_num_steps() -> None:
    params = make_params((2, 2))
    optimizer = LearnedOptimizer([{"params": params, "rule": "adamw"}], RULES["celo"]())
    step_with(optimizer, params)
    with pytest.raises(ValueError, match=r"'celo' .* pass num_steps"):
        optimizer.add_param_group({"params": make_params((3, 3))})


def test_state_of_mixed_groups_goes_on_bitwise() -> None:
    def make() -> tuple[list[nn.Parameter], LearnedOptimizer]:
        params = make_params((3, 4), (4,))
        groups = [{"params": params[:1]}, {"params": params[1:], "rule": "adamw"}]
        return params, LearnedOptimizer(groups, RULES["celo2"]())

    first, optimizer = make()
    step_with(optimizer, first)
    second, other = make()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for a, b in zip(second, first, strict=True):
            a.copy_(b)
    step_with(optimizer, first)
    step_with(other, second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_state_of_adamw_does_not_load_into_the_rule() -> None:
    params = make_params((3, 4))
    routed = LearnedOptimizer([{"params": params, "rule": "adamw"}], RULES["celo2"]())
    with pytest.raises(ValueError, match=r"runs rule celo2-.* made by adamw"):
        LearnedOptimizer(params, RULES["celo2"]()).load_state_dict(routed.state_dict())


# -- celo2 routes by itself ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["embed.weight", "transformer.wte.weight", "patch_embedding.proj.weight"])
def test_celo2_leaves_embeddings_and_vectors_to_adamw(name: str) -> None:
    named = dict(zip([name, "hidden.weight", "hidden.bias"], make_params((4, 3), (4, 3), (4,)), strict=True))
    optimizer = LearnedOptimizer(named.items(), RULES["celo2"]())
    step_with(optimizer, list(named.values()))
    kinds = {key: optimizer.state[p].keys() for key, p in named.items()}
    adamw = {"step", "m", "v"}
    assert kinds[name] == kinds["hidden.bias"] == adamw
    assert kinds["hidden.weight"] > adamw


def test_celo2_steps_vectors_as_adamw_with_its_own_rate() -> None:
    ours, theirs = make_params((6,)), make_params((6,))
    step_with(LearnedOptimizer(ours, RULES["celo2"](step_mult=0.01, adamw_mult=3.0), lr=0.5), ours)
    step_with(torch.optim.AdamW(theirs, lr=0.015, betas=(0.9, 0.95), weight_decay=0.0), theirs)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6 * float(theirs[0].detach().abs().max()))


# -- the loss ----------------------------------------------------------------------------------------------------------


def run(rule: Rule, losses: list[float | None]) -> tuple[list[nn.Parameter], LearnedOptimizer]:
    params = make_params((3, 4), (5,))
    optimizer = LearnedOptimizer(params, rule, num_steps=20)
    for i, loss in enumerate(losses):
        step_with_seed(optimizer, params, i, loss)
    return params, optimizer


def step_with_seed(optimizer: LearnedOptimizer, params: list[nn.Parameter], seed: int, loss: float | None) -> None:
    for j, p in enumerate(params):
        p.grad = draw(100 + 10 * seed + j, *p.shape)
    optimizer.step(loss=loss)


@pytest.mark.parametrize("name", READS_LOSS)
def test_loss_of_the_closure_is_the_loss(name: str) -> None:
    rule = RULES[name]()
    given, _ = run(rule, [3.0, 1.0, 2.0, 0.5])
    params = make_params((3, 4), (5,))
    optimizer = LearnedOptimizer(params, rule, num_steps=20)
    for i, loss in enumerate([3.0, 1.0, 2.0, 0.5]):

        def closure(i: int = i, loss: float = loss) -> Tensor:
            for j, p in enumerate(params):
                p.grad = draw(100 + 10 * i + j, *p.shape)
            return torch.tensor(loss, requires_grad=True)

        optimizer.step(closure)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(given, params, strict=True))
    other, _ = run(rule, [3.0, 1.0, 4.0, 4.0])
    assert any(not torch.equal(a, b) for a, b in zip(given, other, strict=True))


@pytest.mark.parametrize("name", READS_LOSS)
def test_stepping_without_a_loss_freezes_what_is_known_of_it_and_warns_once(name: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        params, optimizer = run(RULES[name](), [3.0, 2.0, None, None])
    assert [str(w.message).split(":")[0] for w in caught] == [
        f"rule {name!r} reads the training loss, but step() was called without one"
    ]
    assert caught[0].filename == __file__
    told, informed = run(RULES[name](), [3.0, 2.0])
    for p, q in zip(params, told, strict=True):
        state, known = optimizer.state[p], informed.state[q]
        remembered = [key for key in state if "loss" in key]
        assert remembered
        assert all(torch.equal(state[key], known[key]) for key in remembered)
        assert int(state["step"]) == 4
    assert all(bool(p.isfinite().all()) for p in params)


def test_rules_that_do_not_read_the_loss_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(RULES["celo2"](), [None, None])


def test_value_of_a_closure_is_not_looked_at_by_rules_that_do_not_read_the_loss() -> None:
    params = make_params((2, 2))
    params[0].grad = torch.ones(2, 2)
    assert LearnedOptimizer(params, RULES["adam"]()).step(lambda: (1.0, 2.0)) == (1.0, 2.0)  # type: ignore[arg-type, return-value]


def test_loss_that_is_not_one_number_is_refused() -> None:
    params = make_params((2, 2))
    params[0].grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"one number, got shape \[2\]"):
        LearnedOptimizer(params, RULES["celo"](), num_steps=9).step(loss=torch.ones(2))


@pytest.mark.parametrize("name", READS_LOSS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_does_not_spoil_the_later_steps(name: str, bad: float) -> None:
    params, _ = run(RULES[name](), [bad, 3.0, bad, 2.0, 1.0])
    assert all(bool(p.isfinite().all()) for p in params)


# -- the run -----------------------------------------------------------------------------------------------------------


def test_tensor_that_seldom_has_a_gradient_follows_the_schedule_of_the_run() -> None:
    always, seldom = make_params((3, 2), (3, 2))
    optimizer = LearnedOptimizer([always, seldom], RULES["sgd"](lr=0.1, schedule="cosine"), num_steps=10)
    for step in range(10):
        always.grad = torch.ones(3, 2)
        seldom.grad = torch.ones(3, 2) if step == 9 else None
        before = seldom.detach().clone(), always.detach().clone()
        optimizer.step()
    torch.testing.assert_close(seldom - before[0], always - before[1], rtol=1e-3, atol=0)
    assert int(optimizer.state[seldom]["step"]) == 1


@pytest.mark.parametrize("flagged", [False, True])
def test_decay_of_celo2_is_in_units_of_the_learning_rate_of_the_step(flagged: bool) -> None:
    """`p <- p - lr (u + decay p)`, where lr has the rule's step_mult, or AdamW's rate, within."""

    def step(decay: float) -> list[Tensor]:
        matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
        groups = [{"params": [matrix]}, {"params": [vector]} | ({"rule": "adamw"} if flagged else {})]
        optimizer = LearnedOptimizer(
            groups, RULES["celo2"](step_mult=0.01, adamw_mult=20.0), lr=0.5, weight_decay=decay
        )
        for p in (matrix, vector):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        return [matrix.detach(), vector.detach()]

    lost = [without - decayed for without, decayed in zip(step(0.0), step(0.1), strict=True)]
    torch.testing.assert_close(lost[0], torch.full((2, 2), 0.5 * 0.01 * 0.1), rtol=1e-3, atol=0)
    torch.testing.assert_close(lost[1], torch.full((2,), 0.5 * 0.2 * 0.1), rtol=1e-3, atol=0)


def still_params(values: list[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(value) for value in values]


def test_state_of_another_owner_is_refused_before_anything_changes() -> None:
    values = [draw(1, 4, 3), draw(2, 3, 3)]
    unnamed = LearnedOptimizer(still_params(values), RULES["celo2"]())
    step_with(unnamed, unnamed.param_groups[0]["params"])
    named = LearnedOptimizer(zip(["embed.weight", "w"], still_params(values), strict=True), RULES["celo2"]())
    with pytest.raises(
        ValueError, match=r"'embed\.weight' does not fit it: .* rule 'adamw' .* names in both or in neither"
    ):
        named.load_state_dict(unnamed.state_dict())
    assert not named.state


def test_state_of_a_channels_last_parameter_goes_on_in_a_dense_one() -> None:
    rule, starts = RULES["star"](inner="linear"), draw(3, 4, 3, 2, 2)
    dense, strided = (
        nn.Parameter(starts.clone(memory_format=f)) for f in (torch.contiguous_format, torch.channels_last)
    )
    optimizers = [LearnedOptimizer([p], rule) for p in (dense, strided)]
    for p, optimizer in zip((dense, strided), optimizers, strict=True):
        step_with(optimizer, [p])
    strided.data = strided.data.contiguous()
    for p, optimizer in zip((dense, strided), optimizers, strict=True):
        step_with(optimizer, [p], 4)
    torch.testing.assert_close(dense, strided, rtol=1e-5, atol=1e-6 * float(dense.detach().abs().max()))
