"""A task in which everything is drawn: dropout, augmentation, in this process or in workers.

Read from the environment, so that a process of its own can be told: RESUME_WORKERS, RESUME_SLEEP.
"""

import os
import random
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

PLAN = """
optimizer = "AdamW"
lr = 1e-2
schedule = "warmup(10%) >> cosine(to=0.01)"
clip_norm = 1.0
feedback = "plateau('val_loss', factor=0.5, patience=0, threshold=0.2)"
[[rule]]
match = "layer.{depth}.*"
lr = "by_depth(0.5)"
thaw = "top_down(every=0.7 epochs)"
"""
DEFAULTS = {"epochs": 3, "seed": 3}
WORKERS = int(os.environ.get("RESUME_WORKERS", "0"))
SLEEP = float(os.environ.get("RESUME_SLEEP", "0"))


class Drawn(Dataset):
    """Points moved a little, by draws from all three sources."""

    def __init__(self, points, labels):
        self.points, self.labels = points, labels

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        noise = torch.rand(4) + random.random() + float(np.random.rand())  # noqa: NPY002
        return self.points[index] + 0.1 * noise, self.labels[index]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for layer in self.layer:
            x = torch.tanh(layer(x))
        return self.head(self.drop(self.norm(x)))


def model():
    return Net()


def data():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(70, 4, generator=generator)
    labels = (points[:, 0] * points[:, 1] > 0).long()
    train = Drawn(points[:51], labels[:51])
    return {
        "train": DataLoader(train, batch_size=8, shuffle=True, num_workers=WORKERS),
        "validation": DataLoader(TensorDataset(points[51:], labels[51:]), batch_size=8),
    }


def loss(model, batch):
    if SLEEP:
        time.sleep(SLEEP)
    return functional.cross_entropy(model(batch[0]), batch[1])


def metrics(model, batch):
    return {"accuracy": (model(batch[0]).argmax(1) == batch[1]).float()}
