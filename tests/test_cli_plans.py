"""`lamina init`, `diff`, `show --json` and `explain --json`: what they print, and bad input."""

import json
import os
import sys
from pathlib import Path

import pytest

import lamina as lm
import training_task
from test_cli import RULE, TASK, call, check_one_paragraph, plan_file, task_file


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


# ------------------------------------------------------------------------------------------ init


def test_init_prints_a_plan_that_can_be_used():
    printed = call("init", TASK)
    assert printed.exit_code == 0, printed.output
    plan = lm.Plan.from_toml(printed.stdout)
    assert plan == lm.starter_plan(training_task.model()).plan
    assert "# layer.{depth}.weight" in printed.stdout
    assert call("init", "--task", TASK).stdout == printed.stdout


def test_init_writes_a_file_that_show_and_diff_take():
    written = call("init", TASK, "-o", "first.toml")
    assert written.exit_code == 0, written.output
    assert f"lamina show {TASK} first.toml" in written.stdout
    assert call("show", TASK, "first.toml").exit_code == 0
    assert "lr" in call("diff", TASK, "first.toml").stdout
    assert sorted(os.listdir()) == ["first.toml"]


def test_init_of_a_function_that_makes_a_model():
    Path("my_models.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef build():\n"
        "    with torch.device('meta'):\n        return nn.Sequential(nn.Linear(2, 3))\n\n\n"
        "class Kinds:\n    build = staticmethod(build)\n"
    )
    for name in ("my_models:build", "my_models:Kinds.build"):
        printed = call("init", "--model", name)
        assert printed.exit_code == 0, printed.output
        assert "A starter plan for Sequential" in printed.stdout
    sys.modules.pop("my_models")


def test_init_never_overwrites():
    Path("plan.toml").write_text("mine")
    check_one_paragraph(call("init", TASK, "-o", "plan.toml"), "plan.toml", "left as it is")
    os.symlink("nowhere", "link.toml")
    check_one_paragraph(call("init", TASK, "-o", "link.toml"), "link.toml", "left as it is")
    assert Path("plan.toml").read_text() == "mine"


def test_init_leaves_nothing_behind_where_the_model_fails():
    task = task_file("from training_task import *\ndef model():\n    1 / 0\n")
    check_one_paragraph(call("init", task, "-o", "plan.toml"), "line 3", "division by zero")
    assert os.listdir() == ["task.py"] or sorted(os.listdir()) == ["__pycache__", "task.py"]


MODULE = """
import torch
from torch import nn

def build(): return nn.Linear(2, 2)
def broken(): raise ValueError("no weights")
def leaves(): raise SystemExit(3)
def number(): return 3
def needs(size): return nn.Linear(size, size)
def bare(): return nn.ReLU()
value = 7
"""


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--model", "faulty:biuld"], ["faulty has no 'biuld'", "Did you mean 'build'"]),
        (["--model", "faulty:broken"], ["failed with ValueError: no weights"]),
        (["--model", "faulty:leaves"], ["failed with SystemExit: 3"]),
        (["--model", "faulty:number"], ["returned int; expected a torch.nn.Module"]),
        (["--model", "faulty:needs"], ["failed with TypeError", "without arguments"]),
        (["--model", "faulty:value"], ["no function, but int"]),
        (["--model", "faulty:bare"], ["ReLU has no parameters"]),
        (["--model", "faulty"], ["expected the name of a module and of a function"]),
        (["--model", "faulty.py:build"], ["named without .py: --model faulty:build"]),
        (["--model", "os;x:build"], ["expected the name of a module"]),
        (["--model", "no_such_module:build"], ["cannot be imported", "ModuleNotFoundError"]),
        (["--model", "syntax_error:build"], ["cannot be imported", "SyntaxError", "Correct it"]),
        ([TASK, "--model", "faulty:build"], ["both name the model"]),
        ([TASK, "--task", TASK], ["both name the task"]),
        (["plan.toml"], ["this is a plan; init writes one"]),
        (["gone.py"], ["gone.py", "no such task file"]),
        ([TASK, "-o", "plan.txt"], ["a .toml file"]),
        ([TASK, "-o", "no/plan.toml"], ["no such folder"]),
    ],
)
def test_init_of_what_is_no_model(args, parts):
    Path("faulty.py").write_text(MODULE)
    Path("syntax_error.py").write_text("def build(:\n")
    result = call("init", *args)
    sys.modules.pop("faulty", None)
    check_one_paragraph(result, *parts)
    assert not list(Path().glob("*.toml"))


# ------------------------------------------------------------------------------------------ diff


