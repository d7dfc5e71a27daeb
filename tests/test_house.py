"""The table of `python -m benchmarks.house`, of a package that is small enough to count by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks import house  # noqa: E402

FILES = {
    "src/lamina/__init__.py": '"""A package."""\n\nfrom .plan.plan import Plan\n',
    "src/lamina/errors.py": (
        '"""Errors."""\n\n\n'
        "def refuse(name):\n"
        '    """Whether it is refused."""\n'
        "    # a reason\n"
        "    return 1 if name else 2\n"
    ),
    "src/lamina/plan/__init__.py": "",
    "src/lamina/plan/plan.py": (
        "class Plan:\n"
        "    def build(self):\n"
        '        """Return the optimizer."""\n'
        "        from ..optimizer import build\n\n"
        "        return [build(x) for x in self.rules]\n"
    ),
    "src/lamina/optimizer.py": (
        "from .plan.plan import Plan\n\n\ndef build(plan):\n    return plan\n"
    ),
    "src/lamina/tasks/__init__.py": "A = 1\n",
    "tests/test_architecture.py": (
        'LAYERS = ["errors", "plan", "optimizer", "tasks", "__init__"]\n'
        'IN_CYCLES = {("lamina.plan.plan", "lamina.optimizer"): "Plan.build"}\n'
    ),
}


@pytest.fixture
def tree(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def rows(tree):
    return house.measure(tree, trace=False).rows


def test_each_number_is_the_one_counted_by_hand(tree):
    found = rows(tree)
    assert found["modules flat in the root folder"] == "2"
    assert found["import cycles, lazy imports counted (files in each)"] == "1 (2)"
    assert found["the same without the imports that the architecture test allows"] == "0"
    assert found["imports against the direction of the layers (module to module)"] == "1"
    assert found["code lines, with / without tasks/"] == "11 / 10"
    assert found["all lines, with / without tasks/"] == "22 / 21"
    assert found["ternaries / comprehensions per 1,000 code lines"] == "91 / 91"
    assert found["comments per code line"] == "0.091"
    assert found["function docstrings that begin with a verb / with What, Whether, Where"] == (
        "50 % / 50.0 %"
    )
    assert found["function length, median / 90 %"] == "4 / 5"


def test_canary_each_number_moves_with_the_source(tree):
    before = rows(tree)
    branches = "".join(f"    if plan == {n}:\n        return {n}\n" for n in range(12))
    (tree / "src/lamina/optimizer.py").write_text(f"def build(plan):\n{branches}")
    (tree / "src/lamina/late.py").write_text("# a comment\n")
    after = rows(tree)
    assert after["modules flat in the root folder"] == "3"
    assert after["import cycles, lazy imports counted (files in each)"] == "0"
    for kind in ("statements", "expressions too"):
        row = f"functions of cyclomatic complexity > 10 / > 12, {kind}"
        assert (before[row], after[row]) == ("0 / 0", "1 / 1")


def test_answers_are_counted_in_files_and_a_name_that_is_gone_is_told(tree):
    source = house.Source(tree)
    questions = {"Who builds?": ("Plan.build", "build made"), "Who knows?": ("forgotten",)}
    files, missing = house.answers(source, questions)
    assert files["Who builds?"] == {"plan/plan.py", "optimizer.py"}
    assert missing == ["Who knows?: forgotten"]


def test_every_question_is_answered_by_definitions_that_exist():
    assert len(house.QUESTIONS) == 12
    _, missing = house.answers(house.Source(ROOT), house.QUESTIONS)
    assert missing == []


@pytest.mark.parametrize(
    ("count", "body"),
    [
        (3, "if a: pass\n elif b: pass\n else: pass"),
        (2, "for x in a: pass\n else: pass"),
        (2, "while a: pass"),
        (4, "try: pass\n except A: pass\n except B: pass\n else: pass"),
        (2, "match a:\n  case 1: pass\n  case _: pass"),
        (3, "def g():\n  if a: pass"),
        (1, "return a if b and c else [d for d in e if d]"),
    ],
)
def test_complexity_is_that_of_ruff(count, body):
    text = f"def f(a, b):\n {body}\n"
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=C901"]
    command += ["--config", "lint.mccabe.max-complexity=0", "--output-format=concise", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert f"`f` is too complex ({count} > 0)" in done.stdout
    assert house.statement_complexity(house.ast.parse(text).body[0]) == count


def test_a_step_is_traced_through_its_files(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trace", *house.PLANS.values()])
    exec(house.STEP, {})  # in a process of its own it would be the same, and import torch again
    short, long = json.loads(capsys.readouterr().out)
    for calls in (short, long):
        names = [function.split(".")[-1] for _, function in calls]
        assert "step" in names
        assert not any("<" in name for name in names)
    assert 10 < len(short) < len(long)
