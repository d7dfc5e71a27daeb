"""Small models that the tests share, and plain descriptions of their parameters."""

from collections import OrderedDict

import torch
from torch import nn


class Block(nn.Module):
    """One layer: a linear map, a norm."""

    def __init__(self, width=3):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(torch.tanh(self.dense(x)))


class Encoder(nn.Module):
    """Embeddings, numbered layers and a classifier, named as in Transformers."""

    def __init__(self, layers=(0, 1, 2), width=3, classes=2):
        super().__init__()
        self.embeddings = nn.Linear(width, width, bias=False)
        blocks = nn.ModuleDict({str(number): Block(width) for number in layers})
        self.encoder = nn.Module()
        self.encoder.layer = blocks
        self.classifier = nn.Linear(width, classes)

    def forward(self, x):
        x = self.embeddings(x)
        for block in self.encoder.layer.values():
            x = block(x)
        return self.classifier(x)


class Tied(nn.Module):
    """The decoder is the encoder's tensor."""

    def __init__(self, width=3):
        super().__init__()
        self.encoder = nn.Linear(width, width, bias=False)
        self.middle = nn.Linear(width, width)
        self.decoder = nn.Linear(width, width, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(torch.tanh(self.middle(self.encoder(x))))


class Wrapper(nn.Module):
    """Holds a model under `module`, as DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def encoder(layers=(0, 1, 2), seed=0, dtype=torch.float64):
    """A reproducible `Encoder`."""
    torch.manual_seed(seed)
    return Encoder(layers).to(dtype)


def mlp(seed=0, dtype=torch.float64):
    """Two linear layers named `body` and `head`."""
    torch.manual_seed(seed)
    layers = [("body", nn.Linear(3, 4)), ("act", nn.Tanh()), ("head", nn.Linear(4, 2))]
    return nn.Sequential(OrderedDict(layers)).to(dtype)


def described(model):
    """The parameters as plain data, for the oracle."""
    owners = {
        f"{path}.{name}" if path else name: module
        for path, module in model.named_modules()
        for name in module._parameters
    }
    return [
        {
            "name": name,
            "types": [base.__name__ for base in type(owners[name]).__mro__],
            "ndim": param.ndim,
            "requires_grad": param.requires_grad,
        }
        for name, param in model.named_parameters()
    ]


def backward(model, step=0, width=3):
    """Gradients of some loss on data that depends on the step alone."""
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    x = torch.randn(5, width, generator=generator, dtype=dtype)
    loss = model(x).square().mean()
    loss.backward()
    return loss.detach()


def train(model, optimizer, steps, first=0):
    """Some training steps; returns the losses."""
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        losses.append(backward(model, step))
        optimizer.step()
    return losses


def weights(model):
    """Copies of all parameters by name."""
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def same(a, b):
    """Whether two sets of weights are bit-identical."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def equal(a, b):
    """Whether two nested states are the same, tensors bit by bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b
