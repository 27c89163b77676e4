"""The greedy choice of a portfolio from a matrix of regrets, and what it reaches on families that it was not chosen on.

A regret is the share that is missing of the progress (fall of the log loss) that the best of all settings makes on a
family: 0 is as good as any, 1 no progress. Source of the greedy choice: Metz et al. 2020, arXiv 2002.11887 ("TaskSet").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb, log

import torch
from torch import Tensor

from lopt.core.random import make_generator
from lopt.evaluation.portfolio.matrix import Scores
from lopt.optim.portfolio.choosing import LEAD

DRAWS = 2000  # of families, for intervals


def find_regrets(scores: Mapping[str, Scores]) -> Tensor:
    """Regrets `[F, J]` of settings on families, each family's from its mean scores; the families in their order."""
    means = torch.stack([own.mean for own in scores.values()])
    return miss(means, means.amin(1, keepdim=True))


def miss(scores: Tensor, best: Tensor) -> Tensor:
    """The share of the progress `-best` that `scores` miss, from 0 to 1; 1 where there is no progress at all."""
    return torch.where(best < 0, 1 - scores / best, 1.0).clamp(0, 1)


def choose_greedily(regrets: Tensor, size: int) -> list[int]:
    """The settings that, each added to those before it, lower the mean over families of the lowest regret most.

    Args:
        regrets: `[F, J]`.
        size: how many; fewer come back where there are fewer.
    Returns:
        Columns, the best first; of equal ones the first.
    """
    chosen: list[int] = []
    reached = torch.full((len(regrets), 1), torch.inf, dtype=regrets.dtype)
    while len(chosen) < min(size, regrets.shape[1]):
        means = torch.minimum(regrets, reached).mean(0)
        means[chosen] = torch.inf
        chosen.append(int(means.argmin()))
        reached = torch.minimum(reached, regrets[:, chosen[-1:]])
    return chosen


def expect_random(regrets: Tensor) -> Tensor:
    """The expected lowest regret of the first n of J settings in random order, `[F, J]` for n = 1 to J; exact.

    Args:
        regrets: `[F, J]`.
    """
    ranked, count = regrets.sort(1).values, regrets.shape[1]
    # The k-th best is the best of n with probability C(J - k, n - 1) / C(J, n).
    shares = [[comb(count - k, n - 1) / comb(count, n) for k in range(1, count + 1)] for n in range(1, count + 1)]
    return ranked @ torch.tensor(shares, dtype=ranked.dtype).T


@dataclass(frozen=True)
class LeftOut:
    """What portfolios of k = 1 to K settings reach on families that they were not chosen on, and random searches.

    Attributes:
        families: names.
        portfolio: `[F, K]`, the lowest regret of the first k settings chosen on the other families.
        halved: `[F, K]`, that of the setting which successive halving on first steps chooses among them.
        random: `[F, N]`, expected of random searches of n = 1 to N settings.
    """

    families: list[str]
    portfolio: Tensor
    halved: Tensor
    random: Tensor

    def find_equal(self, size: int, which: Tensor | None = None) -> int:
        """The smallest random search that reaches, in the mean over families, what `size` settings reach.

        Args:
            which: indices of families, for intervals; all by default.
        Returns:
            n, or N + 1 where no search does.
        """
        rows = slice(None) if which is None else which
        reached = self.random[rows].mean(0) <= self.portfolio[rows, size - 1].mean() + 1e-12
        return int(reached.nonzero()[0]) + 1 if bool(reached.any()) else self.random.shape[1] + 1

    def find_equal_interval(self, size: int) -> tuple[int, int]:
        """95 % interval of `find_equal`, by drawing families."""
        generator, count = make_generator(0), len(self.families)
        draws = [torch.randint(count, (count,), generator=generator) for _ in range(DRAWS)]
        found = torch.tensor([self.find_equal(size, which) for which in draws], dtype=torch.float64)
        low, high = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return int(low), int(high)


def leave_out(
    scores: Mapping[str, Scores], candidates: Sequence[int], searched: Sequence[int], size: int, rounds: Sequence[int]
) -> LeftOut:
    """Choose on all families but one, look at that one, for each of them.

    Args:
        candidates: settings that a portfolio may take.
        searched: settings that random search draws from.
        size: K, of the largest portfolio.
        rounds: numbers of steps after which successive halving drops half, as in `Scores.early`.
    """
    regrets = find_regrets(scores)
    portfolio, halved = (torch.zeros(len(scores), size, dtype=regrets.dtype) for _ in range(2))
    for f, own in enumerate(scores.values()):
        others = [g for g in range(len(scores)) if g != f]
        order = [candidates[j] for j in choose_greedily(regrets[others][:, list(candidates)], size)]
        best = own.mean.min()
        for k in range(1, size + 1):
            portfolio[f, k - 1] = regrets[f, order[:k]].min()
            ends = [own.final[halve(own, order[:k], s, rounds), s] for s in range(own.final.shape[1])]
            halved[f, k - 1] = miss(torch.stack(ends).mean(), best)
    return LeftOut(list(scores), portfolio, halved, expect_random(regrets[:, list(searched)]))


def halve(scores: Scores, settings: Sequence[int], task: int, rounds: Sequence[int]) -> int:
    """The setting that successive halving leaves on a task, by early scores: as `lopt.choose` does it.

    Args:
        settings: columns, the one that has a lead first.
        rounds: numbers of steps, in their order; after each the better half goes on, after the last one the best.
    """
    left = list(settings)
    for i, step in enumerate(rounds):
        early = scores.early[step][:, task].tolist()
        early[settings[0]] += log(LEAD)
        left.sort(key=early.__getitem__)  # stable
        left = left[: 1 if i == len(rounds) - 1 else (len(left) + 1) // 2]
    return left[0]
