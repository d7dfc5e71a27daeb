"""The program that type checkers read against the installed wheel: `python -m benchmarks.typed`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks.typed import __main__ as typed  # noqa: E402

Answer = typed.Answer
TEXT = """\
reveal_type(plan)  # Plan
lm.cosine(until=1)  # wrong: no such argument
lm.Plan("SGD", lr=0.1)
"""
RIGHT = [Answer(1, False, "Plan"), Answer(2, True, "unexpected keyword")]


def test_the_program_runs():
    run = subprocess.run(
        [sys.executable, "-W", "error", typed.PROGRAM],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr


def test_the_program_asks_for_types_and_mistakes():
    types, wrong = typed.expected(typed.PROGRAM.read_text(encoding="utf-8"))
    assert {"Plan", "Schedule", "Preview", "Optimizer", "AdamW", "Recorder"} <= set(types.values())
    assert len(wrong) == 4


def test_answers_as_expected():
    assert typed.mistakes(TEXT, RIGHT) == []


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        (RIGHT[1:], "line 1: nothing instead of Plan"),
        ([Answer(1, False, "Any"), RIGHT[1]], "line 1: Any instead of Plan"),
        (RIGHT[:1], "line 2: no error"),
        ([*RIGHT, Answer(3, True, "bad type")], "line 3: bad type"),
    ],
)
def test_canary_of_other_answers(answers, told):
    assert typed.mistakes(TEXT, answers) == [told]
