"""A plan's optimizer given to DeepSpeed: stage 0 leaves it as it is, ZeRO is refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lamina as lm

PLAN = lm.Plan("AdamW", lr=1e-2, schedule=lm.linear(to=0.0), rules=[lm.Rule("1.*", lr=1e-3)])
STEPS = 5


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def batch(step):
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(step))


def by_hand():
    model = network()
    optimizer = PLAN.build(model, steps=STEPS)
    for step in range(STEPS):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def by_deepspeed(stage):
    import deepspeed

    # It would compile an extension for shared memory, which takes minutes and is not needed.
    vars(sys.modules["deepspeed.comm.torch"])["build_shm_op"] = lambda: None
    model = network()
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    optimizer = PLAN.build(model, steps=STEPS)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    for step in range(STEPS):
        engine.backward(engine(batch(step)).square().mean())
        engine.step()
    return model


def main():
    for mine, theirs in zip(by_hand().parameters(), by_deepspeed(0).parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)
    for stage in (1, 2):
        with pytest.raises(lm.MismatchError, match="ZeRO of DeepSpeed"):
            by_deepspeed(stage)
    by_hand()  # what is left of the refused ones does no harm


def test_a_group_that_something_else_has_emptied():
    """What ZeRO does, without DeepSpeed: a name instead of an IndexError, and no harm to others."""
    model = network()
    optimizer = PLAN.build(model, steps=STEPS)
    optimizer.param_groups[0]["params"].clear()
    with pytest.raises(lm.MismatchError, match="built with 2 parameters and has 0 now"):
        optimizer._exchange.adopt(optimizer.param_groups)
    PLAN.build(network(), steps=STEPS)
    assert PLAN.build(model, steps=STEPS).clock == 0


@pytest.mark.slow
def test_deepspeed_in_a_process_of_its_own():
    pytest.importorskip("deepspeed", reason="not in the extras")
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29741", "RANK": "0", "WORLD_SIZE": "1"}
    given = {**os.environ, **place, "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(Path(__file__))]
    done = subprocess.run(command, env=given, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


if __name__ == "__main__":
    main()
