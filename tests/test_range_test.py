"""A range test leaves everything as it was, keeps ratios, and says no where it must."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lamina as lm
from lamina.range_test.trial import endless, random_sources_kept

SHORT = {"steps": 20, "repeats": 3}


def net():
    """With BatchNorm, dropout, a part that rests for a while, and one that is frozen by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)),
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()),
        nn.Linear(8, 1),
    )
    model[1][0].bias.requires_grad_(False)
    return model


def loader(shuffle=True, size=8):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(12 * size, 4, generator=generator)
    own = torch.Generator().manual_seed(6)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    return DataLoader(data, size, shuffle=shuffle, generator=own)


def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def planned(optimizer, **settings):
    def build(model):
        rules = [lm.Rule("0.*", lr=lm.times(0.1), thaw=4), lm.Rule("2.*", clip_norm=1.0)]
        plan = lm.Plan(optimizer, rules=rules, schedule="warmup(2) >> cosine()", **settings)
        return plan.build(model, steps=12)

    return build


def grouped(optimizer, **settings):
    def build(model):
        params = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": params[:4], "lr": 0.001}, {"params": params[4:]}]
        return optimizer(groups, **settings)

    return build


def whole(optimizer, **settings):
    return lambda model: optimizer([p for p in model.parameters() if p.requires_grad], **settings)


BUILDERS = {
    "plan, SGD": planned("SGD", lr=0.05, momentum=0.9),
    "plan, AdamW": planned("AdamW", lr=0.01),
    "plan, torch's RMSprop": planned(torch.optim.RMSprop, lr=0.01),
    "torch SGD": grouped(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "torch AdamW": grouped(torch.optim.AdamW, lr=0.01, amsgrad=True),
    "torch LBFGS": whole(torch.optim.LBFGS, lr=0.1, max_iter=2),
    "lamina AdamW": grouped(lm.AdamW, lr=0.01),
    "lamina LBFGS": whole(lm.LBFGS, lr=0.1, max_iter=2),
}


def train(model, optimizer, data, scaler, steps):
    model.train()
    batches = [batch for _ in range(2) for batch in data][:steps]
    for batch in batches:

        def closure(batch=batch):
            optimizer.zero_grad()
            value = loss(model, batch)
            (value if scaler is None else scaler.scale(value)).backward()
            return value

        if scaler is None:
            optimizer.step(closure)
        else:
            closure()
            scaler.step(optimizer)
            scaler.update()


def everything(model, optimizer, data, scaler):
    """All that a step reads or writes, as copies."""
    found = {
        "model": model.state_dict(),
        "gradients": [p.grad for p in model.parameters()],
        "flags": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "optimizer": optimizer.state_dict(),
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
        "scaler": scaler and scaler.state_dict(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": torch.get_rng_state(),
        "loader": data.generator.get_state(),
    }
    return copy.deepcopy(found)


def assert_equal(one, other, place=""):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_equal(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{place}[{index}]")
    elif isinstance(one, (torch.Tensor, np.ndarray)):
        assert np.array_equal(np.asarray(one), np.asarray(other), equal_nan=True), place
    else:
        assert one == other, place


def situation(kind, scaled=False, steps=3):
    model = net()
    data = loader()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2) if scaled else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lm.LaminaWarning)
        optimizer = BUILDERS[kind](model)
        train(model, optimizer, data, scaler, steps)
    return model, optimizer, data, scaler


# ------------------------------------------------------------------------------ nothing is changed


#: the others are tried by `make soak`
QUICK = ("plan, SGD", "torch AdamW")


def kinds(names):
    return [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("kind", kinds(BUILDERS))
def test_everything_is_as_it_was_and_goes_on_alike(kind):
    seen, twin = situation(kind), situation(kind)
    assert_equal(everything(*seen), everything(*twin))
    before = everything(*seen)
    found = lm.find_lr(seen[0], seen[1], loss, seen[2], **SHORT)
    assert all(len(curve.loss) > 5 for curve in found.curves)
    assert_equal(before, everything(*seen))
    for each in (seen, twin):
        torch.manual_seed(7)
        train(*each, steps=4)
    assert_equal(everything(*seen), everything(*twin))


@pytest.mark.parametrize("kind", kinds(["plan, SGD", "plan, AdamW", "torch AdamW", "lamina AdamW"]))
def test_a_gradient_scaler_is_as_it_was(kind):
    seen, twin = situation(kind, scaled=True), situation(kind, scaled=True)
    before = everything(*seen)
    lm.find_lr(*seen[:2], loss, seen[2], scaler=seen[3], **SHORT)
    assert_equal(before, everything(*seen))
    for each in (seen, twin):
        torch.manual_seed(7)
        train(*each, steps=4)
    assert_equal(everything(*seen), everything(*twin))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError("of the user")])
