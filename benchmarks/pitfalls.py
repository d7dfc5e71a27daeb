"""The figures of `docs/explanation/pitfalls.md`: `python -m benchmarks.pitfalls`.

They are measured with torch alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import SGD, AdamW, lr_scheduler

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 6]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 8),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 20),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 20),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 20),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o),
}


def parameter(value: float = 1.0, size: int = 1) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full((size,), value))


def late_groups() -> None:
    """Add a group after the scheduler was made, and go on."""
    crashed, ratios = [], {}
    for name, make in SCHEDULERS.items():
        optimizer = SGD([parameter()], lr=0.1, momentum=0.9)
        scheduler = make(optimizer)
        step(optimizer, scheduler)
        try:
            optimizer.add_param_group({"params": [parameter()], "lr": 0.01})
            highest = 0.0
            for _ in range(7):
                step(optimizer, scheduler)
                highest = max(highest, optimizer.param_groups[1]["lr"])
            ratios[name] = highest / 0.01
        except Exception as error:
            crashed.append(f"{name} ({type(error).__name__})")
    print(f"a late group: {len(crashed)} of {len(SCHEDULERS)} crash: {', '.join(crashed)}")
    print(f"a late group under LinearLR: up to {ratios['LinearLR']:.1f} times the lr it asked for")


def step(optimizer: Any, scheduler: Any) -> None:
    optimizer.step()
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def floors() -> None:
    groups = [{"params": [parameter()], "lr": lr} for lr in (1e-3, 1e-6)]
    optimizer = SGD(groups)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=1e-5)
    for _ in range(10):
        step(optimizer, scheduler)
    ends = [group["lr"] for group in optimizer.param_groups]
    print(f"an absolute floor of 1e-5 for 1e-3 and 1e-6: both end at {ends[0]:g} and {ends[1]:g}")


def left_over_gradients() -> None:
    for name, make in (
        ("SGD", lambda p: SGD([p], lr=0.1, momentum=0.9, weight_decay=0.1)),
        ("AdamW", lambda p: AdamW([p], lr=0.1)),
    ):
        param = parameter()
        optimizer = make(param)
        param.grad = torch.ones(1)
        optimizer.step()
        param.requires_grad_(False)
        before = param.item()
        optimizer.step()
        print(
            f"frozen by requires_grad alone, {name} moves 1.0 by {before - param.item():.2g} a step"
        )


def norms() -> None:
    frozen, live = parameter(size=100), parameter(size=2)
    frozen.grad, live.grad = torch.full((100,), 14.1), torch.ones(2)
    frozen.requires_grad_(False)
    before = live.grad.norm().item()
    total = torch.nn.utils.clip_grad_norm_([frozen, live], before).item()
    print(
        f"a clip norm with a left-over gradient is {total:.0f} where the live one is {before:.1f}: "
        f"it shrinks {before / live.grad.norm().item():.0f} times"
    )
    one, other = parameter(), parameter()
    one.grad, other.grad = torch.tensor([float("inf")]), torch.ones(1)
    torch.nn.utils.clip_grad_norm_([one, other], 1.0)
    print(f"one infinite gradient, clipped: {one.grad.item()} and {other.grad.item()}")


def restarts() -> None:
    optimizer = SGD([parameter()], lr=0.1)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(20):
        step(optimizer, scheduler)
    print(f"a cosine of 10 steps from 0.1, at step 20: {optimizer.param_groups[0]['lr']:.2g}")
    optimizer = SGD([parameter()], lr=1e-8)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(5):
        plateau.step(1.0)
    print(f"ReduceLROnPlateau from 1e-8, five bad epochs: {optimizer.param_groups[0]['lr']:g}")


def rebuilt() -> None:
    """Rebuild a sequence of schedulers at an epoch, beside one that was stepped to it."""

    def sequence(optimizer: Any, last: int) -> Any:
        parts = [
            lr_scheduler.ConstantLR(optimizer, 1.0, 3),
            lr_scheduler.ExponentialLR(optimizer, 0.9487),
        ]
        return lr_scheduler.SequentialLR(optimizer, parts, [3], last_epoch=last)

    stepped = SGD([parameter()], lr=0.1)
    scheduler = sequence(stepped, -1)
    for _ in range(5):
        step(stepped, scheduler)
    again = SGD([{"params": [parameter()], "lr": 0.1, "initial_lr": 0.1}])
    sequence(again, 5)
    print(
        f"a sequence rebuilt with last_epoch=5: {again.param_groups[0]['lr']:.3f} instead of "
        f"{stepped.param_groups[0]['lr']:.3f}"
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}")
    for measure in (late_groups, floors, left_over_gradients, norms, restarts, rebuilt):
        measure()
