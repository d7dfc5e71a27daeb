"""The command line: what it prints, its exit codes, and every bad input as one paragraph."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import training_task
from lamina import LaminaWarning, Plan, TaskError, __version__, checkpoint
from lamina.cli import main
from lamina.cli.app import app

TASK = str(Path(training_task.__file__))
# what a process of its own needs to find the task and lamina
SEEN = os.pathsep.join([str(Path(TASK).parent), *sys.path])
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """In an empty folder, so that whatever is left behind can be seen; without pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lamina.training.run_folder.RunFolder.picture", lambda *_: None)


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def check_one_paragraph(result, *parts):
    """Exit code 2, one line on stderr that holds these parts, nothing else, nothing left behind."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("lamina: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    for part in parts:
        assert part in result.stderr
    assert not Path("runs").exists()


def saved(folder):
    """What the newest checkpoint of a run holds."""
    return checkpoint.newest(Path(folder) / "checkpoints").content


def plan_file(text):
    Path("plan.toml").write_text(text)
    return "plan.toml"


def task_file(text):
    Path("task.py").write_text(text)
    return "task.py"


# ------------------------------------------------------------------------------------------- good


def test_run_announces_trains_and_sums_up():
    result = call("run", TASK, "--cpu", "--out", "made")
    assert result.exit_code == 0, result.output
    places = [
        result.stdout.index(part)
        for part in (
            "14 steps (2 epochs of 7)",
            "step 3: layer.1.* trains from step 3 on",
            "epoch 1/2 · step 7/14 · loss",
            "epoch 2/2 · step 14/14 · loss",
            "accuracy on held-out points",
            "held-out points",
            "share of the larger class",
            "applied as planned: 14 steps, 3 groups",
            "made",
        )
    ]
    assert places[:5] == sorted(places[:5])
    assert saved("made")["clock"] == 14


def test_run_takes_its_options():
    plan = plan_file('optimizer = "SGD"\nlr = 0.1\n')
    result = call("run", TASK, plan, "--cpu", "--epochs", 3, "--seed", 7, "--accumulate", 2)
    assert result.exit_code == 0, result.output
    (folder,) = Path("runs").iterdir()
    about = json.loads((folder / "run.json").read_text())
    assert [about[key] for key in ("epochs", "seed", "accumulate", "steps")] == [3, 7, 2, 12]
    assert Plan.from_toml(folder / "plan.toml") == Plan("SGD", lr=0.1)


def test_show_prints_what_run_announces():
    shown = call("show", "--task", TASK).stdout
    assert shown.strip() in call("run", TASK, "--cpu").stdout
    assert "layer.0.*" in shown


def test_show_with_a_length_a_picture_and_findings():
    text = 'optimizer = "SGD"\nlr = 0.1\n[[rule]]\nmatch = "head.*"\nthaw = "200 steps"\n'
    result = call("show", plan_file(text), "--task", TASK, "--steps", 100, "--plot", "lr.svg")
    assert result.exit_code == 0, result.output
    assert "100 steps" in result.stdout
    assert "thaw-after-end" in result.stdout
    assert "<svg" in Path("lr.svg").read_text()
    assert not Path("runs").exists()


def test_run_shows_a_finding_once():
    text = 'optimizer = "SGD"\nlr = 0.1\n[[rule]]\nmatch = "head.*"\nthaw = "200 steps"\n'
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call("run", TASK, plan_file(text), "--cpu", "--epochs", 1)
    assert result.exit_code == 0, result.output
    assert result.output.count("thaw-after-end") == 1
    assert [each for each in caught if issubclass(each.category, LaminaWarning)] == []


def test_explain_prints_the_chain():
    result = call("explain", "layer.0.weight", "--step", 9, "--task", TASK)
    assert result.exit_code == 0, result.output
    assert "layer.0.weight at step 9" in result.stdout
    assert "by_depth(0.5)" in result.stdout


def test_tasks_lists_them():
    assert "reviews" in call("tasks").stdout


def test_version():
    assert call("--version").stdout == f"lamina {__version__}\n"


# -------------------------------------------------------------------------------------------- bad

RULE = 'optimizer = "AdamW"\nlr = 0.1\n[[rule]]\n'


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (RULE + 'match = "layr.{depth}.*"\nlr = 1.0\n', ["plan.toml", "layr.{depth}.*", "layer.0"]),
        (RULE + 'match = "head.*"\nmomentun = 0.9\n', ["plan.toml", "momentun", "head.*"]),
        (RULE + 'match = "head.*"\nthaw = "2 weeks"\n', ["plan.toml: rule 1", "thaw", "2 weeks"]),
        (RULE + 'match = "head.*"\nlr = -1.0\n', ["plan.toml: rule 1", "lr", "-1"]),
        (RULE + 'match = "head.*"\nlr = nan\n', ["plan.toml: rule 1", "lr", "nan"]),
        ('optimizer = "AdamW"\nlr = -0.1\n', ["plan.toml", "lr"]),
        ('optimizer = "AdamV"\nlr = 0.1\n', ["plan.toml", "AdamV", "AdamW"]),
        ("optimizer: AdamW\nlr: 3\n", ["plan.toml", "not TOML", "line 1"]),
        ("lr = 3\n", ["plan.toml", "'optimizer' is missing"]),
        (RULE + 'match = "head.*"\nschedule = "cosin()"\n', ["plan.toml: rule 1", "cosin"]),
    ],
)
@pytest.mark.parametrize("command", ["run", "show"])
def test_bad_plans(command, text, parts):
    plan = plan_file(text)
    args = ["run", TASK, plan, "--cpu"] if command == "run" else ["show", plan, "--task", TASK]
    check_one_paragraph(call(*args), *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("def model(): ...\ndef data(): ...\n", ["task.py", "'loss' is missing"]),
        ("import no_such_package_here\n", ["task.py, line 1", "pip install no_such_package_here"]),
        ("x = 1\ndef model(:\n", ["task.py, line 2", "SyntaxError"]),
        ("x = 1\n\n1 / 0\n", ["task.py, line 3", "ZeroDivisionError: division by zero"]),
        ("raise SystemExit('no')\n", ["task.py, line 1", "SystemExit"]),
        (
            "from training_task import *\ndef model():\n    open('weights.bin')\n",
            ["task.py, line 3", "model()", "weights.bin"],
        ),
        (
            "from training_task import *\ndef data():\n    import no_such_package_here\n",
            ["task.py, line 3", "data()", "no_such_package_here"],
        ),
    ],
)
def test_bad_task_files(text, parts):
    check_one_paragraph(call("run", task_file(text), "--cpu"), *parts)


def test_an_interrupted_download(monkeypatch):
    def fetch(*_, **__):
        raise TaskError("the sentence encoder was not fetched: the connection was lost. Try again.")

    monkeypatch.setattr("task_helpers.fetch.fetch", fetch)
    check_one_paragraph(call("run", "--cpu"), "the connection was lost", "Try again")
    check_one_paragraph(call("show"), "the connection was lost")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["run", "review"], ["there is no task 'review'", "Did you mean 'reviews'"]),
        (["run", "gone.py"], ["gone.py", "no such task file"]),
        (["run", "plan.toml"], ["no task is named", "lamina run reviews plan.toml"]),
        (["run", TASK, "gone.toml"], ["gone.toml", "no such plan file"]),
        (["run", TASK, "--cpu", "--epochs", "nan"], ["epochs=nan"]),
        (["run", TASK, "--cpu", "--mixed-precision", "fp16"], ["mixed_precision='fp16'"]),
        (["run", TASK, "--cpu", "--out", TASK], ["is a file", "--out"]),
        (["run", TASK, "--cpu", "--out", "/proc/nothing"], ["/proc/nothing", "--out"]),
        (["show", "--task", TASK, "--epochs", "1", "--steps", "2"], ["pass one"]),
        (["show", "--task", TASK, "--steps", "0"], ["steps=0"]),
        (["show", "--task", TASK, "--plot", "a/b.png"], ["--plot a/b.png"]),
        (["show", "--task", TASK, "--plot", "b.xyz"], ["--plot b.xyz"]),
        (["explain", "layer.0.wieght", "--task", TASK], ["layer.0.wieght", "layer.0.weight"]),
    ],
)
def test_bad_arguments(args, parts):
    check_one_paragraph(call(*args), *parts)


@pytest.mark.parametrize("package", ["accelerate", "matplotlib"])
def test_a_missing_package_names_its_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    result = call("run", TASK, "--cpu")
    check_one_paragraph(result, package, "pip install 'lamina[train]'")


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_extra_cli(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "pip install 'lamina[cli]'" in capsys.readouterr().err


def test_main_runs_the_app(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lamina", "--version"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"lamina {__version__}\n"


# ------------------------------------------------------------------------------------ interrupted


def test_ctrl_c_inside_the_loss():
    text = (
        "from training_task import *\nimport training_task\ncalls = []\n"
        "def loss(model, batch):\n    calls.append(1)\n    if len(calls) == 5:\n"
        "        raise KeyboardInterrupt\n    return training_task.loss(model, batch)\n"
    )
    result = call("run", task_file(text), "--cpu", "--out", "made")
    assert result.exit_code == 130
    assert "interrupted after step 4" in result.stderr
    assert "lamina run --resume made" in result.stderr
    assert saved("made")["clock"] == 4
    rows = [json.loads(line) for line in Path("made/metrics.jsonl").read_text().splitlines()]
    assert sum(row["kind"] == "step" for row in rows) == 4


def test_ctrl_c_before_the_first_step():
    text = "from training_task import *\ndef model():\n    raise KeyboardInterrupt\n"
    result = call("run", task_file(text), "--cpu")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert not Path("runs").exists()


def test_ctrl_c_from_outside_lets_the_step_finish():
    text = (
        "from training_task import *\nimport time, training_task\nDEFAULTS = {'epochs': 10000}\n"
        "def loss(model, batch):\n    time.sleep(0.01)\n"
        "    return training_task.loss(model, batch)\n"
    )
    command = [sys.executable, "-m", "lamina", "run", task_file(text), "--cpu", "--out", "made"]
    process = subprocess.Popen(
        command,
        env={**ENV, "PYTHONPATH": SEEN},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = Path("made/metrics.jsonl")
    try:
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.read_text().count("\n") > 5:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "step"]
    assert saved("made")["clock"] == steps[-1] + 1 == len(steps)
    assert [path.name for path in Path("made").glob(".*")] == [".lock"]


# ----------------------------------------------------------------------------- resumed, inspected


STOPPING = (
    "from training_task import *\nimport training_task\ncalls = []\n"
    "def loss(model, batch):\n    calls.append(1)\n    if len(calls) == 5:\n"
    "        raise KeyboardInterrupt\n    return training_task.loss(model, batch)\n"
)


def test_a_run_goes_on_from_its_folder_alone():
    call("run", task_file(STOPPING), "--cpu", "--out", "made", "--save-every", "2 steps")
    task_file("from training_task import *\n")
    result = call("run", "--resume", "made", "--cpu")
    assert result.exit_code == 0, result.output
    assert "step 4: resumed from step-00000004-" in result.stdout
    assert "applied as planned: 14 steps" in result.stdout
    about = json.loads(Path("made/run.json").read_text())
    assert (about["status"], about["save_every"], about["resumed"][0]["step"]) == (
        "finished",
        "2 steps",
        4,
    )
    check_one_paragraph(call("run", "--resume", "made", "--cpu"), "made", "the run is finished")
    longer = ("run", "--resume", "made", "--cpu", "--epochs", 3)
    check_one_paragraph(call(*longer), "planned for 14 steps", "--extend")
    longer = call(*longer, "--extend", "stretch")
    assert longer.exit_code == 0, longer.output
    assert saved("made")["clock"] == 21


def test_inspect_says_what_a_run_holds():
    call("run", TASK, "--cpu", "--out", "made")
    result = call("inspect", "made")
    assert result.exit_code == 0, result.output
    for part in ("checksum OK", "'training_task'", "step 14 of 14", "model.layer.0.weight"):
        assert part in result.stdout


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["inspect", "gone.pt"], ["gone.pt", "no such file"]),
        (["inspect", TASK], [TASK, "not a torch file"]),
        (["inspect", "."], ["no checkpoint here"]),
        (["run", "--resume", "gone"], ["gone", "no such folder"]),
        (["run", TASK, "--resume", "."], ["not the folder of a run", "run.json"]),
        (["run", TASK, "--cpu", "--save-every", "often"], ["'often'", "500 steps"]),
        (["run", TASK, "--cpu", "--keep", "0"], ["keep=0"]),
    ],
)
def test_bad_folders_and_files(args, parts):
    check_one_paragraph(call(*args), *parts)


# ------------------------------------------------------------------------------ several processes


@pytest.mark.slow
def test_two_processes_go_on_with_the_same_bits():
    from test_resume import assert_same

    text = (
        "from resume_task import *\nimport os, resume_task\ncalls = []\n"
        "def loss(model, batch):\n    calls.append(1)\n"
        "    if len(calls) == 11 and 'CUT' in os.environ:\n        os._exit(9)\n"
        "    return resume_task.loss(model, batch)\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    def launch(*args, **environment):
        command = [*launcher, "-m", "lamina", "run", *args, "--cpu"]
        env = {**ENV, "PYTHONPATH": SEEN, **environment}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    task = task_file(text)
    whole = launch(task, "--out", "whole", "--save-every", "3")
    assert whole.returncode == 0, whole.stderr
    assert launch(task, "--out", "cut", "--save-every", "3", CUT="1").returncode != 0
    assert saved("cut")["clock"] < saved("whole")["clock"]
    done = launch("--resume", "cut")
    assert done.returncode == 0, done.stderr
    assert_same("whole", "cut")


@pytest.mark.slow  # gloo's threads abort a process that ends under load, now and then
def test_two_processes_average_exactly():
    """21 held-out points in batches of 8 are uneven over two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "lamina", "run", TASK, "--cpu", "--out", "made"]
    process = subprocess.Popen(
        command,
        env={**ENV, "PYTHONPATH": SEEN},
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
    assert process.returncode == 0, errors
    rows = [json.loads(line) for line in Path("made/metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "validation"][-1]
    model = training_task.model()
    model.load_state_dict(saved("made")["model"])
    batch = training_task.data()["validation"].dataset.tensors
    with torch.no_grad():
        right = training_task.metrics(model, batch)["accuracy"].double().mean().item()
        loss = training_task.loss(model, batch).item()
    assert last["examples"] == len(batch[0]) == 21
    assert last["averages"]["accuracy"] == pytest.approx(right, abs=1e-12)
    assert last["averages"]["loss"] == pytest.approx(loss, rel=1e-6)
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(8))
    assert output.count("accuracy on held-out points") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "a" * 300),
        ("run", TASK, "--resume", "a" * 300),
        ("run", "--resume", "a" * 300),
        ("run", TASK, "--out", "a" * 300),
        ("run", "a" * 300 + ".py"),
    ],
    ids=range(5),
)
def test_a_path_that_is_too_long(arguments):
    check_one_paragraph(call(*arguments), "File name too long")


