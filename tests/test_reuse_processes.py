"""Reuse in two processes under DDP: each stores what it sees, and no bit differs."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data.distributed import DistributedSampler

import lamina as lm
from processes import free_port, join_group, leave_group, run_processes
from reuse_models import MiniLM, freeze, plain, thaw_top_down, words

EPOCHS, BATCH = 6, 2
HEAD_ONLY = freeze("!classifier.*")
TOP_DOWN = HEAD_ONLY + thaw_top_down("layer.2.*", "layer.1.*", "layer.0.*")
FREEZES = [*freeze("embeddings.* | layer.0.*"), lm.Rule("layer.1.*", freeze="2 epochs")]


class Run:
    """One process of a training under DDP.

    Args:
        rank: of the process.
        rules: of the plan.
        reuse: settings of `lamina.reuse`; None for none.
        moving: whether examples move between the processes from epoch to epoch.
        **options: of DistributedDataParallel.
    """

    def __init__(self, rank, rules, reuse, *, moving=True, **options):
        torch.manual_seed(0)
        self.rank, self.moving, self.losses = rank, moving, []
        self.model = MiniLM()
        self.data = words(16)
        self.wrapper = DistributedDataParallel(self.model, **options)
        plan = lm.Plan(lm.AdamW, lr=1e-2, clip_norm=0.5, rules=rules)
        self.optimizer = plan.build(self.wrapper, epochs=EPOCHS, steps_per_epoch=4)
        self.reused = None if reuse is None else lm.reuse(self.model, self.optimizer, **reuse)

    def epochs(self, first, last):
        """Train the epochs [first, last)."""
        examples = range(len(self.data[0]))
        sampler = DistributedSampler(examples, shuffle=self.moving, seed=3)
        for epoch in range(first, last):
            sampler.set_epoch(epoch)
            torch.manual_seed(10 * epoch + self.rank)  # of dropout
            for places in torch.tensor(list(sampler)).split(BATCH):
                self.optimizer.zero_grad()
                loss = plain(self.wrapper(*(part[places] for part in self.data)))
                loss.backward()
                self.optimizer.step()
                self.losses.append(loss.item())
        return self

    def outcome(self):
        """What must not differ, and what became of the calls."""
        counts = None if self.reused is None else self.reused.counts
        return self.losses, dict(self.model.state_dict()), counts


def in_group(rank, folder, task):
    """Do a task as one of two processes, and save what it returns."""
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    warnings.simplefilter("error", lm.LaminaWarning)
    join_group(rank, folder)
    torch.save(task(rank), Path(folder, f"{rank}.pt"))
    leave_group()


def outcomes(folder, task):
    """What each of two processes returned."""
    folder.mkdir(exist_ok=True)
    run_processes(partial(in_group, task=task), folder, limit=300)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def differences(one, other):
    """The names of the weights that differ between two trainings, and "losses"."""
    (losses, state, _), (other_losses, other_state, _) = one, other
    names = [name for name in state if not torch.equal(state[name], other_state[name])]
    return names + ["losses"] * (losses != other_losses)


STAY = {"moving": False}
QUICK = [
    ("head only", HEAD_ONLY, {}),
    ("top down", TOP_DOWN, STAY),
]
SLOW = [
    ("top down", TOP_DOWN, {"find_unused_parameters": True, **STAY}),
    ("head only", HEAD_ONLY, STAY),
    ("top down", TOP_DOWN, {"gradient_as_bucket_view": True}),
    ("top down", TOP_DOWN, {"static_graph": True, **STAY}),
    ("freezes", FREEZES, STAY),
]


def each_case(rank, cases):
    return [
        [Run(rank, rules, reuse, **options).epochs(0, EPOCHS).outcome() for reuse in (None, {})]
        for _, rules, options in cases
    ]


@pytest.mark.parametrize("cases", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)])
def test_two_processes_give_the_same_bits(cases, tmp_path):
    for found in outcomes(tmp_path, partial(each_case, cases=cases)):
        for case, (without, reusing) in zip(cases, found, strict=True):
            assert not differences(without, reusing), case
            name, _, options = case
            counts = reusing[2]
            if options.get("moving", True):  # what this process has seen before
                assert 4 <= counts["replayed"] < 20
            elif name != "freezes":  # every batch from the second epoch on
                assert counts["replayed"] == 20
            # Parts that thaw later are left out too, though DDP waits for their gradients.
            if name == "top down" and not options.get("moving", True):
                assert counts["skipped"] >= 8


def whole(rank):
    return Run(rank, TOP_DOWN, None).epochs(0, EPOCHS).outcome()


def cut(rank, folder):
    """Train three epochs, save, begin the fourth and be killed."""
    run = Run(rank, TOP_DOWN, {"folder": folder / f"stored{rank}"}).epochs(0, 3)
    state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    torch.save(state, folder / f"checkpoint{rank}.pt")
    run.epochs(3, 4)
    os.kill(os.getpid(), signal.SIGKILL)


def resumed(rank, folder):
    """Go on after the third epoch with what is stored."""
    saved = torch.load(folder / f"checkpoint{rank}.pt")
    run = Run(rank, TOP_DOWN, None)
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.reused = lm.reuse(run.model, run.optimizer, folder=folder / f"stored{rank}")
    return run.epochs(3, EPOCHS).outcome()


@pytest.mark.slow
def test_two_processes_are_killed_and_resumed_with_what_they_had_stored(tmp_path):
    expected = outcomes(tmp_path / "whole", whole)
    (tmp_path / "cut").mkdir()
    task = partial(in_group, task=partial(cut, folder=tmp_path))
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        run_processes(task, tmp_path / "cut")
    for one, other in zip(
        outcomes(tmp_path / "resumed", partial(resumed, folder=tmp_path)), expected, strict=True
    ):
        _, state, counts = one
        assert not differences((other[0][12:], state, None), (other[0][12:], other[1], None))
        assert one[0] == other[0][12:]  # losses from the fourth epoch on
        assert counts["replayed"] >= 4


def in_trainer(rank, driver, port, stored):
    """Train with one of the trainers, without reuse and with it."""
    import scenario
    import test_reuse_trainers as trainers

    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "NODE_RANK": 0}
    environment |= {"LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in environment.items()})
    logging.disable(logging.WARNING)
    scenario.WORLD = 2
    found = []
    for reuse in (False, {"folder": stored}):
        if driver == "Trainer":
            trainer = trainers.by_trainer(stored.parent / "output", "top down", reuse)
            model, metrics, reused = trainer.model, trainers.logs(trainer), trainer.reused
        elif driver == "Lightning":
            options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
            model, callback = trainers.by_lightning(None, "top down", reuse, **options)
            metrics, reused = model.metrics, callback.reused
        else:
            options = {"precision": "bf16", "accumulate": 2}
            model, metrics, reused = trainers.by_loop("accelerate", "top down", reuse, **options)
        found.append((metrics, dict(model.state_dict()), reused and reused.counts))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["Trainer", "Lightning", "Accelerate"])
def test_trainers_on_two_processes_give_the_same_bits(driver, tmp_path):
    stored = tmp_path / "stored"
    task = partial(in_trainer, driver=driver, port=free_port(), stored=stored)
    for without, reusing in outcomes(tmp_path, task):
        assert not differences(without, reusing)
        assert without[2] is None
        assert reusing[2]["stored"] >= 14
        assert reusing[2]["replayed"] >= 3
    assert {path.name for path in stored.iterdir()} == {"process0", "process1"}
