"""A task of one's own: lamina run examples/own_task.py

Tell digits apart that are drawn off centre on noisy 8 × 8 pictures; the data is made here.
"""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

PLAN = """
optimizer = "AdamW"
lr = 3e-3
weight_decay = 0.01
schedule = "warmup(10%) >> cosine(to=0.01)"
clip_norm = 1.0

[[rule]]  # lower layers move less
match = "layers.{depth}.*"
lr = "by_depth(0.7)"

[[rule]]
match = "*.bias"
weight_decay = 0
"""
DEFAULTS = {"epochs": 5, "seed": 0}
EXAMPLES = "pictures"

# Each digit as the seven strokes of a pocket calculator: top, then clockwise, the middle last.
STROKES = ["1111110", "0110000", "1101101", "1111001", "0110011"]
STROKES += ["1011011", "1011111", "1110000", "1111111", "1111011"]


def draw(digit):
    """An 8 × 8 picture of a digit."""
    picture = torch.zeros(8, 8)
    lines = [(0, slice(2, 6)), (slice(0, 4), 6), (slice(4, 8), 6), (7, slice(2, 6))]
    lines += [(slice(4, 8), 1), (slice(0, 4), 1), (4, slice(2, 6))]
    for stroke, place in zip(STROKES[digit], lines, strict=True):
        if stroke == "1":
            picture[place] = 1.0
    return picture


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])
        self.classifier = nn.Linear(64, 10)

    def forward(self, pictures):
        hidden = pictures.flatten(1)
        for layer in self.layers:
            hidden = hidden + torch.relu(layer(hidden))
        return self.classifier(hidden)


def model():
    return Net()


def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (3000,), generator=generator)
    moves = torch.randint(-1, 2, (3000, 2), generator=generator).tolist()
    moved = [draw(int(d)).roll(move, (0, 1)) for d, move in zip(labels, moves, strict=True)]
    pictures = torch.stack(moved) + 0.3 * torch.randn(3000, 8, 8, generator=generator)
    return {
        "train": DataLoader(TensorDataset(pictures[:2000], labels[:2000]), 32, shuffle=True),
        "validation": DataLoader(TensorDataset(pictures[2000:], labels[2000:]), 64),
    }


def loss(model, batch):
    pictures, labels = batch
    return functional.cross_entropy(model(pictures), labels)


def metrics(model, batch):
    pictures, labels = batch
    return {"accuracy": (model(pictures).argmax(1) == labels).float()}


def baseline(data):
    """The share that is right when each picture is compared with the mean of every class."""
    train, held_out = (data[part].dataset.tensors for part in ("train", "validation"))
    means = torch.stack([train[0][train[1] == digit].mean(0) for digit in range(10)]).flatten(1)
    nearest = torch.cdist(held_out[0].flatten(1), means).argmin(1)
    return {"accuracy of the nearest class mean": (nearest == held_out[1]).float().mean().item()}