@pytest.mark.parametrize("command", [("run", TASK, "--cpu"), ("show", "--task", TASK)])
def test_a_run_longer_than_any(command):
    check_one_paragraph(call(*command, "--epochs", "1e308"), "more than 1,000,000,000 steps")


def test_names_of_others_do_not_steer_the_terminal():
    torch.save({"\x1b]0;title\x07": torch.ones(2)}, "x.pt")
    result = call("inspect", "x.pt")
    assert result.exit_code == 0
    assert r"\x1b]0;title\x07 float32 (2,)" in result.stdout
    assert "\x1b" not in result.output
    check_one_paragraph(call("inspect", "\x1b[31mred"), r"\x1b[31mred: there is no such file")


def test_a_resumed_run_announces_only_what_differs():
    plan = Path(TASK)
    assert call("run", plan, "--cpu", "--out", "made", "--epochs", 2).exit_code == 0
    longer = call("run", "--resume", "made", "--cpu", "--epochs", 3, "--extend", "stretch")
    assert longer.exit_code == 0, longer.output
    announced = longer.stdout.split("step 14: resumed")[0]
    assert "Changes from step 14 on:" in announced
    assert "14 steps → 21 steps" in announced
    assert "lr over" not in announced  # the table
    other = plan_file(training_task.PLAN.replace("lr = 1e-2", "lr = 2e-2"))
    length = ("--epochs", 4, "--extend", "stretch")
    changed = call("run", plan, other, "--resume", "made", "--cpu", *length, "--full")
    assert changed.exit_code == 0, changed.output
    assert "Changes from" not in changed.stdout
    assert "lr over" in changed.stdout


def test_a_resumed_run_says_what_another_plan_changes_and_when_nothing_does():
    task = task_file(Path(TASK).read_text())
    assert call("run", task, "--cpu", "--out", "made", "--save-every", "5 steps").exit_code == 0
    for path in Path("made/checkpoints").iterdir():
        if "00000014" in path.name:
            path.unlink()
    about = Path("made/run.json")
    about.write_text(about.read_text().replace('"finished"', '"interrupted"'))
    shutil.copytree("made", "other")
    same = call("run", "--resume", "made", "--cpu").stdout
    assert "No value of its 3 groups changes. To see the whole plan: --full." in same
    head = '\n[[rule]]\nmatch = "head.*"\nlr = 0.5\n'
    changed = call("run", task, plan_file(training_task.PLAN + head), "--resume", "other", "--cpu")
    assert changed.exit_code == 0, changed.output
    announced = changed.stdout.split("step 10: resumed")[0]
    assert "Changes from step 10 on:" in announced
    assert "head.* (2 parameters, 10 numbers)" in announced
    assert "steps 10 to 13" in announced
    assert "layer" not in announced
