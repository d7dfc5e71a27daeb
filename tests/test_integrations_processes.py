"""The scenario of all drivers on several processes: as one process, within the order of sums."""

from __future__ import annotations

import logging
import os
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

import scenario
from processes import free_port, join_group, leave_group, run_processes

#: what the order in which gradients are summed may change
TOLERANCE = 1e-5

#: in `make test`; the others are in `make soak`
QUICK = [("accelerate", 2, None)]
SLOW = [
    (driver, world, cut)
    for driver in scenario.PARALLEL
    for world in (2, 4)
    for cut in (None, scenario.CUT)
    if (driver, world, cut) not in QUICK
    # The loops of one's own have no checkpoints; those with shards are tried in test_sharded.py.
    if cut is None or driver not in ("ddp", "fsdp2")
]


def work(rank: int, folder: str, driver: str, world: int, cut: int | None, port: int) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "NODE_RANK": 0}
    environment |= {"LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in environment.items()})
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    scenario.WORLD = world
    join_group(rank, folder, world)
    outcome = scenario.PARALLEL[driver](Path(folder), cut)
    torch.save([outcome.weights, outcome.rates], Path(folder, f"{rank}.pt"))
    leave_group()


@pytest.mark.parametrize(
    ("driver", "world", "cut"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_several_processes_agree_with_one(driver, world, cut, tmp_path):
    expected = scenario.plain(tmp_path)
    task = partial(work, driver=driver, world=world, cut=cut, port=free_port())
    run_processes(task, tmp_path, count=world)
    for rank in range(world):
        outcome = scenario.Outcome()
        outcome.weights, outcome.rates = torch.load(tmp_path / f"{rank}.pt")
        far = {n: gap for n, gap in scenario.differences(expected, outcome) if gap > TOLERANCE}
        assert not far
        if outcome.rates:  # the Trainer logs on the first process only
            assert outcome.rates == expected.rates
    assert torch.load(tmp_path / "0.pt")[1]
