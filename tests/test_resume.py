"""A run that was cut off and goes on ends with the same bits as one that was not."""

import json
import math
import shutil
import types
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import resume_task
import training_task
from lamina import SGD, LaminaError, Plan, Rule, StateError, checkpoint, early_stop
from lamina.training import Task, fit, prepare
from lamina.training.resume import saved_task


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    monkeypatch.setattr("lamina.training.run_folder.RunFolder.picture", lambda *_: None)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


def variant(base=resume_task, **changes):
    """The task with some of its functions replaced."""
    module = types.ModuleType("variant")
    module.__dict__.update({**vars(base), **changes, "__name__": "variant"})
    return Task("variant", module)


def cut(task, call):
    """The task, stopped by Ctrl-C in a call of its loss."""
    calls = iter(range(10_000))

    def loss(model, batch):
        if next(calls) == call:
            raise KeyboardInterrupt
        return task.module.loss(model, batch)

    return variant(task.module, loss=loss)


def rows(folder):
    """The record of a run without its timings."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def weights(folder):
    return checkpoint.newest(Path(folder) / "checkpoints").content


def assert_same(one, other):
    """Equal records, weights and optimizer state, bit by bit."""
    assert rows(one) == rows(other)
    a, b = weights(one), weights(other)
    assert a["clock"] == b["clock"]
    torch.testing.assert_close(dict(a["model"]), dict(b["model"]), rtol=0, atol=0)
    torch.testing.assert_close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=0, atol=0)
    assert a["best"] == b["best"]
    groups = [[{**g, "params": len(g["params"])} for g in x["optimizer"]["param_groups"]] for x in (a, b)]
    assert groups[0] == groups[1]


def workers():
    """Loaders whose worker processes draw."""
    made = resume_task.data()
    train = DataLoader(made["train"].dataset, batch_size=8, shuffle=True, num_workers=2)
    return {**made, "train": train}


# ------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize(
    ("changes", "settings", "calls"),
    [
        ({}, {}, (1, 9, 14)),
        ({}, {"accumulate": 3}, (5, 9, 15)),
        ({"data": workers}, {"epochs": 2}, (10,)),
    ],
    ids=["main process", "accumulated", "workers"],
)
def test_a_run_cut_off_goes_on_with_the_same_bits(tmp_path, changes, settings, calls):
    task = variant(**changes)
    settings = {**settings, "cpu": True, "save_every": 1}
    fit(task, out=tmp_path / "whole", **settings)
    for call in calls:
        out = tmp_path / f"cut-{call}"
        assert fit(cut(task, call), out=out, **settings).interrupted
        result = fit(task, resume=out, cpu=True)
        assert_same(tmp_path / "whole", out)
        assert result.confirmation.agrees
        assert str(result.confirmation).startswith(f"applied as planned: {result.steps} steps")
