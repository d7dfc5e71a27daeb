"""lamina watch SCRIPT: scripts of all kinds, their exit codes, and what is written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lamina.cli.app import app
from lamina.record import METRICS, Record
from lamina.watch.layers import layers_of
from lamina.watch.script import run_script

pytestmark = pytest.mark.usefixtures("little_to_search")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
LOOP = """
import sys, torch
torch.manual_seed(0)
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for number in range(6):
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """In an empty folder; what a script changes in this process is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lamina"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    # Of a process that was one of several in another test, torch's hook marks each line.
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)


def script(text, name="train.py"):
    Path(name).write_text(text)
    return name


def call(*args):
    return CliRunner().invoke(app, ["watch", *map(str, args)])


def found(folder="seen"):
    return [row["code"] for row in json.loads(Path(folder, "findings.json").read_text())]


def test_findings_record_and_exit_code():
    result = call("--out", "seen", script(LOOP + "print('done')\nsys.exit(3)"))
    assert result.exit_code == 3
    assert result.stdout == "done\n"
    assert "problem: gradients-accumulate" in result.stderr
    assert "6 optimizer steps" in result.stderr
    assert found() == ["gradients-accumulate"]
    record = Record.load("seen/metrics.jsonl")
    assert len(record.series("group 0", "update_norm")[0]) == 6
    assert [each.code for each in record.findings] == ["gradients-accumulate"]
    assert "gradients-accumulate" in Path("seen/report.html").read_text()
    again = CliRunner().invoke(app, ["report", "seen", "--out", "again.html"])
    assert again.exit_code == 0, again.stderr
    assert "train.py" in Path("again.html").read_text()


def test_the_mistakes_of_the_example():
    text = (Path(__file__).parents[1] / "examples" / "three_mistakes.py").read_text()
    result = call("--out", "seen", script(text.replace("WORDS = 150", "WORDS = 25")))
    assert result.exit_code == 0
    mistakes = ["floor-raises-lr", "module-requires-grad", "parameter-replaced"]
    assert found() == [*mistakes, "weight-decay-everywhere"]
    record = Record.load("seen/metrics.jsonl")
    assert len(record.series("group 2", "lr")[0]) == 25  # no gradient ever came there
    assert not len(record.series("group 2", "ratio")[0])
    assert (record.series("group 0", "ratio")[1] > 0).all()
    assert (record.series(METRICS, "ratio/encoder.layers.0.linear1")[1] > 0).all()
    shown = Path("seen/report.html").read_text()
    assert "Update over weight by layer" in shown
    assert '"rows":["embeddings","encoder.layers.0.self_attn","' in shown.replace('", "', '","')
    place = {code: shown.index(f": <code>{code}</code>") for code in found()}
    assert max(place[code] for code in mistakes) < place["weight-decay-everywhere"]
    assert '<li class="advice">' in shown


def test_layers_are_modules_or_what_holds_them():
    names = [f"encoder.{layer}.{part}.weight" for layer in range(12) for part in "abcdef"]
    layers = layers_of([*names, "head.weight", "scale"])
    assert layers["encoder.3.a.weight"] == "encoder.3"
    assert layers["head.weight"] == "head"
    assert layers["scale"] == "scale"
    assert len(set(layers.values())) == 14
    assert layers_of(names, most=100)["encoder.3.a.weight"] == "encoder.3.a"
    assert layers_of(["weight", "bias"]) == {"weight": "weight", "bias": "bias"}
    assert layers_of(["0.weight", "0.bias"]) == {}
    assert layers_of([f"{number}.weight" for number in range(50)]) == {}
    assert layers_of([]) == {}


def test_the_script_sees_what_it_sees_under_python():
    Path("beside.py").write_text("VALUE = 7")
    text = """