@pytest.mark.parametrize("kind", ["plan, SGD", "torch SGD"])
def test_a_test_that_ends_in_the_middle_leaves_everything(kind, error):
    seen = situation(kind)
    before = everything(*seen)
    calls = []

    def failing(model, batch):
        calls.append(1)
        random.random()
        if len(calls) == 26:
            raise error
        return loss(model, batch)

    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        lm.find_lr(*seen[:2], failing, seen[2], **SHORT)
    assert len(calls) == 26
    assert_equal(before, everything(*seen))
    seen[0](torch.randn(4, 4))  # nothing refuses the original any more


def test_a_torch_built_for_cuda_is_used_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with random_sources_kept([]):
        torch.rand(7)
    assert torch.equal(torch.rand(4), expected)


def test_hooks_and_schedulers_of_the_original_are_not_called():
    model, data, calls = net(), loader(), []
    optimizer = BUILDERS["torch SGD"](model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    assert optimizer.param_groups[0]["lr"] == 0.0  # the first of a warmup
    found = lm.find_lr(model, optimizer, loss, data, **SHORT)
    assert found.now == {"group 0": 0.001, "group 1": 0.05}
    assert calls == []
    assert not getattr(optimizer, "_opt_called", False)
    assert (scheduler.last_epoch, optimizer.param_groups[0]["lr"]) == (0, 0.0)


def test_the_original_in_the_loss_is_refused_before_it_moves():
    model, data = net(), loader()
    optimizer = BUILDERS["torch SGD"](model)
    before = everything(model, optimizer, data, None)
    with pytest.raises(lm.PlanError, match="called the original model"):
        lm.find_lr(model, optimizer, lambda _, batch: loss(model, batch), data)
    with pytest.raises(lm.PlanError, match="called the original model"):
        lm.find_lr(model, optimizer, lambda _, batch: model[0](batch[0]).mean(), data)
    assert_equal(before, everything(model, optimizer, data, None))


# -------------------------------------------------------------------------------- what is swept


class Recording(torch.optim.SGD):
    """Notes the lr of all its groups in each step."""

    seen: list = []  # noqa: RUF012

    def step(self, closure=None):
        self.seen.append([float(group["lr"]) for group in self.param_groups])
        return super().step(closure)


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(Recording, "seen", [])
    return Recording.seen


def swept(found):
    return [lr for curve in found.curves for lr in curve.lr]


def test_ratios_are_kept_in_groups(recorded):
    model = net()
    optimizer = BUILDERS["torch SGD"](model)
    twin = Recording(optimizer.param_groups, lr=0.1)
    found = lm.find_lr(model, twin, loss, loader(), high=0.1, **SHORT)
    assert found.reference == "group 1"
    rows = np.array(recorded)
    assert rows[:, 1] == pytest.approx(np.array(swept(found)), rel=1e-9)
    assert rows[:, 0] / rows[:, 1] == pytest.approx(0.02, rel=1e-9)


def test_one_group_alone(recorded):
    model = net()
    twin = Recording(BUILDERS["torch SGD"](model).param_groups, lr=0.1)
    found = lm.find_lr(model, twin, loss, loader(), rule=0, high=0.1, **SHORT)
    assert np.array(recorded)[:, 0] == pytest.approx(np.array(swept(found)), rel=1e-9)
    assert {row[1] for row in recorded} == {0.05}


def test_an_lr_that_is_a_tensor():
    model = net()
    lr = torch.tensor(0.01)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    found = lm.find_lr(model, optimizer, loss, loader(), **SHORT)
    assert found.now == {"group 0": pytest.approx(0.01)}
    assert float(lr) == pytest.approx(0.01)
    assert optimizer.param_groups[0]["lr"] is lr


def plan_of_parts(**settings):
    rules = [lm.Rule("0.*", lr=lm.times(0.1), thaw=6), lm.Rule("2.*", lr=0.4)]
    plan = lm.Plan(Recording, lr=0.1, rules=rules, **settings)
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lm.LaminaWarning)
        return model, plan.build(model, steps=20)


