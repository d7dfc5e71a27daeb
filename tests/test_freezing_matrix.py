"""What is frozen does not move by one bit, whatever optimizer, stale gradient, loop or module.

Each cell compares with the same model under `requires_grad=False` and torch's optimizer over the
rest; the frozen tensors must be bit-identical, the others equal within 1e-6 (relative, float32).
"""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lamina as lm
from models import equal

STEPS = 6
ALGORITHMS = {
    "SGD": (lm.SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    "AdamW": (lm.AdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "RMSprop": (lm.RMSprop, torch.optim.RMSprop, {"lr": 0.01, "weight_decay": 0.1}),
    "guest": (torch.optim.NAdam, torch.optim.NAdam, {"lr": 0.01, "weight_decay": 0.1}),
    "LBFGS": (lm.optim.LBFGS, torch.optim.LBFGS, {"lr": 0.1, "max_iter": 4}),
}
if hasattr(torch.optim, "Muon"):  # since 2.9
    muon = {"lr": 0.01, "weight_decay": 0.1}
    ALGORITHMS["Muon"] = (lm.optim.Muon, torch.optim.Muon, muon)
LEFT_OVER = ["left over", "zeroed", "none"]
LOOPS = ["plain", "AMP", "accumulation", "closure"]
KINDS = ["BatchNorm", "dropout", "tied"]


class Net(nn.Module):
    """A frozen body under a head that trains."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        extra: nn.Module = {"BatchNorm": nn.BatchNorm1d(6), "dropout": nn.Dropout(0.5)}.get(
            kind, nn.Identity()
        )
        self.body = nn.Sequential(nn.Linear(4, 6), extra, nn.Tanh())
        self.head = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
        if kind == "tied":
            self.decoder = nn.Linear(4, 6, bias=False)
            self.decoder.weight = self.body[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.head(self.body(x))
        return self.decoder(x) if hasattr(self, "decoder") else x


def make(kind: str, name: str = "") -> Net:
    torch.manual_seed(3)
    # L-BFGS divides by differences of gradients, which magnifies what float32 rounds.
    return Net(kind).train().to(torch.float64 if name == "LBFGS" else torch.float32)


def planned(name: str, model: nn.Module) -> torch.optim.Optimizer:
    optimizer, _, hyper = ALGORITHMS[name]
    rules = [lm.Rule("body.*", frozen=True)]
    if name == "Muon":
        rules.insert(0, lm.Rule("ndim<2", optimizer=lm.SGD, lr=0.05))
    return lm.Plan(optimizer, rules=rules, **hyper).build(model)


def by_hand(name: str, model: Net) -> list[torch.optim.Optimizer]:
    _, optimizer, hyper = ALGORITHMS[name]
    model.body.requires_grad_(False)
    model.body.eval()
    rest = [param for param in model.parameters() if param.requires_grad]
    if name != "Muon":
        return [optimizer(rest, **hyper)]
    matrices = [param for param in rest if param.ndim == 2]
    vectors = [param for param in rest if param.ndim < 2]
    return [optimizer(matrices, **hyper), torch.optim.SGD(vectors, lr=0.05)]


def loss_of(model: nn.Module, step: int, part: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + part)
    x = torch.randn(8, 4, generator=generator).to(next(model.parameters()).dtype)
    out = model(x)
    return F.mse_loss(out, x.sum(1, keepdim=True).expand_as(out))


def leave_gradients(model: Net, left_over: str) -> None:
    for param in model.body.parameters():
        if left_over != "none":
            size = 100.0 if left_over == "left over" else 0.0
            param.grad = torch.full_like(param, size)


def train(model: Net, optimizers: list[torch.optim.Optimizer], loop: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(STEPS):
        if loop == "closure":
            (optimizer,) = optimizers

            def closure(step: int = step, optimizer: torch.optim.Optimizer = optimizer):
                for param in model.head.parameters():
                    param.grad = None
                loss = loss_of(model, step)
                loss.backward()
                return loss

            optimizer.step(closure)
            continue
        if loop == "accumulation":
            for part in range(2):
                (loss_of(model, step, part) / 2).backward()
        elif loop == "AMP":
            scaler.scale(loss_of(model, step)).backward()
        else:
            loss_of(model, step).backward()
        for optimizer in optimizers:
            scaler.step(optimizer) if loop == "AMP" else optimizer.step()
        if loop == "AMP":
            scaler.update()
        for param in model.head.parameters():
            param.grad = None


CELLS = list(itertools.product(ALGORITHMS, LEFT_OVER, LOOPS, KINDS))


def refusal(name: str, loop: str) -> str | None:
    """Why a cell cannot be: LBFGS evaluates the loss itself."""
    if name == "LBFGS" and loop != "closure":
        return "closure"
    return None


@pytest.mark.parametrize(("name", "left_over", "loop", "kind"), CELLS)
def test_frozen_is_frozen_and_the_rest_trains_as_if_it_were_alone(name, left_over, loop, kind):
    model, reference = make(kind, name), make(kind, name)
    optimizer = planned(name, model)
    leave_gradients(model, left_over)
    frozen = {key: value.clone() for key, value in model.body.state_dict().items()}
    if refusal(name, loop):
        with pytest.raises((lm.LaminaError, TypeError), match="closure"):
            train(model, [optimizer], loop)
    else:
        if name == "Muon" and loop == "closure":
            loop = "plain"  # two optimizers by hand cannot share one closure
        train(model, [optimizer], loop)
        train(reference, by_hand(name, reference), loop)
        for (key, mine), theirs in zip(
            model.head.state_dict().items(), reference.head.state_dict().values(), strict=True
        ):
            assert float((mine - theirs).norm()) <= 1e-6 * float(theirs.norm()) + 1e-8, key
    for key, value in model.body.state_dict().items():
        assert torch.equal(value, frozen[key]), key
    assert all(param.grad is None for param in model.body.parameters())


def test_canary_what_torch_does_with_a_stale_gradient_is_seen():
    model = make("BatchNorm")
    model.body.requires_grad_(False)
    before = {key: value.clone() for key, value in model.body.state_dict().items()}
    leave_gradients(model, "left over")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    train(model, [optimizer], "plain")
    moved = [k for k, v in model.body.state_dict().items() if not torch.equal(v, before[k])]
    assert {"0.weight", "0.bias", "1.running_mean"} <= set(moved)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
def test_a_thaw_in_the_middle_equals_an_optimizer_built_then(name):
    optimizer_class, _, hyper = ALGORITHMS[name]
    model, reference = make("dropout"), make("dropout")
    plan = lm.Plan(
        optimizer_class,
        schedule=lm.linear(to=0.1),
        rules=[lm.Rule("body.*", thaw=3, rewarm=lm.warmup(2, start=0.5))],
        **hyper,
    )
    optimizer = plan.build(model, steps=STEPS)
    head = getattr(lm, name)(reference.head.parameters(), **hyper)
    body = None
    reference.body.requires_grad_(False)
    reference.body.eval()
    for step in range(STEPS):
        factor = 1 - 0.9 * step / STEPS
        head.param_groups[0]["lr"] = hyper["lr"] * factor
        if step == 3:
            reference.body.requires_grad_(True)
            reference.body.train()
            body = getattr(lm, name)(reference.body.parameters(), **hyper)
        if body is not None:
            body.param_groups[0]["lr"] = hyper["lr"] * factor * min(0.5 + 0.25 * (step - 3), 1.0)
        for net, optimizers in ((model, [optimizer]), (reference, [head, body])):
            torch.manual_seed(step)  # the same dropout
            loss_of(net, step).backward()
            for each in optimizers:
                if each is not None:
                    each.step()
            net.zero_grad()
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_stale_gradients_do_not_move_what_freezes_later():
    model = make("BatchNorm")
    optimizer = lm.Plan(
        lm.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, rules=[lm.Rule("body.*", freeze=2)]
    ).build(model, steps=6)
    for step in range(6):
        if step == 2:
            at_freeze = {key: value.clone() for key, value in model.body.state_dict().items()}
        loss_of(model, step).backward()
        optimizer.step()  # no zero_grad: gradients are left over on purpose
    for key, value in model.body.state_dict().items():
        assert torch.equal(value, at_freeze[key]), key


def test_state_is_allocated_at_the_thaw():
    model = make("dropout")
    optimizer = lm.Plan(lm.AdamW, lr=0.1, rules=[lm.Rule("body.*", thaw=2)]).build(model, steps=4)
    weight = model.body[0].weight
    for step in range(4):
        assert ("exp_avg" in optimizer.state[weight]) == (step > 2)
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def off_by_hand(model: Net) -> None:
    for param in model.body.parameters():
        param.requires_grad_(False)


def off_by_lamina(model: Net) -> None:
    lm.freeze(model, "body")


@pytest.mark.parametrize("freeze", [off_by_hand, off_by_lamina])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_is_frozen_by_hand_after_the_build_does_not_move(name, freeze):
    """Against the same run without those gradients: they count in no norm, and in no state."""
    models = [make("plain", name) for _ in range(2)]
    runs = []
    optimizer, _, hyper = ALGORITHMS[name]
    for model in models:
        rules = [lm.Rule("ndim<2", optimizer=lm.SGD, lr=0.05)] if name == "Muon" else []
        clip = {} if name == "LBFGS" else {"clip_norm": 0.1}
        runs.append(lm.Plan(optimizer, rules=rules, **hyper, **clip).build(model))
    for step in range(5):
        if step == 2:
            off_by_lamina(models[0])
            freeze(models[1])
            at_freeze = copy.deepcopy(models[1].body.state_dict())
            at = [copy.deepcopy(runs[1].state[param]) for param in models[1].body.parameters()]
        for left_over, (model, run) in enumerate(zip(models, runs, strict=True)):

            def closure(model=model, step=step, give=left_over and step >= 2):
                for param in model.parameters():
                    param.grad = None
                loss = loss_of(model, step)
                loss.backward()
                if give:
                    leave_gradients(model, "left over")
                return loss

            # Who calls lamina.freeze knows of it.
            silent = freeze is off_by_lamina or not left_over or step != 2
            with (
                nullcontext()
                if silent
                else pytest.warns(lm.LaminaWarning, match="requires-grad-off")
            ):
                run.step(closure)
    assert all(torch.equal(value, at_freeze[k]) for k, value in models[1].body.state_dict().items())
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert runs[0].norms == runs[1].norms
    if name == "LBFGS":
        return  # one state for all
    for param, before in zip(models[1].body.parameters(), at, strict=True):
        assert equal(runs[1].state[param], before)
        assert param.grad is not None  # it may be another optimizer's, and is left alone


def test_what_is_frozen_by_hand_trains_again_once_it_is_thawed_by_hand():
    model = make("plain")
    optimizer = lm.Plan(lm.SGD, lr=0.1).build(model)
    for step, moves in enumerate([True, False, True]):
        {1: lm.freeze, 2: lm.thaw}.get(step, lambda *_: None)(model, "body")
        before = model.body[0].weight.detach().clone()
        loss_of(model, step).backward()
        leave_gradients(model, "left over")
        optimizer.step()
        assert torch.equal(before, model.body[0].weight) is not moves


@pytest.mark.usefixtures("without_numba")
def test_the_drop_in_tier_does_as_torch_with_a_left_over_gradient():
    models = [make("plain") for _ in range(2)]
    for model, kind in zip(models, (lm.SGD, torch.optim.SGD), strict=True):
        optimizer = kind(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        off_by_hand(model)
        leave_gradients(model, "left over")
        optimizer.step()
    before = make("plain").body[0].weight
    assert not torch.equal(models[0].body[0].weight, before)
    assert torch.equal(models[0].body[0].weight, models[1].body[0].weight)