import argparse, pickle, sys, beside
parser = argparse.ArgumentParser()
parser.add_argument("--out"), parser.add_argument("-m", type=int), parser.add_argument("rest")
class Here: pass
assert type(pickle.loads(pickle.dumps(Here()))) is Here
print(vars(parser.parse_args()), __name__, __file__, sys.argv, beside.VALUE)
"""
    words = ["--out", "mine", "-m", "3", "more"]
    result = call("--out", "seen", script(text), *words)
    given = {"out": "mine", "m": 3, "rest": "more"}
    path = os.path.abspath("train.py")
    assert result.stdout == f"{given} __main__ {path} {['train.py', *words]} 7\n"
    assert result.exit_code == 0
    assert "No step of a torch optimizer was seen." in result.stderr


def test_a_module():
    Path("package").mkdir()
    script(LOOP + "print(__name__, __package__, sys.argv[1:])", "package/train.py")
    script("", "package/__init__.py")
    result = call("-m", "--out", "seen", "package.train", "--lr", "1")
    assert result.stdout == "__main__ package ['--lr', '1']\n"
    assert found() == ["gradients-accumulate"]


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("raise KeyError('gone')", 1, "KeyError: 'gone'"),
        ("sys.exit('no data')", 1, "no data"),
        ("sys.exit()", 0, ""),
        ("raise KeyboardInterrupt", 130, "the script was interrupted"),
    ],
)
def test_however_it_ends_findings_are_told(ending, code, said):
    result = call("--out", "seen", script(LOOP + ending))
    assert result.exit_code == code
    assert said in result.stderr
    assert "gradients-accumulate" in result.stderr
    assert found() == ["gradients-accumulate"]


def test_a_traceback_begins_at_the_script():
    result = call("--out", "seen", script("def fail():\n    1 / 0\nfail()\n"))
    lines = result.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1].endswith('train.py", line 3, in <module>')
    assert "runpy" not in result.stderr
    assert "ZeroDivisionError" in result.stderr


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["missing.py"], ["missing.py: there is no such file", "other.py", "lamina watch -m"]),
        (["folder"], ["folder: is a folder"]),
        (["--out", "full", "other.py"], ["full: the folder is not empty"]),
    ],
)
def test_what_cannot_be_watched_is_one_paragraph(words, parts):
    script("print('ran')", "other.py")
    Path("folder").mkdir()
    Path("full").mkdir()
    Path("full/x").touch()
    result = call(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("lamina: ")
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr
    assert not Path("runs").exists()


def test_a_module_that_is_missing_fails_as_a_script_does():
    result = call("--out", "seen", "-m", "no_such_module_here")
    assert result.exit_code == 1
    assert "No module named no_such_module_here" in result.stderr


def test_other_ranks_write_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    result = call("--out", "seen", script(LOOP + "print('done')"))
    assert result.stdout == "done\n"
    assert result.stderr == ""
    assert not Path("seen").exists()


def test_names_with_control_characters_are_escaped():
    text = LOOP.replace(
        "model.parameters()", "[{'params': model.parameters(), 'name': '\\x1b[2J'}]"
    )
    result = call("--out", "seen", script(text.replace("lr=0.1", "lr=0.0")))
    assert "lr-zero" in result.stderr
    assert "\x1b" not in result.stderr


def test_the_record_is_saved_while_the_script_runs(monkeypatch):
    monkeypatch.setattr("lamina.cli.watch._SAVE_EVERY", -1.0)
    text = LOOP + "import pathlib; print(pathlib.Path('seen/metrics.jsonl').exists())"
    assert call("--out", "seen", script(text)).stdout == "True\n"


def test_an_error_in_the_end_does_not_change_the_exit_code(monkeypatch):
    class Closed:
        def write(self, text):
            raise ValueError("closed")

    seen = []

    def ended(what):
        seen.append(what.steps)
        monkeypatch.setattr(sys, "stderr", Closed())
        print("a summary", file=sys.stderr)

    assert run_script(script(LOOP + "sys.exit(4)"), (), False, ended) == 4
    assert seen == [6]


def test_a_folder_that_is_gone_in_the_end():
    text = LOOP + "import shutil; shutil.rmtree('seen'); print('done')"
    result = call("--out", "seen", script(text))
    assert (result.exit_code, result.stdout) == (0, "done\n")
    assert "gradients-accumulate" in result.stderr
    assert "cannot be written" in result.stderr
    assert "Traceback" not in result.stderr


def test_os_exit_does_not_lose_what_was_seen(monkeypatch):
    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    result = call("--out", "seen", script(LOOP + "import os; os._exit(5)"))
    assert "Left: 5" in result.stderr
    assert result.stderr.count("lamina watch:") == 1
    assert found() == ["gradients-accumulate"]
    assert os._exit is leave


# --- processes ---------------------------------------------------------------------------------

PROCESSES = (
    LOOP
    + """