def test_a_plan_is_held_at_a_step_and_its_ratios_kept(recorded):
    model, optimizer = plan_of_parts(schedule="warmup(5) >> cosine()")
    names = [group["name"] for group in optimizer.param_groups]
    for at, expected in ((10, {"0.*", "2.*", "default"}), (4, {"2.*", "default"})):
        recorded.clear()
        found = lm.find_lr(model, optimizer, loss, loader(), at=at, high=0.1, **SHORT)
        given = dict(zip(names, (v["lr"] for v in values(optimizer, at)), strict=True))
        assert found.held == at
        assert set(found.now) == expected
        assert found.now == {name: pytest.approx(given[name]) for name in expected}
        assert found.reference == "2.*"
        ratios = [given[name] / given["2.*"] for name in expected]
        stepped = {round(np.log10(lr), 6) for row in recorded for lr in row if lr}
        # The build tries a guest at the values of the plan, so that there are more.
        assert stepped >= {round(np.log10(lr * r), 6) for lr in swept(found) for r in ratios}
    assert optimizer.clock == 0


def values(optimizer, step):
    found = lm.values_at(optimizer.resolved, step)
    return [found.hyper(index) for index in range(len(optimizer.param_groups))]


def test_the_default_step_is_where_most_is_learnt():
    model, optimizer = plan_of_parts(schedule="warmup(5) >> cosine()")
    held = lm.find_lr(model, optimizer, loss, loader(), **SHORT).held
    total = [
        sum(cell.numel * v["lr"] for cell, v in zip(optimizer.resolved.cells, row, strict=True))
        for row in (values(optimizer, step) for step in range(20))
    ]
    assert held == int(np.argmax(total))
    twin = nn.Linear(4, 1)
    plain = lm.Plan("SGD", lr=0.1, schedule="warmup(5) >> cosine()").build(twin, steps=20)
    assert lm.find_lr(twin, plain, loss, loader(), **SHORT).held == 5


def test_what_rests_at_the_step_does_not_move():
    model, optimizer = plan_of_parts()
    moved = set()

    def watching(twin, batch):
        pairs = zip(twin.named_parameters(), model.parameters(), strict=True)
        moved.update(n[0] for (n, p), original in pairs if not torch.equal(p, original))
        assert twin[0][1].training is (at >= 6)  # the eval lock of what rests
        return loss(twin, batch)

    for at, parts in ((2, {"1", "2"}), (8, {"0", "1", "2"})):
        moved.clear()
        lm.find_lr(model, optimizer, watching, loader(), at=at, high=0.1, **SHORT)
        assert moved == parts


def test_a_rule_alone_is_swept():
    model = net()
    plan = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("2.*", lr=0.4)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lm.LaminaWarning)
        optimizer = plan.build(model, steps=20)
    found = lm.find_lr(model, optimizer, loss, loader(), rule="2.*", **SHORT)
    assert found.now == {"2.*": 0.4}
    with pytest.raises(lm.PatternError, match=r"find_lr, rule: '3\.\*' is neither"):
        lm.find_lr(model, optimizer, loss, loader(), rule="3.*")


def test_a_run_that_has_begun_is_tested_from_where_it_is():
    model, optimizer, data, _ = situation("plan, SGD", steps=5)
    found = lm.find_lr(model, optimizer, loss, data, **SHORT)
    assert optimizer.clock == 5
    assert found.held >= 5
    starts = []

    def watching(twin, batch):
        starts.append(twin[2].weight.detach().clone())
        return loss(twin, batch)

    lm.find_lr(model, optimizer, watching, data, **SHORT)
    assert torch.equal(starts[0], model[2].weight)


def test_accumulated_batches_are_a_mean():
    model, sizes = nn.Linear(4, 1), []

    def counting(twin, batch):
        sizes.append(1)
        return loss(twin, batch)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    one = lm.find_lr(model, optimizer, counting, loader(), high=1e-3, **SHORT)
    count = len(sizes)
    four = lm.find_lr(model, optimizer, counting, loader(), high=1e-3, accumulate=4, **SHORT)
    assert (count, len(sizes) - count) == (60, 240)
    mean = [np.mean(each.curves[0].loss) for each in (one, four)]
    assert mean[0] == pytest.approx(mean[1], rel=0.3)


def test_repeats_see_other_batches():
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batches in (loader(), loader(shuffle=False), list(loader())):
        found = lm.find_lr(model, optimizer, loss, batches, high=1e-3, **SHORT)
        assert len({curve.loss[0] for curve in found.curves}) == 3
        again = lm.find_lr(model, optimizer, loss, batches, high=1e-3, **SHORT)
        assert found == again
    alone = [next(iter(loader()))]
    found = lm.find_lr(model, optimizer, loss, alone, steps=60)
    assert "the interval says nothing" in str(found)


