"""Tables, ratings and graphs: BatchNorm and dropout on patients, factors of users and items, message passing."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lopt.core.installation import advise
from lopt.core.random import make_generator
from lopt.evaluation.suites import data
from lopt.evaluation.suites.perceptrons import stack_layers
from lopt.evaluation.suites.task import Batch, Data, SuiteTask, classify, regress, score


def build_normalised(inward: int, width: int, outward: int, depth: int) -> nn.Module:
    """A perceptron with BatchNorm before every ReLU and dropout after it."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Linear(width if i else inward, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(width, outward))


class TableTransformer(nn.Module):
    """A transformer over the columns of a table, each with a vector of its own (Gorishniy et al. 2021, arXiv
    2106.11959).
    """

    def __init__(self, columns: int = 10, width: int = 32) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.randn(columns, width) / width**0.5)
        self.offsets = nn.Parameter(torch.randn(columns, width) / width**0.5)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.1, "relu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, columns]` to `[B, 1]`."""
        y: Tensor = self.head(self.layers(x[:, :, None] * self.scales + self.offsets).mean(1))
        return y


# -- ratings -----------------------------------------------------------------------------------------------------------

USERS, ITEMS = 600, 400


@cache
def load_ratings() -> Data:
    """Ratings from 1 to 5 that users gave to items, popular ones more often: 24,000 train and 4,000 held out; 8 hidden
    factors, a liking of every user and item, and noise made them.
    """
    generator = make_generator(15)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tastes, traits = randn(USERS, 8) / 8**0.5, randn(ITEMS, 8)
    popularity = 1 / (1 + torch.arange(ITEMS)) ** 0.6
    users = torch.randint(USERS, (28_000,), generator=generator)
    items = torch.multinomial(popularity, 28_000, replacement=True, generator=generator)
    liking = (tastes[users] * traits[items]).sum(1) + 0.5 * randn(USERS)[users] + 0.5 * randn(ITEMS)[items]
    ratings = (3.4 + 0.9 * liking + 0.5 * randn(28_000)).round().clamp(1, 5) - 3.4
    table = users, items, ratings[:, None]
    return Data(tuple(x[:24_000] for x in table), tuple(x[24_000:] for x in table))


class Recommender(nn.Module):
    """Neural collaborative filtering: factors of user and item, multiplied and through a perceptron (He et al. 2017,
    arXiv 1708.05031).
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(USERS, width), nn.Embedding(ITEMS, width)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.1)
        self.layers = stack_layers([3 * width, 64, 32, 1], nn.ReLU)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Ratings less their mean, `[B, 1]`."""
        user, item = self.users(users), self.items(items)
        y: Tensor = self.layers(torch.cat([user, item, user * item], 1))
        return y


