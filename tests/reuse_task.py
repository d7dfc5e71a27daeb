"""A task with a frozen stem, dropout and BatchNorm, whose layers thaw one after the other."""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

HEAD = """
optimizer = "AdamW"
lr = 1e-2
schedule = "warmup(10%) >> cosine(to=0.01)"
[[rule]]
match = "!head.*"
frozen = true
"""
TOP_DOWN = """
optimizer = "AdamW"
lr = 1e-2
[[rule]]
match = "stem.*"
frozen = true
[[rule]]
match = "layer.{depth}.*"
thaw = "top_down(every=1 epochs, start=1 epochs)"
"""
PROBE_THEN_ALL = """
optimizer = "SGD"
lr = 1e-2
momentum = 0.9
clip_norm = 1.0
[[rule]]
match = "!head.*"
thaw = "2 epochs"
"""
FROZEN_LATER = """
optimizer = "SGD"
lr = 1e-2
[[rule]]
match = "!head.*"
freeze = "1 epochs"
"""
PLAN = TOP_DOWN
DEFAULTS = {"epochs": 4, "seed": 3}
EXAMPLES = "points"


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        return x + self.drop(torch.tanh(self.norm(self.linear(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.layer = nn.ModuleList([Layer() for _ in range(2)])
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layer:
            x = layer(x)
        return self.head(x)


def model():
    return Net()


def points():
    """Training and held-out examples: points and labels."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(70, 4, generator=generator)
    labels = (points[:, 0] * points[:, 1] > 0).long()
    return TensorDataset(points[:48], labels[:48]), TensorDataset(points[48:], labels[48:])


def data():
    train, held_out = points()
    return {
        "train": DataLoader(train, batch_size=8, shuffle=True),
        "validation": DataLoader(held_out, batch_size=8),
    }


def loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def metrics(model, batch):
    logits, labels = model(batch[0]), batch[1]
    return {
        "loss": functional.cross_entropy(logits, labels, reduction="none"),
        "accuracy": (logits.argmax(1) == labels).float(),
    }
