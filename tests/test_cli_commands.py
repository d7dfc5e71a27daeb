"""`find-lr`, `plot` and `check`; JSON, completion, exit codes, and output into a pipe."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import training_task
from lamina.cli.app import app

TASK = str(Path(training_task.__file__))
SEEN = os.pathsep.join([str(Path(TASK).parent), *sys.path])
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": SEEN}
LATE = 'optimizer = "SGD"\nlr = 0.1\n[[rule]]\nmatch = "head.*"\nthaw = "200 steps"\n'

#: a task whose loss falls clearly: a regression
REGRESSION = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
PLAN = "optimizer = 'SGD'\\nlr = 0.02\\n[[rule]]\\nmatch = 'bias'\\nlr = 0.01\\n"
DEFAULTS = {"epochs": 2, "seed": 3}
def model():
    return nn.Linear(4, 1)
def data():
    x = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 8, shuffle=True)
    return {"train": loader, "validation": loader}
def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("task.py").write_text(REGRESSION)
    Path("late.toml").write_text(LATE)


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def check_one_paragraph(result, *parts):
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("lamina: ")
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


def left():
    return sorted(path.name for path in Path().iterdir() if path.name != "__pycache__")


# --------------------------------------------------------------------------------------- find-lr

SHORT = ("--cpu", "--steps", 60)


def test_find_lr_suggests_and_draws():
    result = call("find-lr", "task.py", *SHORT, "--plot", "lr.png")
    assert result.exit_code == 0, result.output
    assert "suggestion: lr 0.0" in result.stdout
    assert "lm.Rule('*', lr=lm.times(" in result.stdout
    assert result.stdout.endswith("wrote lr.png\n")
    assert left() == ["late.toml", "lr.png", "task.py"]


def test_find_lr_as_json_and_of_one_rule():
    result = call("find-lr", "task.py", *SHORT, "--json")
    found = json.loads(result.stdout)
    assert found["now"] == {"bias": 0.01, "default": 0.02}
    assert found["suggested"]["default"] == pytest.approx(found["suggestion"])
    again = json.loads(call("find-lr", "task.py", *SHORT, "--json").stdout)
    assert again == found
    other = json.loads(call("find-lr", "task.py", *SHORT, "--seed", 9, "--json").stdout)
    assert other["curves"] != found["curves"]
    alone = call("find-lr", "task.py", *SHORT, "--rule", "bias", "--json")
    assert json.loads(alone.stdout)["now"] == {"bias": 0.01}


def test_find_lr_without_a_suggestion_ends_with_1():
    result = call("find-lr", "task.py", *SHORT, "--high", "1e-6")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[1].startswith("no suggestion: in 3 of 3 repeats the loss")
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--steps", "3"], ["steps=3", "at least 20"]),
        (["--repeats", "1"], ["repeats=1"]),
        (["--low", "1", "--high", "0.1"], ["low=1.0, high=0.1"]),
        (["--rule", "head.*"], ["find_lr, rule: 'head.*' is neither a group"]),
        (["--at", "999"], ["at=999", "below 20"]),
        (["--plot", "lr.xyz"], ["--plot lr.xyz"]),
        (["--plot", "gone/lr.png"], ["--plot gone/lr.png"]),
        (["--mixed-precision", "fp16"], ["fp16 needs a GPU"]),
    ],
)
def test_find_lr_with_bad_arguments(args, parts):
    check_one_paragraph(call("find-lr", "task.py", "--cpu", *args), *parts)
    assert left() == ["late.toml", "task.py"]


def test_find_lr_under_a_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    check_one_paragraph(call("find-lr", "task.py", "--cpu"), "a range test runs in one")


def test_find_lr_interrupted():
    text = "from training_task import *\ndef loss(model, batch):\n    raise KeyboardInterrupt\n"
    Path("stopped.py").write_text(text)
    result = call("find-lr", "stopped.py", "--cpu")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    good = call("find-lr", "task.py", "--cpu", "--high", "1e-6", "--steps", 20)
    assert good.exit_code == 1  # Accelerate's globals were put away


# ------------------------------------------------------------------------------- plot and check


@pytest.mark.parametrize("name", ["plan.png", "plan.svg", "plan.pdf"])
def test_plot_draws_a_plan(name):
    result = call("plot", TASK, "--out", name)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"wrote {name}\n"
    assert Path(name).stat().st_size > 1000
    assert left() == ["late.toml", name, "task.py"]


@pytest.mark.parametrize("out", ["plan.xyz", "plan", "gone/plan.png"])
def test_plot_where_it_cannot_be(out):
    check_one_paragraph(call("plot", TASK, "--out", out), f"--out {out}", ".png, .svg or .pdf")
    assert left() == ["late.toml", "task.py"]


def test_check_ends_by_what_it_found():
    good = call("check", TASK)
    assert (good.exit_code, good.stderr) == (0, "")
    assert good.stdout == "no problems, no advice: 6 parameters in 3 groups\n"
    bad = call("check", TASK, "late.toml")
    assert bad.exit_code == 1
    assert bad.stdout.startswith("problem: thaw-after-end: ")
    assert "1 problem, no advice" in bad.stdout
    assert call("check", TASK, "late.toml", "--ignore", "thaw-after-end").exit_code == 0
    other = call("check", TASK, "late.toml", "--ignore", "thaw-after-and")
    assert other.exit_code == 1
    assert "--ignore thaw-after-and: there is no such finding here." in other.stderr
    Path("wrong.toml").write_text('optimizer = "SGD"\nlr = 0.1\n[[rule]]\nmatch = "no.*"\nlr = 1\n')
    check_one_paragraph(call("check", TASK, "wrong.toml"), "wrong.toml", "no.*")


def test_check_as_json():
    found = json.loads(call("check", TASK, "late.toml", "--json").stdout)
    assert [each["code"] for each in found["findings"]] == ["thaw-after-end"]
    assert found["findings"][0].keys() == {"code", "severity", "message", "fix"}
    assert (found["steps"], found["groups"], found["parameters"]) == (14, 2, 6)


# ----------------------------------------------------------------------------------------- JSON


def test_inspect_as_json(monkeypatch):
    monkeypatch.setattr("lamina.training.run_folder.RunFolder.picture", lambda *_: None)
    assert call("run", TASK, "--cpu", "--out", "made").exit_code == 0
    found = json.loads(call("inspect", "made", "--json").stdout)
    assert (found["kind"], found["checksum"], found["damaged"]) == ("run", "right", [])
    assert (found["run"]["clock"], found["run"]["steps"]) == (14, 14)
    assert found["run"]["validation"]["averages"].keys() == {"accuracy", "loss"}
    names = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert names["model.head.weight"] == {
        "name": "model.head.weight",
        "dtype": "float32",
        "shape": [2, 4],
    }
    assert [group["optimizer"] for group in found["groups"]] == ["AdamW"] * 3


def test_inspect_other_files_as_json():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(float("inf")))
    torch.save(model.state_dict(), "model.pt")
    torch.save(optimizer.state_dict(), "optimizer.pt")
    torch.save({"a": 1, "b": {"c": torch.ones(2)}}, "other.pt")
    kinds = {}
    for name in ("model", "optimizer", "other"):
        kinds[name] = json.loads(call("inspect", f"{name}.pt", "--json").stdout)
        assert kinds[name]["kind"] == name
        assert kinds[name]["checksum"] == "none"
    assert kinds["optimizer"]["groups"][0]["lr"] is None  # JSON has no infinity
    assert [tensor["name"] for tensor in kinds["other"]["tensors"]] == ["b.c"]
    check_one_paragraph(call("inspect", "gone.pt", "--json"), "gone.pt")


def test_tasks_as_json():
    found = json.loads(call("tasks", "--json").stdout)
    assert [each["name"] for each in found] == ["reviews", "digits"]
    assert [each["default"] for each in found] == [True, False]
    assert all(Path(each["file"]).is_file() for each in found)


# ------------------------------------------------------------------- help, completion and pipes


def commands():
    return [command.name or command.callback.__name__ for command in app.registered_commands]


@pytest.mark.parametrize("command", commands())
def test_every_help_has_an_example(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"Example: lamina {command}" in result.stdout
    assert "\x1b" not in result.stdout


def test_the_exit_codes_are_in_the_help_and_the_page():
    page = (Path(__file__).parents[1] / "docs" / "reference" / "command-line.md").read_text()
    text = " ".join(call("--help").stdout.split())
    assert "Exit codes: 0 done; 1 the answer is no" in text
    for code in ("0", "1", "2", "130", "141", "143"):
        assert f"| {code} |" in page
        assert f"{code} " in text
    for command in commands():
        assert f"`lamina {command}" in page


def test_completion_is_typers_own():
    asked = {"_LAMINA_COMPLETE": "complete_bash", "COMP_WORDS": "lamina fin", "COMP_CWORD": "1"}
    found = CliRunner().invoke(app, [], prog_name="lamina", env=asked)
    assert found.stdout.split() == ["find-lr"]
    assert "--install-completion" in call("--help").stdout


def test_a_closed_pipe_is_no_traceback():
    """As `lamina check | head -0`: the reader is gone before the first line is written."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "lamina", "check", TASK, "late.toml", "--json"]
    pipes = {"stdout": write, "stderr": subprocess.PIPE}
    try:
        done = subprocess.run(command, env=ENV, timeout=300, check=False, **pipes)
    finally:
        os.close(write)
    assert done.stderr == b""
    assert done.returncode == 141


def test_another_broken_pipe_is_told():
    text = "from training_task import *\ndef model():\n    raise BrokenPipeError(32, 'worker')\n"
    Path("broken.py").write_text(text)
    check_one_paragraph(call("check", "broken.py"), "model() failed with BrokenPipeError")


def test_a_pipe_gets_plain_text_of_the_width_that_is_asked_for():
    for width in ("50", "200"):
        piped = CliRunner().invoke(app, ["show", TASK], env={"COLUMNS": width})
        assert piped.exit_code == 0, piped.output
        assert "\x1b" not in piped.stdout
        assert max(map(len, piped.stdout.splitlines())) <= int(width)
        assert ("left out at this width" in piped.stdout) is (width == "50")
