"""How `run`, `show` and `explain` are told of a task and a plan: in one way, and never guessed."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import training_task
from lamina import TaskError
from lamina.cli.app import app
from lamina.cli.arguments import check_parameter, task_and_plan

TASK = str(Path(training_task.__file__))
PLAN = 'optimizer = "SGD"\nlr = 0.25\n'
BEGINNINGS = {"run": ["run"], "show": ["show"], "explain": ["explain", "head.weight"]}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """In a folder with a plan and a task; the example task must not be touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lamina.training.run_folder.RunFolder.picture", lambda *_: None)
    monkeypatch.setattr("task_helpers.fetch.fetch", _not_fetched)
    Path("my plan.toml").write_text(PLAN)
    Path("plan.toml").write_text(PLAN)
    Path("task.py").write_text("from training_task import *\n")


def _not_fetched(*_, **__):
    raise AssertionError("the example task was opened")


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def call_command(command, *words):
    return call(*BEGINNINGS[command], *words, *(["--cpu"] if command == "run" else []))


# ------------------------------------------------------------------------------------ the grammar


@pytest.mark.parametrize("command", BEGINNINGS)
@pytest.mark.parametrize(
    "words",
    [
        ("task.py", "plan.toml"),
        ("plan.toml", "--task", "task.py"),
        ("--task", "task.py", "plan.toml"),
    ],
)
def test_each_command_takes_task_and_plan_alike(command, words):
    result = call_command(command, *words)
    assert result.exit_code == 0, result.output
    assert "0.25" in result.stdout


@pytest.mark.parametrize("command", BEGINNINGS)
def test_each_command_takes_a_task_alone_with_its_own_plan(command):
    for words in (("task.py",), ("--task", "task.py")):
        result = call_command(command, *words)
        assert result.exit_code == 0, result.output
        assert "0.01" in result.stdout


@pytest.mark.parametrize("command", BEGINNINGS)
def test_a_plan_alone_is_never_tried_on_the_built_in_task(command):
    result = call_command(command, "my plan.toml")
    assert result.exit_code == 2
    assert result.stderr.startswith("lamina: my plan.toml is a plan, but no task is named")
    start = " ".join(["lamina", *BEGINNINGS[command]])
    assert f"{start} my_task.py 'my plan.toml'" in result.stderr
    assert result.stderr.rstrip().endswith(f"{start} reviews 'my plan.toml'")
    assert not Path("runs").exists()


@pytest.mark.parametrize("command", BEGINNINGS)
@pytest.mark.parametrize(
    "words",
    [
        ("my plan.toml", "task.py"),
        ("plan.toml", "task.py"),
        ("task.py", "--task", "task.py"),
        ("task.py", "plan.toml", "--task", "task.py"),
    ],
)
def test_the_proposed_command_works_when_pasted(command, words):
    refused = call_command(command, *words)
    assert refused.exit_code == 2
    proposed = shlex.split(re.search(r"lamina (?:run|show|explain) .*", refused.stderr)[0])
    result = call(*proposed[1:], *(["--cpu"] if command == "run" else []))
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "words",
    [("task.py",), ("plan.toml", "task.py"), ("task.py", "head.weight"), ("task.py", "plan.toml")],
)
def test_explain_without_a_parameter_first(words):
    refused = call("explain", *words)
    assert refused.exit_code == 2
    assert f"{words[0]} is a file" in refused.stderr
    proposed = shlex.split(refused.stderr.partition("such as: ")[2])
    assert proposed[:2] == ["lamina", "explain"]
    assert proposed[2] in ("head.weight", "layer.0.weight")
    result = call(*proposed[1:])
    assert result.exit_code == 0, result.output


def test_a_parameter_may_be_called_like_a_file_that_is_not_there():
    check_parameter("block.py", ("task.py", None))
    with pytest.raises(TaskError):
        check_parameter("task.py", (None, None))


@pytest.mark.parametrize("command", BEGINNINGS)
def test_the_help_says_the_same_everywhere(command):
    text = " ".join(call(BEGINNINGS[command][0], "--help").stdout.split())
    assert re.search(r" \[*TASK\]* \[*PLAN\.toml\]* ", text)
    assert "--task" in text


def test_nothing_means_the_built_in_task_with_its_own_plan():
    assert task_and_plan(["run"], (None, None), None) == ("reviews", None)
    assert task_and_plan(["run"], (None, None), None, lambda: "saved.py") == ("saved.py", None)


# ---------------------------------------------------------------------------------------- resuming


def test_a_plan_alone_is_for_the_run_that_is_resumed():
    assert call("run", "task.py", "--cpu", "--out", "made").exit_code == 0
    result = call("run", "plan.toml", "--resume", "made", "--epochs", 3, "--extend", "hold")
    assert result.exit_code == 0, result.output
    assert json.loads(Path("made/run.json").read_text())["steps"] == 21
    assert Path("made/plan.toml").read_text().count("0.25") == 1


# ------------------------------------------------------------------------------------------- seeds


@pytest.mark.filterwarnings("default::lamina.LaminaWarning")
def test_a_seed_that_does_not_reach_the_order_is_told_in_one_line():
    text = (
        "import torch\nfrom training_task import *\nimport training_task\n"
        "def data():\n"
        "    made = training_task.data()\n"
        "    own = torch.Generator().manual_seed(5)\n"
        "    train = DataLoader(made['train'].dataset, 8, shuffle=True, generator=own)\n"
        "    return {**made, 'train': train}\n"
    )
    Path("own.py").write_text(text)
    result = call("run", "own.py", "--cpu", "--seed", 7)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("lamina: seed=7 was given, but the order of the training data")
    assert result.stderr.count("\n") == 1
    assert call("run", "own.py", "--cpu").stderr == ""