def test_diff_of_two_plans_and_of_one_with_the_tasks_own():
    Path("old.toml").write_text(RULE + 'match = "head.*"\nlr = 1.0\n')
    Path("new.toml").write_text(RULE + 'match = "head.*"\nlr = 0.5\n')
    shown = call("diff", TASK, "old.toml", "new.toml")
    assert shown.exit_code == 0, shown.output
    assert "14 steps: 2 of 6 parameters change" in shown.stdout
    assert "lr  steps 0 to 13: 1 → 0.5" in shown.stdout
    assert call("diff", "old.toml", "new.toml", "--task", TASK).stdout == shown.stdout
    with_steps = call("diff", TASK, "old.toml", "new.toml", "--steps", 5)
    assert "5 steps: 2 of 6 parameters change" in with_steps.stdout
    own = call("diff", TASK, "new.toml")
    assert "of 6 parameters change" in own.stdout
    same = call("diff", TASK, "old.toml", "old.toml")
    assert "the plans do the same with all 6 parameters" in same.stdout


def test_diff_as_json():
    Path("old.toml").write_text(RULE + 'match = "head.*"\nlr = 1.0\n')
    Path("new.toml").write_text(RULE + 'match = "head.*"\nthaw = 3\nlr = 1.0\n')
    data = json.loads(call("diff", TASK, "old.toml", "new.toml", "--json").stdout)
    assert (data["same"], data["steps"], data["unchanged"]) == (False, [14, 14], 4)
    (part,) = data["parts"]
    assert part["parameters"] == ["head.weight", "head.bias"]
    (change,) = part["changes"]
    assert (change["setting"], change["first"], change["last"]) == ("trains", 0, 2)
    assert data["hash_before"] != data["hash_after"]


def test_terminals_without_unicode(monkeypatch):
    Path("new.toml").write_text(RULE + 'match = "head.*"\nlr = 0.5\n')
    assert not call("diff", TASK, "new.toml").stdout.isascii()
    monkeypatch.setattr("lamina.cli.diff.can_show", lambda: False)
    assert call("diff", TASK, "new.toml").stdout.isascii()
    assert call("init", TASK).stdout.isascii()


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["plan.toml"], ["no task is named", "lamina diff"]),
        ([TASK], ["one plan or two", "lamina diff"]),
        ([TASK, "a.toml", "b.toml", "c.toml"], ["one plan or two"]),
        (["plan.toml", TASK], ["expected a task, then"]),
        ([TASK, TASK, "plan.toml"], ["expected a task, then"]),
        ([TASK, "plan.toml", "--task", TASK], ["both name the task"]),
        ([TASK, "gone.toml"], ["gone.toml", "no such plan file"]),
        ([TASK, "plan.toml", "unfit.toml"], ["unfit.toml", "haed.*", "head"]),
        ([TASK, "plan.toml", "--epochs", "1", "--steps", "3"], ["pass one"]),
        ([TASK, "plan.toml", "--steps", "0"], ["steps=0"]),
    ],
)
def test_bad_words_of_diff(args, parts):
    plan_file('optimizer = "SGD"\nlr = 0.1\n')
    Path("unfit.toml").write_text(RULE + 'match = "haed.*"\nlr = 1.0\n')
    check_one_paragraph(call("diff", *args), *parts)


# ---------------------------------------------------------------------------------- show, explain


def test_show_as_json_and_with_a_picture():
    result = call("show", TASK, "--json", "--plot", "lr.svg")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["steps"] == 14
    assert {"group", "lr_start", "names", "thaw"} <= data["groups"][0].keys()
    assert "<svg" in Path("lr.svg").read_text()
    assert "wrote lr.svg" in result.stderr


def test_show_all_groups():
    shown = call("show", TASK, "--full").stdout
    assert shown.strip() == call("show", TASK).stdout.strip()


def test_explain_as_json():
    result = call("explain", "layer.0.weight", TASK, "--step", 9, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (data["name"], data["step"], data["trains"]) == ("layer.0.weight", 9, True)
    (lr,) = [setting for setting in data["settings"] if setting["key"] == "lr"]
    assert {"rule": "layer.{depth}.*", "operation": "by_depth(0.5)", "result": "0.005"} in lr[
        "chain"
    ]


def test_errors_are_no_json():
    result = call("explain", "layer.0.wieght", TASK, "--json")
    check_one_paragraph(result, "layer.0.wieght", "layer.0.weight")
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["init", "diff", "show", "explain"])
def test_each_help_names_its_words(command):
    shown = call(command, "--help")
    assert shown.exit_code == 0
    assert "TASK" in shown.stdout