def test_an_unshuffled_loader_begins_elsewhere():
    data = loader(shuffle=False)
    firsts = [next(endless(data, repeat, 3))[0] for repeat in range(3)]
    in_order = [batch[0] for batch in data]
    assert all(torch.equal(first, in_order[4 * i]) for i, first in enumerate(firsts))


def test_schedule_free_is_put_into_training_mode():
    schedulefree = pytest.importorskip("schedulefree")
    model = nn.Linear(4, 1)
    optimizer = schedulefree.SGDScheduleFree(model.parameters(), lr=0.1)
    optimizer.eval()
    found = lm.find_lr(model, optimizer, loss, loader(), **SHORT)
    assert len(found.curves[0].loss) > 10
    assert optimizer.param_groups[0]["train_mode"] is False


def test_a_model_in_eval_mode_is_tested_in_training_mode():
    model = nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.5)).eval()
    modes = []

    def watching(twin, batch):
        modes.append(twin.training)
        return loss(twin, batch)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lm.find_lr(model, optimizer, watching, loader(), **SHORT)
    assert set(modes) == {True}
    assert not model.training


def test_half_precision_weights():
    model = nn.Linear(4, 1).to(torch.bfloat16)
    optimizer = lm.Plan("SGD", lr=0.01).build(model)

    def in_bf16(twin, batch):
        return loss(twin, [part.to(torch.bfloat16) for part in batch]).float()

    found = lm.find_lr(model, optimizer, in_bf16, loader(size=64), steps=60)
    assert 0.005 < found.suggestion < 0.5
    assert model.weight.dtype == torch.bfloat16


# --------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"low": 0.0}, r"low=0\.0, high=10\.0: expected learning rates above 0"),
        ({"low": 1.0, "high": 0.1}, "low below high"),
        ({"high": float("nan")}, "high=nan"),
        ({"steps": 5}, "steps=5: expected a whole number of at least 20"),
        ({"repeats": 2}, "repeats=2: expected a whole number of at least 3"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"seed": True}, "seed=True"),
        ({"loss": None}, "loss=None: expected a function"),
        ({"batches": iter([1])}, "can be iterated only once"),
        ({"batches": 3}, "batches=3"),
        ({"batches": []}, "batches has none"),
        ({"model": 3}, "model of type int"),
        ({"optimizer": 3}, "optimizer of type int"),
        ({"at": 3}, "at=3 is a step of a plan"),
        ({"rule": "head"}, "rule='head': expected the number or the name"),
        ({"rule": 7}, "rule=7"),
        ({"model": nn.Linear(4, 1)}, "2 tensor.* no parameters of this model"),
        ({"loss": lambda model, batch: model(batch[0])}, r"shape \(8, 1\)"),
        ({"loss": lambda model, batch: 3.0}, "a float; expected a tensor"),
        ({"loss": lambda model, batch: batch[0].mean()}, "without a gradient"),
    ],
)
def test_what_cannot_be_tested_is_told(changed, message):
    model = nn.Linear(4, 1)
    given = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss": loss,
        "batches": loader(),
    }
    with pytest.raises(lm.LaminaError, match=message):
        lm.find_lr(**{**given, **changed})


def test_what_a_plan_cannot_hold_is_told():
    model = nn.Linear(4, 1)
    optimizer = lm.Plan("SGD", lr=0.1).build(model, steps=10)
    for at in (10, -1, 2.5):
        with pytest.raises(lm.PlanError, match=f"at={at}: expected a step of the run"):
            lm.find_lr(model, optimizer, loss, loader(), at=at)
    model = nn.Linear(4, 1)
    with pytest.warns(lm.LaminaWarning, match="nothing-trains"):
        frozen = lm.Plan("SGD", lr=0.1, thaw=5).build(model, steps=10)
    with pytest.raises(lm.PlanError, match="at step 2 nothing of 'the model' trains"):
        lm.find_lr(model, frozen, loss, loader(), at=2)


def test_a_model_that_cannot_be_copied_or_has_no_values():
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.kept = model.weight * 2  # computed, so that deepcopy refuses it
    with pytest.raises(lm.PlanError, match="this one cannot be copied"):
        lm.find_lr(model, optimizer, loss, loader())
    empty = nn.Linear(4, 1, device="meta")
    with pytest.raises(lm.PlanError, match="meta device"):
        lm.find_lr(empty, torch.optim.SGD(empty.parameters(), lr=0.1), loss, loader())
