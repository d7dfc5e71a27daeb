"""The scenario killed by SIGKILL in the middle, and resumed in a new process: the same bits."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import warnings
from pathlib import Path

import pytest
import torch

import processes  # noqa: F401  (its fork server has imported torch and lamina already)
import scenario

#: in `make test`; the others are in `make soak`
QUICK = ("transformers",)


class Killed(Exception):
    """Stands in for `scenario.Cut`: to raise it kills the process, which can clean up nothing."""

    def __init__(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def work(driver: str, folder: Path, resumed: bool) -> None:
    """Train until the process is killed, or from there to the end."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if not resumed:
        scenario.Cut = Killed
    outcome = scenario.DRIVERS[driver](folder, scenario.CUT, resumed)
    torch.save([outcome.weights, outcome.rates], folder / "outcome.pt")
    os._exit(0)


def exit_code(driver: str, folder: Path, resumed: bool) -> int | None:
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=work, args=(driver, folder, resumed))
    process.start()
    process.join(timeout=120)
    try:
        return process.exitcode
    finally:
        process.kill()


@pytest.mark.parametrize(
    "driver",
    [
        driver if driver in QUICK else pytest.param(driver, marks=pytest.mark.slow)
        for driver in scenario.DRIVERS
    ],
)
def test_killed_and_resumed_in_a_new_process(driver, tmp_path, one_thread):
    """Both on one thread: on another number of them, torch adds up in another order."""
    expected = scenario.plain(tmp_path)
    assert exit_code(driver, tmp_path, resumed=False) == -signal.SIGKILL
    assert not (tmp_path / "outcome.pt").exists()
    assert exit_code(driver, tmp_path, resumed=True) == 0
    outcome = scenario.Outcome()
    outcome.weights, outcome.rates = torch.load(tmp_path / "outcome.pt")
    assert dict(scenario.differences(expected, outcome)) == dict.fromkeys(expected.weights, 0.0)
    after = {step: rates for step, rates in expected.rates.items() if step >= scenario.CUT}
    assert {step: outcome.rates.get(step) for step in after} == after
