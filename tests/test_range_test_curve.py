"""What is read from the losses of a range test, against problems whose answer is known."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lamina as lm
from lamina.range_test.curve import Curve, has_exploded, noise_of, smoothed

LRS = tuple(np.geomspace(1e-7, 10, 100))


class Quadratic(nn.Module):
    """The mean of `L_i * (w_i - x_i) ** 2 / 2` over a batch x: SGD is stable below 2 / max(L)."""

    def __init__(self, curvatures):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(len(curvatures)))
        self.register_buffer("curvatures", torch.tensor(curvatures, dtype=torch.float32))

    def forward(self, batch):
        return (self.curvatures * (self.weight - batch).square()).sum(1).mean() / 2


def call(model, batch):
    return model(batch)


def samples(size, spread=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [spread * torch.randn(8, size, generator=generator) for _ in range(40)]


# ------------------------------------------------------------------------------- a known answer


@pytest.mark.parametrize(("largest", "condition"), [(0.5, 1.0), (50.0, 100.0)])
def test_a_quadratic_whose_largest_stable_lr_is_known(largest, condition):
    curvatures = list(np.geomspace(largest / condition, largest, 12))
    model = Quadratic(curvatures)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found = lm.find_lr(model, optimizer, call, samples(12), high=100.0)
    limit = 2 / largest
    assert limit / 50 < found.interval[0] <= found.suggestion <= found.interval[1] < limit / 2
    assert all(curve.diverged for curve in found.curves)


def test_flat_directions_do_not_hide_a_steep_one():
    """Most of the loss needs an lr beyond what the steepest direction stands."""
    model = Quadratic([1.0] + [0.01] * 500)
    optimizer = lm.Plan("SGD", lr=0.01).build(model)
    found = lm.find_lr(model, optimizer, call, samples(501))
    assert 2 / 50 < found.suggestion < 2


def test_training_at_the_suggestion_converges_and_far_above_does_not():
    model = Quadratic(list(np.geomspace(0.1, 10, 12)))
    data = samples(12)
    found = lm.find_lr(model, torch.optim.SGD(model.parameters(), lr=0.01), call, data)

    def train(lr):
        twin = Quadratic(list(np.geomspace(0.1, 10, 12)))
        optimizer = torch.optim.SGD(twin.parameters(), lr=lr)
        for batch in data * 3:
            optimizer.zero_grad()
            twin(batch).backward()
            optimizer.step()
        return float(twin(data[0]).detach())

    start = float(model(data[0]).detach())
    assert train(found.suggestion) < start / 20
    assert not train(30 * found.suggestion) < start


# ---------------------------------------------------------------------------------------- no


def noisy(level, seed, kind):
    rng = np.random.default_rng(seed)
    draw = {"normal": rng.standard_normal, "heavy": lambda n: rng.standard_t(3, n)}[kind]
    return tuple(map(float, 2 + level * draw(len(LRS))))


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_noise_gives_no_suggestion(kind):
    """One curve in eight at most looks like a fall, so that three in a row hardly ever do."""
    readings = [Curve(LRS, noisy(0.3, seed, kind), 100, False).read() for seed in range(100)]
    wrong = sum(not reading.reason for reading in readings)
    assert wrong <= 12
    assert all(math.isnan(reading.lr) == bool(reading.reason) for reading in readings)


def test_a_loss_of_noise_alone_is_refused_with_the_reason():
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def noise(twin, batch):
        return 0 * twin(batch).mean() + torch.randn(())

    found = lm.find_lr(model, optimizer, noise, samples(4))
    assert (found.suggestion, found.interval, found.factor, found.lrs) == (None, None, None, {})
    assert re.search(r"in \d of 3 repeats the loss falls by .* within its noise of", found.reason)
    assert "no suggestion: in" in str(found)


def test_a_constant_loss_is_refused():
    assert "within its noise" in Curve(LRS, (2.0,) * 100, 100, False).read().reason
    rounding = tuple(2.0 - 1e-7 * (i % 2) for i in range(100))
    assert "within its noise" in Curve(LRS, rounding, 100, False).read().reason


def test_a_range_that_is_too_low_or_too_high():
    model = Quadratic([1.0] * 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = lm.find_lr(model, optimizer, call, samples(4), high=0.02)
    assert found.reason.endswith("the loss still falls at the highest learning rate; raise `high`.")
    found = lm.find_lr(model, optimizer, call, samples(4), low=30.0, high=100.0)
    assert "the loss explodes at the first learning rates; lower `low`" in found.reason


def test_repeats_that_disagree_are_refused():
    from lamina.range_test.find import _judged

    def falling(place):
        return tuple(float(2 - 1 / (1 + math.exp(-(i - place) / 2))) for i in range(100))

    class Target:
        names = ["all"]  # noqa: RUF012
        lr = {0: 0.1}  # noqa: RUF012
        held = None

        def written(self, factor):
            return ""

    near = [Curve(LRS, falling(place), 100, True) for place in (40, 42, 44)]
    assert _judged(Target(), 0, tuple(near)).suggestion is not None
    far = [Curve(LRS, falling(place), 100, True) for place in (30, 42, 54)]
    found = _judged(Target(), 0, tuple(far))
    assert found.suggestion is None
    assert "more than a factor of 10 apart" in found.reason


# --------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("planned", [True, False])
def test_a_loss_that_is_not_finite_ends_a_sweep(bad, planned):
    model, calls = Quadratic([1.0] * 4), []

    def failing(twin, batch):
        calls.append(1)
        return twin(batch) * (bad if len(calls) % 30 == 0 else 1)

    plan = lm.Plan("SGD", lr=0.1)
    optimizer = plan.build(model) if planned else torch.optim.SGD(model.parameters(), lr=0.1)
    found = lm.find_lr(model, optimizer, failing, samples(4), steps=40)
    assert [(len(curve.loss), curve.diverged) for curve in found.curves] == [(29, True)] * 3
    assert all(map(math.isfinite, found.curves[0].loss))


def test_a_gradient_that_is_not_finite_ends_a_sweep_under_a_plan():
    model = nn.Linear(4, 1)

    def steep(twin, batch):  # the slope of sqrt at 0 is infinite
        output = twin(batch).square().mean()
        return output + 0 * (0 * output).sqrt()

    found = lm.find_lr(model, lm.Plan("SGD", lr=0.1).build(model), steep, samples(4))
    assert all(curve.diverged and len(curve.loss) == 0 for curve in found.curves)
    assert "explodes at the first" in found.reason


def test_a_loss_that_refuses_nan_ends_a_sweep_but_a_mistake_is_told():
    model = Quadratic([1.0] * 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def picky(twin, batch):
        if not torch.isfinite(twin.weight).all() or twin.weight.abs().max() > 1e10:
            raise ValueError("all values should be finite")
        with torch.no_grad():  # so that it gets there
            if twin.weight.abs().max() > 3:
                twin.weight.fill_(math.nan)
                raise ValueError("all values should be finite")
        return twin(batch)

    found = lm.find_lr(model, optimizer, picky, samples(4))
    assert all(curve.diverged for curve in found.curves)

    def broken(twin, batch):
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        lm.find_lr(model, optimizer, broken, samples(4))


def test_one_bad_batch_ends_nothing():
    losses = [1.0 + 0.01 * (i % 3) for i in range(40)]
    losses[20] = 50.0
    assert not any(has_exploded(losses[:n]) for n in range(41))
    assert has_exploded([*losses, 50.0, 60.0, 70.0])


# --------------------------------------------------------------------------------- the numbers


def test_noise_is_that_of_the_trend_and_not_of_leaps():
    rng = np.random.default_rng(0)
    loss = np.linspace(3, 1, 2000) + 0.2 * rng.standard_normal(2000)
    assert noise_of(loss) == pytest.approx(0.2, rel=0.1)
    loss[::50] += 30  # which would make it 4, were they not cut off
    assert noise_of(loss) < 0.3


def test_smoothing_has_no_lag_and_keeps_a_constant():
    assert smoothed(np.full(50, 2.5), 3.0) == pytest.approx(2.5)
    step = np.r_[np.ones(50), np.zeros(50)]
    smooth = smoothed(step, 2.5)
    assert smooth[49] + smooth[50] == pytest.approx(1.0)


def test_the_formula():
    """A fall of a logistic curve: half of it is at its middle."""
    middle, losses = 50, []
    for i in range(100):
        rise = 0.2 * max(0, i - 75) ** 2
        losses.append(2 - 1 / (1 + math.exp(-(i - middle) / 3)) + rise)
    reading = Curve(LRS, tuple(losses), 100, True).read()
    assert reading.lr == pytest.approx(LRS[middle], rel=0.05)
    assert (reading.start, reading.fall) == pytest.approx((2.0, 1.0), abs=0.02)
    near = [*losses[:54], *(loss + 5 for loss in losses[54:60])]
    assert Curve(LRS[:60], tuple(near), 100, True).read().lr == pytest.approx(LRS[53] / 3, rel=0.5)


# --------------------------------------------------------------------------- words and pictures


@pytest.fixture(scope="module")
def found():
    model = Quadratic([1.0] * 4)
    model.named = nn.Parameter(torch.zeros(()))
    plan = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("named", lr=0.05)])
    optimizer = plan.build(model, steps=10)

    def both(twin, batch):
        return twin(batch) + (twin.named - 1) ** 2

    return lm.find_lr(model, optimizer, both, samples(4), steps=60)


def test_the_words(found):
    text = str(found)
    assert "3 repeats of 60 steps, the plan held at step 0" in text
    assert f"suggestion: lr {found.suggestion:.2g} for 'default', now 0.1" in text
    assert f"add the last rule lm.Rule('*', lr=lm.times({found.factor:.2g}))" in text
    assert found.lrs["named"] / found.lrs["default"] == pytest.approx(0.5)
    assert found.interval[0] <= found.suggestion <= found.interval[1]
    values = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert values["suggestion"] == found.suggestion
    assert len(values["curves"][0]["loss"]) == len(found.curves[0].loss)


def test_the_advice_of_a_plan_is_right():
    model = Quadratic([1.0] * 4)
    plan = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("weight", lr=lm.times(0.5))])
    optimizer = plan.build(model, steps=10)
    found = lm.find_lr(model, optimizer, call, samples(4), steps=60)
    better = lm.Plan("SGD", lr=0.1, rules=[*plan.rules, lm.Rule("*", lr=lm.times(found.factor))])
    built = better.build(Quadratic([1.0] * 4), steps=10)
    assert built.param_groups[0]["lr"] == pytest.approx(found.suggestion)
    other = Quadratic([1.0] * 4)
    groups = torch.optim.SGD(other.parameters(), lr=0.1)
    text = str(lm.find_lr(other, groups, call, samples(4), steps=60))
    assert "to use it, multiply the lr of every group by" in text
    alone = lm.Plan("SGD", lr=0.1).build(other)
    simple = lm.find_lr(other, alone, call, samples(4), steps=60)
    assert f"give the plan lr={simple.suggestion:.2g}" in str(simple)


def test_names_do_not_steer_the_terminal():
    model = Quadratic([1.0] * 4)
    groups = [{"params": list(model.parameters()), "name": "\x1b[31mred"}]
    found = lm.find_lr(model, torch.optim.SGD(groups, lr=0.1), call, samples(4), steps=40)
    assert "\x1b" not in str(found)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture(found, tmp_path, suffix):
    path = tmp_path / f"lr.{suffix}"
    figure = found.plot(path)
    assert path.stat().st_size > 1000
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert f"suggestion {found.suggestion:.2g}" in labels
    assert "now 0.1" in labels


def test_a_picture_that_cannot_be_written(found, tmp_path):
    for path in ("lr.xyz", "lr", tmp_path / "gone" / "lr.png"):
        with pytest.raises(lm.LaminaError, match=re.escape(str(path))):
            found.plot(path)
    assert list(tmp_path.iterdir()) == []
    assert not Path("lr.xyz").exists()
