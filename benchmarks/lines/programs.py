"""Running the programs, killed and resumed, and counting their lines."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import logging
import tokenize
import warnings
from pathlib import Path
from typing import Any

import torch

import scenario

HERE = Path(__file__).parent
#: each driver with its two programs
DRIVERS = {
    "plain": ("with_lamina_plain", "by_hand_plain"),
    "Accelerate": ("with_lamina_accelerate", "by_hand_accelerate"),
    "Trainer": ("with_lamina_transformers", "by_hand_transformers"),
    "Lightning": ("with_lamina_lightning", "by_hand_lightning"),
    "Fabric": ("with_lamina_fabric", "by_hand_fabric"),
    "`lamina run`": ("with_lamina_run", "by_hand_plain"),
}
#: the example whose reading kills a run: after step 5, in the second epoch, with layers frozen
KILL_AT = scenario.EXAMPLES + 3 * scenario.BATCH
_IGNORED = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


class Killed(Exception):
    """The run was killed while it read its data."""


class Data(scenario.Texts):
    """The examples of the scenario; one that is killed fails after some of them were read."""

    def __init__(self, kill: bool = False) -> None:
        super().__init__(scenario.EXAMPLES, seed=1)
        self.left = KILL_AT if kill else -1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.left == 0:
            raise Killed
        self.left -= 1
        return super().__getitem__(index)


def run(program: str, folder: Path, killed: bool = False) -> dict[str, torch.Tensor]:
    """Run a program, or kill it in the middle and run it again, and return the weights.

    Args:
        program: the name of its file in this folder.
        folder: where it keeps its checkpoints.
        killed: whether to kill it once.
    """
    folder.mkdir(parents=True)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # what trainers print and say is no part of the table
        if killed:
            with contextlib.suppress(Killed):
                _train(program, folder, Data(kill=True))
                raise AssertionError(f"{program} was not killed")
        return scenario.weights(_train(program, folder, Data()))


def _train(program: str, folder: Path, data: Data) -> Any:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process
    module = importlib.import_module(f"benchmarks.lines.{program}")
    logging.disable(logging.WARNING)
    try:
        if program == "with_lamina_run":
            return _lamina_run(module, folder, data)
        return module.train(folder, data)
    finally:
        logging.disable(logging.NOTSET)


def _lamina_run(task: Any, folder: Path, data: Data) -> Any:
    """Do what `lamina run TASK --epochs 3 --accumulate 2 --save-every "1 steps"` does."""
    from lamina.training.engine import prepare_run

    out = folder / "run"
    settings: dict[str, Any] = {"epochs": scenario.EPOCHS, "accumulate": scenario.ACCUMULATE}
    settings |= {"save_every": "1 steps", "out": out}
    if out.exists():
        settings = {"resume": out}
    task.train_data = lambda: data
    with prepare_run(task, cpu=True, **settings) as session:
        session.train()
    return session.model


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of two sets of weights, over the largest value of each."""
    outcomes = [scenario.Outcome(), scenario.Outcome()]
    outcomes[0].weights, outcomes[1].weights = one, other
    return max(gap for _, gap in scenario.differences(*outcomes))


def code_lines(text: str) -> int:
    """Return the lines of a Python text that hold code: no blanks, comments and docstrings."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            first = node.body[0]
            docstrings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _IGNORED and token.string:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def plan_lines() -> int:
    """Return the lines of the plan's file that hold something."""
    rows = (HERE / "plan.toml").read_text(encoding="utf-8").splitlines()
    return sum(bool(row.strip()) and not row.startswith("#") for row in rows)


def lines_of(program: str) -> int:
    """Return the code lines of a program, without its plan."""
    return code_lines((HERE / f"{program}.py").read_text(encoding="utf-8"))
