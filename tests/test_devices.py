"""Processes that were launched together train together, or nothing trains."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType

import training_task
from lamina import LaminaError, checkpoint
from lamina.training import devices, fit
from lamina.training.devices import launched
from lamina.training.settings import Settings

TASK = str(Path(training_task.__file__))
SEEN = os.pathsep.join([str(Path(TASK).parent), *sys.path])


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, (1, "")),
        ({"WORLD_SIZE": "1", "RANK": "0"}, (1, "")),
        ({"WORLD_SIZE": "4", "RANK": "3"}, (4, "WORLD_SIZE=4")),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, (2, "WORLD_SIZE=2")),
        ({"WORLD_SIZE": "many", "RANK": "0"}, (1, "")),
        ({"PMI_SIZE": "3", "PMI_RANK": "0"}, (3, "PMI_SIZE=3")),
        (
            {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "1"},
            (8, "OMPI_COMM_WORLD_SIZE=8"),
        ),
    ],
)
def test_how_many_processes_were_launched(environment, launch):
    assert launched(environment) == launch


@pytest.fixture
def torchrun(monkeypatch):
    """This process as the first of two."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    ended = []
    monkeypatch.setattr(devices, "end", ended.append)
    return ended


def accelerator(processes, device="cpu", precision="no"):
    return SimpleNamespace(
        num_processes=processes,
        device=torch.device(device),
        mixed_precision=precision,
        distributed_type=DistributedType.NO,
    )


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_a_process_that_would_train_alone_is_refused(torchrun, monkeypatch, device):
    alone = accelerator(1, device)
    monkeypatch.setattr(devices, "_accelerator", lambda *_: alone)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(LaminaError, match=r"2 processes were launched \(WORLD_SIZE=2\).*torchrun"):
        devices.begin(Settings(), 1, cpu=False)
    assert torchrun == [alone]


def test_without_accelerators_the_processes_are_told_to_use_the_cpu(torchrun, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(
        devices, "_accelerator", lambda *given: asked.append(given[2]) or accelerator(2)
    )
    assert devices.begin(Settings(), 1, cpu=False).num_processes == 2
    assert asked == [True]
    assert torchrun == []


def test_more_processes_than_gpus_are_refused_before_they_meet(torchrun, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(devices, "_accelerator", lambda *_: pytest.fail("began"))
    with pytest.raises(LaminaError, match=r"has 1 GPU.*--nproc-per-node=1"):
        devices.begin(Settings(), 1, cpu=False)


@pytest.mark.parametrize("cpu", [False, True])
def test_one_of_several_that_does_not_know_which_is_refused(cpu, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaminaError, match=r"WORLD_SIZE=2 .* RANK is not set.*unset WORLD_SIZE"):
        fit(training_task, cpu=cpu, out=tmp_path / "run")
    monkeypatch.delenv("WORLD_SIZE")
    assert fit(training_task, cpu=True, epochs=1, out=tmp_path / "run").steps == 7


def test_a_run_that_could_not_begin_leaves_nothing_to_the_next(monkeypatch, tmp_path):
    def refuse(*_, **__):
        accelerate.PartialState(cpu=True)
        raise ValueError("not so")

    import accelerate

    monkeypatch.setattr(accelerate, "Accelerator", refuse)
    with pytest.raises(LaminaError, match=r"cannot train so \(not so\)"):
        fit(training_task, cpu=True, out=tmp_path / "run")
    assert accelerate.PartialState._shared_state == {}


def test_fp16_without_a_gpu_is_refused_also_where_the_launcher_chose_it(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(LaminaError, match="mixed_precision='fp16' was given, but fp16 needs a GPU"):
        fit(training_task, mixed_precision="fp16", cpu=True, out=tmp_path / "a")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(LaminaError, match="fp16 needs a GPU"):
        fit(training_task, cpu=True, out=tmp_path / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without GPU")
def test_fp16_without_a_gpu_is_refused_without_cpu_too(tmp_path):
    with pytest.raises(LaminaError, match="fp16 needs a GPU"):
        fit(training_task, mixed_precision="fp16", out=tmp_path / "a")


# ---------------------------------------------------------------------------- two real processes


def launch(folder, *args, **environment):
    """`lamina run` in two processes, on a machine without accelerators; ended after two minutes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command = [*launcher, "--standalone", "--local-addr=127.0.0.1", "-m", "lamina", "run", *args]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": SEEN}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **hidden, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that its workers can be ended with it
    )
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output, errors


SPLIT = """
import json, os
from training_task import *
import training_task
PLAN = 'optimizer = "SGD"\\nlr = 0.1\\nschedule = "cosine(to=0.1)"\\n'
SIZE = int(os.environ.get("SIZE", 4))

def points():
    return training_task.data()["train"].dataset

def data():
    whole = TensorDataset(*(t[:48] for t in points().tensors), torch.arange(48))
    {loader}
    return {{"train": train, "validation": DataLoader(whole, 8)}}

def loss(model, batch):
    if model.training:
        rank = os.environ.get("RANK", "alone")
        with open(f"seen-{{rank}}.txt", "a") as file:
            file.write(json.dumps(batch[2].tolist()) + "\\n")
    return training_task.loss(model, batch)
"""
ORDERS = {
    "seeded": "train = DataLoader(whole, SIZE, shuffle=True)",
    "own generator": (
        "train = DataLoader(whole, SIZE, shuffle=True, generator=torch.Generator().manual_seed(4))"
    ),
    "weighted, without generator": (
        "train = DataLoader(whole, SIZE, sampler=torch.utils.data.SubsetRandomSampler(range(48)))"
    ),
}


def seen(folder, rank):
    lines = (folder / f"seen-{rank}.txt").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_two_processes_without_accelerators_train_together(order, tmp_path):
    (tmp_path / "task.py").write_text(SPLIT.format(loader=ORDERS[order]))
    code, output, errors = launch(tmp_path, "task.py", "--epochs", "2", "--out", "made")
    assert code == 0, errors
    about = json.loads((tmp_path / "made" / "run.json").read_text())
    assert about["processes"] == 2
    assert about["steps"] == about["steps_taken"] == 12
    assert output.count("12 steps (2 epochs of 6)") == 1
    assert not (tmp_path / "runs").exists()
    one, other = seen(tmp_path, 0), seen(tmp_path, 1)
    for epoch in (slice(0, 6), slice(6, 12)):  # each point in exactly one of the two
        assert sorted(chain(*one[epoch], *other[epoch])) == list(range(48))
    assert one[:6] != one[6:]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["seeded", "own generator"])
def test_two_processes_equal_one_with_batches_of_double_size(order, tmp_path, monkeypatch):
    (tmp_path / "task.py").write_text(SPLIT.format(loader=ORDERS[order]))
    code, _, errors = launch(tmp_path, "task.py", "--epochs", "2", "--out", "two")
    assert code == 0, errors
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SIZE", "8")
    fit("task.py", epochs=2, out="one", cpu=True)
    assert [a + b for a, b in zip(seen(tmp_path, 0), seen(tmp_path, 1), strict=True)] == seen(
        tmp_path, "alone"
    )
    one, two = (checkpoint.newest(Path(name) / "checkpoints").content for name in ("one", "two"))
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, rtol=1e-5, atol=1e-6)