def rate_items(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error of ratings."""
    users, items, ratings = batch
    return F.mse_loss(model(users, items), ratings)


# -- graphs ------------------------------------------------------------------------------------------------------------

NODES, GROUPS = 800, 6


@cache
def load_blocks() -> Data:
    """A graph of 800 nodes in 6 groups that are linked more often inside than between, with weak features of them: its
    normalised adjacency `[n, n]`, features `[n, 32]`, labels, and the nodes that are train or held out.
    """
    generator = make_generator(16)
    labels = torch.randint(GROUPS, (NODES,), generator=generator)
    inside = labels[:, None] == labels
    linked = torch.rand(NODES, NODES, generator=generator) < torch.where(inside, 0.03, 0.006)
    adjacency = torch.triu(linked, 1).float()
    adjacency = adjacency + adjacency.T + torch.eye(NODES)
    scale = adjacency.sum(1).rsqrt()
    means = torch.randn(GROUPS, 32, generator=generator)
    features = 0.3 * means[labels] + torch.randn(NODES, 32, generator=generator)
    order = torch.randperm(NODES, generator=generator)
    graph = scale[:, None] * adjacency * scale, features, labels
    return Data((*graph, order[:500]), (*graph, order[500:]))


def draw_nodes(train: Batch, count: int, generator: Generator, _: float) -> Batch:
    """The graph with some of its labelled nodes."""
    adjacency, features, labels, nodes = train
    return adjacency, features, labels, nodes[torch.randint(len(nodes), (count,), generator=generator)]


class GCN(nn.Module):
    """A graph convolutional network with dropout, two rounds (Kipf & Welling 2016, arXiv 1609.02907)."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.first, self.between = nn.Linear(32, width), nn.Linear(width, width // 4)
        self.second = nn.Linear(width // 4, GROUPS)
        self.drop = nn.Dropout(0.4)

    def forward(self, adjacency: Tensor, features: Tensor) -> Tensor:
        """Logits `[n, 6]` of all nodes."""
        h = F.relu(adjacency @ self.first(self.drop(features)))
        h = F.relu(self.between(self.drop(h)))
        logits: Tensor = adjacency @ self.second(h)
        return logits


def classify_nodes(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the batch's nodes."""
    adjacency, features, labels, nodes = batch
    return F.cross_entropy(model(adjacency, features)[nodes], labels[nodes])


def score_nodes(model: nn.Module, batch: Batch) -> Tensor:
    """Share of the batch's nodes that are put into their group."""
    adjacency, features, labels, nodes = batch
    right: Tensor = (model(adjacency, features)[nodes].argmax(1) == labels[nodes]).float().mean()
    return right


@cache
def load_atlas() -> Data:
    """networkx's atlas of all connected graphs of 4 to 7 nodes: adjacencies `[n, 7, 7]` and, standardised, the number
    of triangles, the largest eigenvalue, the algebraic connectivity and the mean distance; a fifth is held out.
    """
    try:
        import networkx as nx
    except ImportError as error:
        raise ImportError(f"the atlas of graphs comes with networkx: {advise('suites')}") from error

    adjacencies, targets = [], []
    for graph in nx.graph_atlas_g():
        size = len(graph)
        if size < 4 or not nx.is_connected(graph):
            continue
        matrix = np.zeros((7, 7))
        matrix[:size, :size] = nx.to_numpy_array(graph)
        core = matrix[:size, :size]
        laplacian = np.linalg.eigvalsh(np.diag(core.sum(1)) - core)
        distance = nx.average_shortest_path_length(graph)
        triangles = np.trace(core @ core @ core) / 6
        adjacencies.append(matrix)
        targets.append([triangles, np.linalg.eigvalsh(core)[-1], laplacian[1], distance])
    x, y = (torch.tensor(np.array(values), dtype=torch.float32) for values in (adjacencies, targets))
    y = (y - y.mean(0)) / y.std(0)
    order = torch.randperm(len(x), generator=make_generator(17))
    held_out, train = order[: len(x) // 5], order[len(x) // 5 :]
    return Data((x[train], y[train]), (x[held_out], y[held_out]))


class GIN(nn.Module):
    """A graph isomorphism network of 3 rounds, LayerNorm, summed over nodes (Xu et al. 2018, arXiv 1810.00826)."""

    def __init__(self, width: int = 48, rounds: int = 3) -> None:
        super().__init__()
        self.start = nn.Linear(1, width)
        self.rounds = nn.ModuleList(stack_layers([width, width, width], nn.ReLU) for _ in range(rounds))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(rounds))
        self.head = stack_layers([width, width, 4], nn.ReLU)

    def forward(self, adjacency: Tensor) -> Tensor:
        """Four properties `[B, 4]` of graphs `[B, 7, 7]`; nodes without an edge are no part of them."""
        degree = adjacency.sum(2, keepdim=True)
        h = self.start(degree / 3)
        for step, norm in zip(self.rounds, self.norms, strict=True):
            h = h + step(norm(h + adjacency @ h))
        y: Tensor = self.head((h * (degree > 0)).sum(1) / 4)
        return y


# -- development -------------------------------------------------------------------------------------------------------

CANCER_TABLE = SuiteTask(
    name="cancer_table",
    title="MLP of 3 layers of 96, BatchNorm and dropout, on the breast-cancer table",
    architecture="perceptron with BatchNorm",
    data_set="breast cancer",
    num_steps=300,
    batch_size=32,
    build=lambda: build_normalised(30, 96, 2, 3),
    load=data.cancer_table,
    loss=classify,
    accuracy=score,
)

BLOCKS_GCN = SuiteTask(
    name="blocks_gcn",
    title="graph convolutional network with dropout on the groups of 800 nodes",
    architecture="graph convolutional network",
    data_set="block graph",
    num_steps=300,
    batch_size=64,
    build=GCN,
    load=load_blocks,
    loss=classify_nodes,
    sample=draw_nodes,
    accuracy=score_nodes,
)

# -- held out ----------------------------------------------------------------------------------------------------------

DIABETES_TABLE = SuiteTask(
    name="diabetes_table",
    title="transformer over the columns of the diabetes table, dropout, in batches of 4",
    architecture="transformer over columns",
    data_set="diabetes",
    num_steps=600,
    batch_size=4,
    build=TableTransformer,
    load=data.diabetes_table,
    loss=regress,
)

RECOMMENDER = SuiteTask(
    name="recommender",
    title="neural collaborative filtering of 600 users and 400 items, 24 factors",
    architecture="neural collaborative filtering",
    data_set="ratings",
    num_steps=800,
    batch_size=128,
    build=Recommender,
    load=load_ratings,
    loss=rate_items,
)

ATLAS_GIN = SuiteTask(
    name="atlas_gin",
    title="graph isomorphism network of 3 rounds of 48 on properties of small graphs",
    architecture="graph isomorphism network",
    data_set="atlas of graphs",
    num_steps=800,
    batch_size=32,
    build=GIN,
    load=load_atlas,
    loss=regress,
)
