"""What goes wrong over many steps of a run is told once, with its fix."""

from __future__ import annotations

import copy
import io
import re
import sys
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lamina as lm
from lamina.runtime.monitor import ClippedElsewhere


def net(dtype=torch.float32, width=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 1)).to(dtype)


def take(model, optimizer, steps, between=lambda: None, scale=1.0):
    """Train for some steps; `between` is done between backward and step."""
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(16, 8).to(dtype)
        (scale * model(x).square().mean()).backward()
        between()
        optimizer.step()
        optimizer.zero_grad()


def codes(action):
    """The codes of the findings that an action warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    assert {each.category for each in caught} <= {lm.LaminaWarning}
    assert {each.filename for each in caught} <= {__file__}  # they point at the user's line
    return [str(each.message).partition(":")[0] for each in caught]


def built(length=None, model=None, optimizer="SGD", lr=0.01, **settings):
    model = model or net()
    plan = lm.Plan(optimizer, lr=lr, **settings)
    return model, plan.build(model, **({"steps": 200} if length is None else length))


# ------------------------------------------------------------------------- findings of the plan


def test_a_finding_is_told_at_build_once_and_not_by_a_preview():
    plan = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("0.*", lr=0.0)])
    assert codes(lambda: plan.preview(net(), steps=5)) == []
    model = net()
    assert codes(lambda: plan.build(model, steps=5)) == ["lr-zero"]
    optimizer = built()[1]
    assert codes(optimizer.announce) == []
    with pytest.warns(lm.LaminaWarning):
        optimizer = plan.build(model, steps=5)
    assert codes(optimizer.announce) == []
    assert codes(lambda: copy.deepcopy(optimizer).announce()) == []


def test_a_resumed_build_tells_again():
    plan = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("0.*", lr=0.0)])
    with pytest.warns(lm.LaminaWarning):
        state = plan.build(net(), steps=5).state_dict()
    assert codes(lambda: plan.build(net(), steps=5, resume=state)) == ["lr-zero"]


def test_with_several_processes_the_first_one_speaks(monkeypatch):
    monkeypatch.setattr("lamina.runtime.monitor.is_first_process", lambda: False)
    model, optimizer = built({"steps": 2}, rules=[lm.Rule("0.*", lr=0.0)])
    assert codes(lambda: take(model, optimizer, 3)) == []
    assert [finding.code for finding in optimizer.findings] == ["lr-zero"]
    assert "beyond-the-end" in [finding.code for finding in optimizer.check(model)]


# ------------------------------------------------------------------------------ the length of a run


def test_a_run_that_passes_its_end_is_told_at_the_first_step_beyond():
    model, optimizer = built({"steps": 4}, schedule=lm.linear(to=0.5))
    take(model, optimizer, 4)
    assert codes(lambda: take(model, optimizer, 1)) == ["beyond-the-end"]
    assert codes(lambda: take(model, optimizer, 5)) == []
    assert "beyond-the-end" in [finding.code for finding in optimizer.check(model)]


def test_a_run_that_was_made_longer_as_proposed_passes_no_end():
    model, optimizer = built({"steps": 4}, schedule=lm.linear(to=0.5))
    take(model, optimizer, 4)
    longer = optimizer.plan.build(model, steps=8, resume=optimizer.state_dict(), extend="hold")
    take(model, longer, 4)
    assert codes(lambda: take(model, longer, 1)) == ["beyond-the-end"]


@pytest.mark.parametrize("kind", ["LBFGS", torch.optim.NAdam])
def test_the_end_is_told_of_every_kind_of_optimizer(kind):
    model, optimizer = built({"steps": 1}, optimizer=kind)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 8)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert codes(lambda: optimizer.step(closure)) == ["beyond-the-end"]


class Accelerate:
    """Stands for `accelerate.state.GradientState`, which knows the end of the prepared loader."""

    _shared_state: dict[str, object] = {"initialized": True}  # noqa: RUF012
    end_of_dataloader = False
    active_dataloader: object = None
    num_steps = 1


@pytest.mark.parametrize(
    ("taken", "told"), [(10, ["another-length"]), (19, []), (40, ["another-length"])]
)
def test_a_loader_of_another_length_is_told_at_the_end_of_the_first_epoch(monkeypatch, taken, told):
    stands_in = types.SimpleNamespace(GradientState=Accelerate)
    monkeypatch.setitem(sys.modules, "accelerate.state", stands_in)
    model, optimizer = built({"epochs": 4, "steps_per_epoch": 20})
    take(model, optimizer, taken - 1)
    monkeypatch.setattr(Accelerate, "end_of_dataloader", True)
    assert codes(lambda: take(model, optimizer, 1)) == told
    assert codes(lambda: take(model, optimizer, 1)) == []
    found = [finding for finding in optimizer.check(model) if finding.code == "another-length"]
    assert len(found) == len(told)
    assert not found or f"steps_per_epoch={taken}" in found[0].fix


class Module(nn.Sequential):
    """Stands for a LightningModule: it knows its trainer, which knows its length."""

    def __init__(self, steps):
        super().__init__(nn.Linear(8, 1))
        self._trainer = types.SimpleNamespace(estimated_stepping_batches=steps)


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        (20, ["another-length"]),
        (80, ["another-length"]),
        (40, []),
        (39, []),
        (float("inf"), []),
        (-1, []),
        (None, []),
    ],
)
def test_a_trainer_of_another_length_is_told_in_the_first_step(steps, told):
    model, optimizer = built({"epochs": 2, "steps_per_epoch": 20}, Module(steps))
    assert codes(lambda: take(model, optimizer, 1)) == told
    assert codes(lambda: take(model, optimizer, 3)) == []
    if told:  # as proposed
        steps = model._trainer.estimated_stepping_batches
        model, optimizer = built({"steps": steps}, Module(steps))
        assert codes(lambda: take(model, optimizer, 1)) == []
    copy.deepcopy(optimizer)


@pytest.mark.parametrize(
    ("batches", "accumulated", "told"),
    [
        (20, 1, []),
        (80, 4, []),
        (80, 1, []),
        (10, 1, ["another-length"]),
        (40, 4, ["another-length"]),
    ],
)
def test_steps_that_a_scaler_left_out_are_no_other_length(monkeypatch, batches, accumulated, told):
    stands_in = types.SimpleNamespace(GradientState=Accelerate)
    monkeypatch.setitem(sys.modules, "accelerate.state", stands_in)
    monkeypatch.setattr(Accelerate, "active_dataloader", range(batches))
    monkeypatch.setattr(Accelerate, "num_steps", accumulated)
    model, optimizer = built({"epochs": 4, "steps_per_epoch": 20})
    take(model, optimizer, 5)
    monkeypatch.setattr(Accelerate, "end_of_dataloader", True)
    assert codes(lambda: take(model, optimizer, 1)) == told


def test_an_epoch_that_a_loaded_state_begins_in_the_middle_is_not_judged(monkeypatch):
    stands_in = types.SimpleNamespace(GradientState=Accelerate)
    monkeypatch.setitem(sys.modules, "accelerate.state", stands_in)
    model, optimizer = built({"epochs": 4, "steps_per_epoch": 20})
    take(model, optimizer, 15)
    model, resumed = built({"epochs": 4, "steps_per_epoch": 20})
    resumed.load_state_dict(optimizer.state_dict())
    take(model, resumed, 4)
    monkeypatch.setattr(Accelerate, "end_of_dataloader", True)
    assert codes(lambda: take(model, resumed, 1)) == []


@pytest.mark.parametrize("batches", [7, 20])
def test_a_loader_that_was_left_at_its_end_is_not_that_of_this_loop(monkeypatch, batches):
    stands_in = types.SimpleNamespace(GradientState=Accelerate)
    monkeypatch.setitem(sys.modules, "accelerate.state", stands_in)
    monkeypatch.setattr(Accelerate, "active_dataloader", range(batches))
    monkeypatch.setattr(Accelerate, "end_of_dataloader", True)  # by an earlier loop, for good
    model, optimizer = built({"epochs": 4, "steps_per_epoch": 20})
    assert codes(lambda: take(model, optimizer, 40)) == []


def test_an_epoch_of_one_step_is_told(monkeypatch):
    stands_in = types.SimpleNamespace(GradientState=Accelerate)
    monkeypatch.setitem(sys.modules, "accelerate.state", stands_in)
    monkeypatch.setattr(Accelerate, "active_dataloader", range(4))
    monkeypatch.setattr(Accelerate, "num_steps", 4)
    monkeypatch.setattr(Accelerate, "end_of_dataloader", True)  # every step is the last one
    model, optimizer = built({"epochs": 4, "steps_per_epoch": 20})
    assert codes(lambda: take(model, optimizer, 1)) == ["another-length"]


@pytest.mark.parametrize(("first", "told"), [(10, ["another-length"]), (20, []), (5, [])])
def test_a_first_report_after_the_share_of_a_process_is_told(monkeypatch, first, told):
    monkeypatch.setattr("lamina.runtime.monitor.count_processes", lambda: 2)
    settings = {"feedback": lm.plateau("val_loss")}
    model, optimizer = built({"epochs": 4, "steps_per_epoch": 20}, **settings)
    take(model, optimizer, first)
    assert codes(lambda: optimizer.report(val_loss=1.0)) == told
    take(model, optimizer, first)
    assert codes(lambda: optimizer.report(val_loss=1.0)) == []


# ------------------------------------------------------------------------------------ no gradients


def test_steps_without_any_gradient_are_told_once():
    _, optimizer = built()
    assert codes(optimizer.step) == []  # a trainer may leave out a batch
    assert codes(optimizer.step) == ["step-without-gradient"]
    assert codes(optimizer.step) == []


def test_clearing_gradients_before_the_step_is_told():
    model, optimizer = built(optimizer=lm.AdamW)
    assert codes(lambda: take(model, optimizer, 5, optimizer.zero_grad)) == [
        "step-without-gradient"
    ]


def test_a_loss_of_a_copy_of_the_model_is_told():
    model, optimizer = built(optimizer=torch.optim.NAdam)
    assert codes(lambda: take(copy.deepcopy(model), optimizer, 5)) == ["step-without-gradient"]


@pytest.mark.filterwarnings("ignore:nothing-trains")  # which is meant here
def test_steps_in_which_nothing_should_train_are_not_told_of_gradients():
    with pytest.warns(lm.LaminaWarning, match="nothing-trains"):
        model, optimizer = built({"steps": 9}, thaw=4)
    assert codes(lambda: [optimizer.step() for _ in range(4)]) == []
    take(model, optimizer, 5)


def test_single_batches_that_are_left_out_are_not_told():
    model, optimizer = built()
    for _ in range(4):
        take(model, optimizer, 1)
        assert codes(optimizer.step) == []


# ------------------------------------------------------------------------------------------ metrics

EPOCHS = {"epochs": 10, "steps_per_epoch": 5}
METRICS = [
    ({"feedback": lm.plateau("val_loss", patience=2)}, EPOCHS, 16),
    ({"stop": lm.early_stop("val_loss", patience=3)}, EPOCHS, 21),
    ({"stop": lm.early_stop("val_loss", patience="2 epochs")}, EPOCHS, 16),
    ({"rules": [lm.Rule("0.*", thaw=lm.on_plateau("val_loss", patience=1))]}, EPOCHS, 11),
    ({"feedback": lm.plateau("val_loss", patience=20)}, EPOCHS, 50),
    ({"feedback": lm.plateau("val_loss", patience=5)}, {"steps": 30}, 30),
    ({"feedback": lm.plateau("val_loss", patience="20%")}, {"steps": 30}, 14),
    ({"feedback": lm.plateau("val_loss", patience="5 steps")}, {}, 21),
    ({"feedback": lm.plateau("val_loss", patience=500)}, {"epochs": 1, "steps_per_epoch": 9}, 10),
]


@pytest.mark.parametrize(("settings", "length", "step"), METRICS)
def test_a_metric_that_never_comes_is_told(settings, length, step):
    model, optimizer = built(length, **settings)
    take(model, optimizer, step - 1)
    with pytest.warns(lm.LaminaWarning) as told:
        take(model, optimizer, 1)
    messages = [str(each.message) for each in told if "metric" in str(each.message)]
    assert len(messages) == 1
    assert "optimizer.report(val_loss=...)" in messages[0]
    assert "metric-never-reported" in [finding.code for finding in optimizer.check(model)]
    optimizer.report(val_loss=1.0)  # the proposed line


@pytest.mark.parametrize(("settings", "length", "step"), METRICS[:-1])
def test_a_metric_that_comes_is_not_told(settings, length, step):
    model, optimizer = built(length, **settings)
    take(model, optimizer, 5)
    optimizer.report(val_loss=1.0)
    assert codes(lambda: take(model, optimizer, step - 5)) == []


def test_of_several_metrics_the_missing_one_is_told():
    settings = {
        "feedback": lm.plateau("loss", patience=1),
        "stop": lm.early_stop("acc", mode="max"),
    }
    model, optimizer = built(EPOCHS, **settings)

    def epochs():
        for _ in range(5):
            take(model, optimizer, 5)
            optimizer.report(loss=1.0)

    assert codes(epochs) == ["metric-never-reported"]


def test_a_metric_that_came_before_a_resume_is_not_told():
    settings = {"feedback": lm.plateau("val_loss", patience=2)}
    model, optimizer = built(EPOCHS, **settings)
    take(model, optimizer, 5)
    optimizer.report(val_loss=1.0)
    model, resumed = built(EPOCHS, **settings)
    resumed.load_state_dict(optimizer.state_dict())
    assert codes(lambda: take(model, resumed, 40)) == []


# ---------------------------------------------------------------------------------- clipped before


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", torch.optim.NAdam])
@pytest.mark.parametrize("limit", [1.0, 0.5, 0.25, 5.0])
def test_gradients_that_are_clipped_before_the_plan_are_told(optimizer, limit):
    model, optimizer = built(optimizer=optimizer, lr=1e-4, clip_norm=1.0)
    clip = lambda: nn.utils.clip_grad_norm_(model.parameters(), limit)  # noqa: E731
    assert codes(lambda: take(model, optimizer, 20, clip, scale=1000.0)) == ["clipped-elsewhere"]


def test_one_clip_over_the_scopes_of_several_rules_is_told():
    model, optimizer = built(lr=1e-4, clip_norm=1.0, rules=[lm.Rule("2.*", clip_norm=3.0)])
    clip = lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.5)  # noqa: E731
    assert codes(lambda: take(model, optimizer, 20, clip, scale=1000.0)) == ["clipped-elsewhere"]


def test_only_the_plan_clips():
    model, optimizer = built(lr=1e-4, clip_norm=0.5)
    assert codes(lambda: take(model, optimizer, 200, scale=1000.0)) == []


def test_a_clip_that_never_acts_is_not_told():
    model, optimizer = built(lr=1e-4, clip_norm=0.5)
    clip = lambda: nn.utils.clip_grad_norm_(model.parameters(), 1e6)  # noqa: E731
    assert codes(lambda: take(model, optimizer, 50, clip)) == []


def test_a_constant_gradient_with_a_round_norm_is_not_told():
    model = nn.Linear(4, 1, bias=False)
    optimizer = lm.Plan("SGD", lr=0.01, clip_norm=1.0).build(model, steps=99)

    def constant():
        for _ in range(50):
            optimizer.zero_grad()
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()

    assert codes(constant) == []


def test_norms_around_a_round_number_are_not_told():
    torch.manual_seed(0)
    for spread in (1e-5, 1e-3, 0.1):
        watch = ClippedElsewhere()
        told = []
        while watch.open:
            limit = watch.after_step([1.0 + spread * float(torch.randn(()))])
            told += [] if limit is None else [limit]
        assert told == ([1.0] if spread == 1e-5 else [])


# --------------------------------------------------------------------------------- 16-bit weights


def test_updates_that_round_away_are_told_of_a_model_that_got_16_bits_after_the_build():
    model, optimizer = built(model=net(torch.float32, 256), optimizer="AdamW", lr=1e-6)
    model.bfloat16()
    assert codes(lambda: take(model, optimizer, 12)) == ["updates-round-away"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "RMSprop"])
def test_updates_that_round_away_are_told(dtype, optimizer):
    found = []
    settings = {"model": net(dtype, 256), "optimizer": optimizer, "lr": 1e-6}
    at_build = codes(lambda: found.extend(built(**settings)))
    assert at_build == [] if optimizer == "SGD" else ["steps-round-to-nothing"]
    model, optimizer = found
    before = [param.detach().clone() for param in model.parameters()]
    assert codes(lambda: take(model, optimizer, 12)) == ["updates-round-away"]
    same = sum(int((a == b).sum()) for a, b in zip(before, model.parameters(), strict=True))
    assert same > 0.5 * sum(a.numel() for a in before)  # so it was


def test_in_float32_as_proposed_nothing_rounds_away():
    model, optimizer = built(model=net(torch.bfloat16, 256).float(), optimizer="AdamW", lr=1e-6)
    assert codes(lambda: take(model, optimizer, 12)) == []


@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "master"])
def test_with_another_rounding_nothing_rounds_away(rounding):
    settings = {"optimizer": "AdamW", "lr": 1e-6, "rounding": rounding}
    model, optimizer = built(model=net(torch.bfloat16, 256), **settings)
    assert codes(lambda: take(model, optimizer, 12)) == []


def test_updates_that_reach_the_weights_are_not_told():
    model, optimizer = built(model=net(torch.bfloat16, 256), optimizer="AdamW", lr=1e-2)
    assert codes(lambda: take(model, optimizer, 12)) == []


def test_a_warmup_is_not_judged_by_its_first_steps():
    model = net(torch.bfloat16, 256)
    settings = {"optimizer": "AdamW", "lr": 1e-2, "schedule": lm.warmup(100)}
    model, optimizer = built(model=model, **settings)
    assert codes(lambda: take(model, optimizer, 12)) == []


# ------------------------------------------------------------------------------------------- copies


def test_a_pickled_optimizer_still_tells():
    model, optimizer = built({"steps": 2})
    take(model, optimizer, 2)
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    model, optimizer = torch.load(file, weights_only=False)
    assert codes(lambda: take(model, optimizer, 1)) == ["beyond-the-end"]


# --- parameters that were replaced ----------------------------------------------------------------


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).square().mean().backward()
        optimizer.step()


def assign(model):
    model.load_state_dict(
        {name: value.clone() for name, value in model.state_dict().items()}, assign=True
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.__setitem__(2, nn.Linear(8, 2)), "2.weight, 2.bias was replaced"),
        (lambda m: setattr(m[0], "bias", nn.Parameter(torch.ones(8))), "0.bias was replaced"),
        (lambda m: nn.utils.parametrizations.weight_norm(m[2]), "original0.* came into"),
        (assign, "0.weight, 0.bias, 2.weight and 1 more was replaced"),
    ],
)
@pytest.mark.parametrize("before", [0, 3])
def test_what_was_replaced_in_the_model_is_told_in_a_step(change, named, before):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = lm.Plan(lm.AdamW, lr=1e-2).build(model, steps=40)
    train(model, optimizer, before)
    change(model)
    with pytest.warns(lm.LaminaWarning) as caught:
        train(model, optimizer, 8)
    assert any(re.search(named, str(each.message)) for each in caught)
    assert len({str(each.message) for each in caught}) == len(caught)


def test_parts_without_gradient_that_are_still_there_are_no_news():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 8)
            self.heads = nn.ModuleList(nn.Linear(8, 2) for _ in range(3))

        def forward(self, x, head):
            return self.heads[head](self.body(x))

    model = Heads()
    prune.random_unstructured(model.heads[2], "weight", 0.5)
    optimizer = lm.Plan(lm.AdamW, lr=1e-2, rules=[lm.Rule("body", thaw=5)]).build(model, steps=40)
    for step in range(40):  # warnings are errors
        optimizer.zero_grad()
        model(torch.ones(3, 4), step % 2).square().mean().backward()
        optimizer.step()
    assert optimizer.clock == 40


def test_what_another_plan_trains_is_no_news():
    model = nn.ModuleDict({"a": nn.Linear(4, 2), "unused": nn.Linear(4, 2)})
    optimizer = lm.Plan(lm.AdamW, lr=1e-2).build(model, steps=20)
    model["b"] = nn.Linear(4, 2)
    other = lm.Plan(lm.AdamW, lr=1e-2).build(model["b"], steps=20)
    for part, each in [(model["a"], optimizer), (model["b"], other)] * 8:
        each.zero_grad()
        part(torch.ones(3, 4)).square().mean().backward()
        each.step()
    assert optimizer.clock == other.clock == 8
