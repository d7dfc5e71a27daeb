"""Two processes (gloo): they decide alike, and freezing respects what DDP fixed at wrapping."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import lamina as lm
from processes import join_group, leave_group, run_processes


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))


def work(rank: int, folder: str) -> None:
    """One process: what it saw goes to a file."""
    join_group(rank, folder)
    model = small()
    wrap_first = folder.endswith("wrapped_first")
    if wrap_first:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = lm.Plan(
        lm.SGD,
        lr=0.1,
        feedback=lm.plateau("loss", factor=0.5, patience=0),
        rules=[
            lm.Rule("0.weight", thaw=3),
            lm.Rule("0.bias", frozen=True),
            lm.Rule("1.bias", thaw=[1, 4], freeze=[2], frozen_state="drop"),
        ],
    ).build(model, steps=6)
    if not wrap_first:
        model = nn.parallel.DistributedDataParallel(model)
    first = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    seen = []
    for step in range(6):
        model(torch.full((2, 3), float(rank + 1))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        # Rank 1 measures something else; the number of rank 0 counts.
        optimizer.report(loss=1.0 if rank == 0 else 1.0 / (step + 1))
        moved = [n for n, p in model.module.named_parameters() if not torch.equal(p, first[n])]
        lrs = {group["name"]: group["lr"] for group in optimizer.param_groups}
        seen.append({"lr": lrs, "moved": moved, "bias": model.module[1].bias.item()})
    flags = {name: p.requires_grad for name, p in model.module.named_parameters()}
    weights = {name: p.tolist() for name, p in model.module.named_parameters()}
    record = {"seen": seen, "flags": flags, "weights": weights}
    Path(folder, f"{rank}.json").write_text(json.dumps(record))
    leave_group()


@pytest.mark.parametrize("order", ["wrapped_first", "built_first"])
def test_two_processes_under_ddp(tmp_path, order):
    tmp_path = tmp_path / order
    tmp_path.mkdir()
    run_processes(work, tmp_path)
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == other
    assert one["seen"][1]["lr"]["default"] == 0.05  # rank 0 stalled; rank 1 alone would not have
    assert "0.weight" not in one["seen"][2]["moved"]
    assert "0.weight" in one["seen"][3]["moved"]
    assert all("0.bias" not in each["moved"] for each in one["seen"])
    biases = [0.0, *(each["bias"] for each in one["seen"])]
    moves = [step for step in range(1, 6) if biases[step + 1] != biases[step]]
    assert moves == [1, 4, 5]
    # The reducer is fixed at wrapping: what thaws keeps its flag, what never trains loses it.
    assert one["flags"]["0.weight"]
    assert one["flags"]["0.bias"] == (order == "wrapped_first")
