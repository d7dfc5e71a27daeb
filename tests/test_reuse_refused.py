"""What must not be reused is found by name, and trains as it would without."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lamina as lm
from reuse_models import Training, freeze, points, same_result


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


def idle_random(module, x):
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
    return x / 2 if x.max() > -99 else x


class Augmented(Base):
    """Random augmentation before the first layer, in the model's own forward."""

    def forward(self, x):
        if self.training:
            x = x * (torch.rand(len(x), 1) < 0.5)
        return super().forward(x)


class OutputInPlace(Base):
    """The output of a frozen layer is changed, and read again."""

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


class WithOddWidth(Base):
    """Rows of a product of matrices of six columns depend on the place in the batch."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)


def with_middle(make):
    return type("Made", (Base,), {"make": lambda self: make()})


FROZEN = "!head.*"
RANDOM, STATE, BATCH = (
    "draws random numbers",
    "'middle' (keeps state|uses a tensor)",
    "other bits in another batch",
)
NOTHING = "Nothing is reused"
#: the model, what is frozen (None: without eval mode), what the warning says, what is stored
CASES = {
    "noise": (with_middle(lambda: Function(noise)), FROZEN, f"'middle' {RANDOM}"),
    "random of Python": (with_middle(lambda: Function(python_random)), FROZEN, RANDOM),
    "random without effect": (with_middle(lambda: Function(idle_random)), FROZEN, RANDOM),
    "random of NumPy": (with_middle(lambda: Function(numpy_random)), FROZEN, RANDOM),
    "dropout always on": (with_middle(lambda: Function(always_dropout)), FROZEN, RANDOM),
    "counts its calls": (with_middle(lambda: Function(counts_calls, calls=0)), FROZEN, STATE),
    "remembers a mean": (with_middle(lambda: Function(remembers, seen=None)), FROZEN, STATE),
    "a list that grows": (with_middle(lambda: Function(appends, seen=[])), FROZEN, STATE),
    "mean of the batch": (with_middle(lambda: Function(batch_mean)), FROZEN, BATCH),
    "sorts the batch": (with_middle(lambda: Function(sorts_batch)), FROZEN, BATCH),
    "contrast of the batch": (with_middle(lambda: Function(contrast)), FROZEN, BATCH),
    "augmentation": (Augmented, FROZEN, f"model itself {RANDOM}"),
    "trains below": (TrainedBelow, "last.*", NOTHING),
    "trains below, through NumPy": (TrainedThroughNumpy, "last.*", NOTHING),
    "trains below and decides": (TrainedDecides, "last.*", NOTHING),
    "BatchNorm in training mode": (with_middle(lambda: nn.BatchNorm1d(8)), None, STATE),
    "dropout left on": (with_middle(lambda: nn.Dropout(0.5)), None, f"'middle' {RANDOM}"),
    "rows by rounding": (WithOddWidth, "first.*", BATCH),
}
#: these are reused, as far as their values allow it
REUSED = {
    "decides by values": with_middle(lambda: Function(decides)),
    "changes its input": with_middle(ChangesInput),
    "output changed in place": OutputInPlace,
}


def trained(model, frozen, reuse, width=8):
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    rules = freeze(frozen) if frozen else [lm.Rule(FROZEN, frozen=True, hold=False)]
    return Training(model, rules, points(width=width), reuse=reuse).run(4)


def stored(training):
    """The paths of the modules whose outputs are stored."""
    return {key.rsplit(">", 1)[-1].split("#")[0] for key, _ in training.reused.store.shelves}


@pytest.mark.parametrize("name", CASES)
def test_it_is_told_and_trains_as_without(name):
    model, frozen, reason = CASES[name]
    width = 6 if model is WithOddWidth else 8
    without = trained(model, frozen, None, width)
    with pytest.warns(lm.LaminaWarning, match=reason) as told:
        reusing = trained(model, frozen, {}, width)
    assert same_result(without, reusing)
    assert len({str(each.message) for each in told}) == len(told)  # each is told once
    # What comes before may be reused; the module itself and what is computed from it is not.
    assert stored(reusing) <= {"first"} - {"first" if "model itself" in reason else ""}
    assert (NOTHING in reason) == (not reusing.reused.refused)


@pytest.mark.parametrize("name", REUSED)
def test_it_is_reused_bit_for_bit(name):
    without, reusing = (trained(REUSED[name], FROZEN, reuse) for reuse in (None, {}))
    assert same_result(without, reusing)
    assert "last" in stored(reusing)
    assert reusing.reused.counts["replayed"] >= 3
