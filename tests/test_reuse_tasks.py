"""The example tasks with `--reuse`, on a few of their examples: the same bits, also when killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import digits
import reviews
from lamina.training import Task, fit
from test_reuse_run import assert_same_run

pytestmark = [pytest.mark.network, pytest.mark.slow]

#: head, layers and what is below them
PARTS = {
    "reviews": ("classifier.*", "encoder.layer.{depth}.*", "embeddings.*"),
    "digits": ("_fc.*", "_blocks.{depth}.*", "_conv_stem.* | _bn0.*"),
}
BASE = """
optimizer = "AdamW"
lr = 5e-4
schedule = "cosine(to=0.01)"
clip_norm = 1.0
"""
#: what the plan of `digits` has too: whatever is wholly frozen rests in eval mode
NORMS = """
[[rule]]
match = "type:BatchNorm2d"
frozen = true
"""
HEAD_ONLY = BASE + '[[rule]]\nmatch = "!{head}"\nfrozen = true\n'
TOP_DOWN = (
    BASE
    + '[[rule]]\nmatch = "{bottom}"\nfrozen = true\n'
    + '[[rule]]\nmatch = "{layers}"\nthaw = "top_down(every=1 epochs, start=1 epochs)"\n'
)
PROBE_THEN_ALL = BASE + '[[rule]]\nmatch = "!{head}"\nthaw = "3 epochs"\n'
PLANS = {"head": HEAD_ONLY, "top down": TOP_DOWN, "probe, then all": PROBE_THEN_ALL}
MODULES = {"reviews": reviews, "digits": digits}


def plan_for(name, plan):
    head, layers, bottom = PARTS[name]
    for part, pattern in (("head", head), ("layers", layers), ("bottom", bottom)):
        plan = plan.replace("{" + part + "}", pattern)
    return plan


def small(name):
    """A task with a few of its examples."""
    reviews.TRAIN_TEXTS, reviews.HELD_OUT_TEXTS = 40, 16
    digits.TRAIN_IMAGES, digits.HELD_OUT_IMAGES = 40, 20
    vars(MODULES[name])["DEFAULTS"] = {**reviews.DEFAULTS, "batch_size": 8}
    return Task(name, MODULES[name])


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    """Numbers of examples that are put back; no picture."""
    monkeypatch.setattr("lamina.training.run_folder.RunFolder.picture", lambda *_: None)
    for module in MODULES.values():
        monkeypatch.setattr(module, "baseline", lambda data: {})
        ends = ("_TEXTS", "_IMAGES", "DEFAULTS")
        for name in [name for name in vars(module) if name.endswith(ends)]:
            monkeypatch.setattr(module, name, getattr(module, name))


def train(folder, name, plan, **settings):
    return fit(small(name), plan_for(name, plan), out=folder, cpu=True, **settings)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", PARTS)
def test_an_example_task_ends_with_the_same_bits(tmp_path, name, plan):
    plan += NORMS if name == "digits" else ""
    train(tmp_path / "without", name, plan, epochs=4)
    result = train(tmp_path / "with", name, plan, epochs=4, reuse=True)
    assert_same_run(tmp_path / "without", tmp_path / "with")
    assert result.reuse.replayed > 0


def test_batch_norm_that_trains_later_is_exact_too(tmp_path):
    """Without the rule of its plan: the statistics move as soon as a block has thawed."""
    train(tmp_path / "without", "digits", PROBE_THEN_ALL, epochs=4)
    result = train(tmp_path / "with", "digits", PROBE_THEN_ALL, epochs=4, reuse=True)
    assert_same_run(tmp_path / "without", tmp_path / "with")
    assert result.reuse.replayed > 0


KILLED = """
import os, signal, sys
import torch
from test_reuse_tasks import TOP_DOWN, train
from lamina.training.run_folder import RunFolder

torch.set_num_threads(int(sys.argv[3]))
RunFolder.picture = lambda *_: None

class Kill:
    def on_step(self, record):
        if record.step == 8:
            os.kill(os.getpid(), signal.SIGKILL)
    def on_event(self, event): ...
    def on_validation(self, result): ...

train(sys.argv[1], sys.argv[2], TOP_DOWN, epochs=4, save_every=2, reuse=True, listeners=[Kill()])
"""


@pytest.mark.parametrize("name", PARTS)
def test_a_killed_run_goes_on(tmp_path, name):
    whole = train(tmp_path / "whole", name, TOP_DOWN, epochs=4, save_every=2)
    assert whole.steps > 8
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed"), name, threads],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": threads},
        timeout=600,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert list((tmp_path / "killed" / "reuse").glob("*.rows"))
    result = fit(small(name), resume=tmp_path / "killed", cpu=True)
    assert result.reuse.replayed > 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
