"""What must not be reused is found by name, and trains as it would without."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lamina as lm
from reuse_models import Training, freeze, plain, points, same_result


class Base(nn.Module):
    """A frozen first layer, something in the middle, a frozen last layer, a head that trains."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.middle = self.make()
        self.last = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 2)

    def make(self):
        return nn.Identity()

    def forward(self, x):
        return self.head(self.last(self.middle(self.first(x))))


class Function(nn.Module):
    """A frozen module whose forward is a function with itself as the first argument."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.function = function
        vars(self).update(attributes)

    def forward(self, x):
        return self.function(self, x * self.weight)


def noise(module, x):
    return x + 0.1 * torch.randn_like(x)


def python_random(module, x):
    return x * random.random()


def rare_python_random(module, x):
    return x if random.random() < 2 else x + 1


def numpy_random(module, x):
    return x + torch.from_numpy(np.random.rand(8).astype("float32"))  # noqa: NPY002


def always_dropout(module, x):
    return F.dropout(x, 0.5, training=True)


def counts_calls(module, x):
    module.calls += 1
    return x * module.calls


def remembers(module, x):
    module.seen = x.detach() if module.seen is None else 0.9 * module.seen + 0.1 * x.detach()
    return x + module.seen.mean()


def appends(module, x):
    module.seen.append(0)
    return x * len(module.seen)


def batch_mean(module, x):
    return x - x.mean(0)


def sorts_batch(module, x):
    return x.sort(0).values


def contrast(module, x):
    return x @ x.T @ x


def decides(module, x):
    return x / 2 if x.max() > 2 else x


class Augmented(Base):
    """Random augmentation before the first layer, in the model's own forward."""

    def forward(self, x):
        if self.training:
            x = x * (torch.rand(len(x), 1) < 0.5)
        return super().forward(x)


class InputInPlace(Base):
    """The first layer's input is changed afterwards, and read again."""

    def forward(self, x):
        x = x.clone()
        y = self.first(x)
        z = self.middle(y)
        y.add_(1)
        return self.head(self.last(z + y))


class ChangesInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x.mul_(2) * self.weight


class TrainedBelow(Base):
    """What trains reaches the frozen layer without a gradient."""

    def make(self):
        return nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.last(self.middle(x).detach()))


class TrainedThroughNumpy(TrainedBelow):
    def forward(self, x):
        values = self.middle(x).detach().numpy()
        return self.head(self.last(torch.from_numpy(values)))


class TrainedDecides(TrainedBelow):
    def forward(self, x):
        sign = 1.0 if self.middle(x).sum().item() > 0 else -1.0
        return self.head(self.last(x * sign))


def with_middle(make):
    return type("Made", (Base,), {"make": lambda self: make()})


FROZEN = "!head.*"
#: the model, what is frozen, the path that is told or "", and a part of the reason
CASES = {
    "noise": (with_middle(lambda: Function(noise)), FROZEN),
    "random of Python": (with_middle(lambda: Function(python_random)), FROZEN),
    "random of Python without effect": (with_middle(lambda: Function(rare_python_random)), FROZEN),
    "random of NumPy": (with_middle(lambda: Function(numpy_random)), FROZEN),
    "dropout that is always on": (with_middle(lambda: Function(always_dropout)), FROZEN),
    "counts its calls": (with_middle(lambda: Function(counts_calls, calls=0)), FROZEN),
    "remembers a mean": (with_middle(lambda: Function(remembers, seen=None)), FROZEN),
    "a list that grows": (with_middle(lambda: Function(appends, seen=[])), FROZEN),
    "mean of the batch": (with_middle(lambda: Function(batch_mean)), FROZEN),
    "sorts the batch": (with_middle(lambda: Function(sorts_batch)), FROZEN),
    "contrast of the batch": (with_middle(lambda: Function(contrast)), FROZEN),
    "decides by values": (with_middle(lambda: Function(decides)), FROZEN),
    "augmentation": (Augmented, FROZEN),
    "changes its input": (with_middle(ChangesInput), FROZEN),
    "output changed in place": (InputInPlace, FROZEN),
    "trains below": (TrainedBelow, "first.* | last.*"),
    "trains below, through NumPy": (TrainedThroughNumpy, "first.* | last.*"),
    "trains below and decides": (TrainedDecides, "first.* | last.*"),
    "BatchNorm in training mode": (with_middle(lambda: nn.BatchNorm1d(8)), None),
    "dropout left on": (with_middle(lambda: nn.Dropout(0.5)), None),
}


def rules_of(frozen):
    return [lm.Rule(FROZEN, frozen=True, hold=False)] if frozen is None else freeze(frozen)


@pytest.mark.filterwarnings("ignore::lamina.LaminaWarning")
@pytest.mark.parametrize("name", CASES)
def test_it_trains_as_without(name):
    model, frozen = CASES[name]

    def trained(reuse):
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        return Training(model, rules_of(frozen), points(), reuse=reuse).run(4)

    without, reusing = trained(None), trained({})
    assert same_result(without, reusing)
    used = {key.rsplit(">", 1)[-1].split("#")[0] for key, _ in reusing.reused.store.shelves}
    # What comes before is reused; the module itself and what is computed from it is not.
    assert used <= ({"first"} if name != "augmentation" else set())