import multiprocessing, os
from torch.utils.data import DataLoader

def work(number):
    other = torch.nn.Linear(1, 1)
    step = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 1)).sum().backward()
    step.step()

if __name__ == "__main__":
    list(DataLoader(torch.arange(8), num_workers=2))
    for kind in ("fork", "spawn"):
        process = multiprocessing.get_context(kind).Process(target=work, args=(1,))
        process.start()
        process.join()
        assert process.exitcode == 0, kind
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    print("parent" if child else "child", flush=True)
    os._exit(5 if child else 6)
"""
)


def lamina(*words, **settings):
    command = [sys.executable, "-m", "lamina", "watch", *words]
    return subprocess.run(
        command, env=ENV, capture_output=True, text=True, timeout=120, check=False, **settings
    )


@pytest.mark.slow
def test_workers_forks_and_os_exit():
    result = lamina("--out", "seen", script(PROCESSES))
    assert result.returncode == 5, result.stderr
    assert result.stdout == "child\nparent\n"
    assert result.stderr.count("lamina watch:") == 1
    assert "6 optimizer steps" in result.stderr
    assert found() == ["gradients-accumulate"]


def test_without_plotly_the_rest_is_written(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    result = call("--out", "seen", script(LOOP))
    assert result.exit_code == 0
    assert "lamina[report]" in result.stderr
    assert found() == ["gradients-accumulate"]
    assert not Path("seen/report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)]
)
def test_ctrl_c_and_sigterm(number, code):
    text = LOOP + "import time\nprint('ready', flush=True)\ntime.sleep(60)"
    command = [sys.executable, "-m", "lamina", "watch", "--out", "seen", script(text)]
    with subprocess.Popen(
        command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "gradients-accumulate" in said
    assert found() == ["gradients-accumulate"]


SAVING = """
import sys, torch
from torch import nn
torch.manual_seed(0)
parts = [nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2)]
model = nn.Sequential(*parts)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=30)
scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
for number in range(60):
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(16, 8)).square().mean() / 2
    scaler.scale(loss).backward()
    if number % 2:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
torch.save([model.state_dict(), torch.get_rng_state()], sys.argv[1])
"""


@pytest.mark.slow
def test_same_weights_and_random_numbers_in_processes_of_their_own():
    plain = [sys.executable, script(SAVING), "plain.pt"]
    subprocess.run(plain, env=ENV, check=True, timeout=120)
    result = lamina("--out", "seen", "train.py", "watched.pt")
    assert result.returncode == 0, result.stderr
    assert [code for code in found() if code != "clip-never"] == []
    (one, state), (other, its_state) = torch.load("plain.pt"), torch.load("watched.pt")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(state, its_state)


DISTRIBUTED = """
import os, sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(4, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
for number in range(20):
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    for _ in range(dist.get_world_size()):
        scheduler.step()
print(dist.get_rank())
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_torchrun():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", "lamina", "watch"]
    result = subprocess.run(
        [*command, "--out", "seen", script(DISTRIBUTED)],
        env=ENV, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.replace("\n", "")) == ["0", "1"]  # both write at once
    assert found() == ["scheduler-per-process"]
