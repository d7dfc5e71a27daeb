"""A test finds Accelerate as in a new process, whatever another one left behind."""

import gc

import pytest
import torch

from accelerate_state import forget_accelerate


def test_a_loader_that_is_collected_later_leaves_nothing():
    accelerate = pytest.importorskip("accelerate")
    states = accelerate.state
    forget_accelerate()
    gc.disable()
    try:
        accelerator = accelerate.Accelerator(cpu=True)
        loader = accelerator.prepare(torch.utils.data.DataLoader(torch.arange(8.0)))
        begun = {"batches": iter(loader)}
        begun["itself"] = begun
        next(begun["batches"])
        del accelerator, loader, begun
        assert states.GradientState._shared_state
        forget_accelerate()
    finally:
        gc.enable()
    gc.collect()
    assert not states.GradientState._shared_state
    assert not states.PartialState._shared_state
