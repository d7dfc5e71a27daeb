"""A task that takes milliseconds: two layers and a head on made-up data."""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

PLAN = """
optimizer = "AdamW"
lr = 1e-2
schedule = "warmup(10%) >> cosine(to=0.01)"
clip_norm = 1.0
[[rule]]
match = "layer.{depth}.*"
lr = "by_depth(0.5)"
thaw = "top_down(every=0.4 epochs)"
"""
DEFAULTS = {"epochs": 2, "seed": 3}
EXAMPLES = "points"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for layer in self.layer:
            x = torch.tanh(layer(x))
        return self.head(x)


def model():
    return Net()


def data():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(70, 4, generator=generator)
    labels = (points[:, 0] * points[:, 1] > 0).long()
    return {
        "train": DataLoader(TensorDataset(points[:49], labels[:49]), batch_size=8, shuffle=True),
        "validation": DataLoader(TensorDataset(points[49:], labels[49:]), batch_size=8),
    }


def loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def metrics(model, batch):
    return {"accuracy": (model(batch[0]).argmax(1) == batch[1]).float()}


def baseline(data):
    return {"share of the larger class": float(len(data["validation"].dataset)) / 70}
