"""`lamina run` in several processes: killed and resumed with another number; disagreement."""

import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

import lamina as lm
from lamina import checkpoint
from lamina.errors import LaminaError
from lamina.runtime.agreement import compare, describe_plan
from lamina.training import fit
from lamina.training.dealing import Dealing
from lamina.training.devices import naming_lost_processes
from processes import free_port, join_group, leave_group, run_processes

#: what the order in which gradients are summed may change
TOLERANCE = 1e-5

TASK = '''
import os, signal
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

PLAN = """
optimizer = "AdamW"
lr = 1e-2
eps = 1e-3
schedule = "warmup(10%) >> cosine(to=0.01)"
clip_norm = 1.0
feedback = "plateau('val_loss', factor=0.5, patience=0, threshold=0.5)"
[[rule]]
match = "block.{depth}.*"
lr = "by_depth(0.5)"
thaw = "top_down(every=5 steps)"
"""
DEFAULTS = {"epochs": 3, "seed": 3}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)) for _ in range(3)
        )
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        for block in self.block:
            x = x + block(x)
        return self.head(x)


def model():
    return Net()


def points(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator)
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())


def data():
    size = int(os.environ.get("SIZE", 4))
    return {
        "train": DataLoader(points(48, 0), size, shuffle=True),
        "validation": DataLoader(points(21, 1), 8),
    }


calls = []


def loss(model, batch):
    calls.append(1)
    if model.training and len(calls) == int(os.environ.get("DIES", -1)):
        os.kill(os.getpid(), signal.SIGKILL)
    return functional.cross_entropy(model(batch[0]), batch[1])


def metrics(model, batch):
    return {"accuracy": (model(batch[0]).argmax(1) == batch[1]).float()}
'''


@pytest.fixture(autouse=True)
def _without_picture(monkeypatch):
    """Drawing takes most of the time of a run this short."""
    monkeypatch.setattr("lamina.training.run_folder.RunFolder.picture", lambda *_: None)


def work(rank, folder, world, port, environment, settings):
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    os.environ.update({key: str(value) for key, value in variables.items()})
    torch.set_num_threads(1)
    os.chdir(folder)
    own = settings.get(rank, {}) | {k: v for k, v in settings.items() if isinstance(k, str)}
    fit("task.py", cpu=True, **own)


def run(folder, world, environment=None, **settings):
    (folder / "task.py").write_text(TASK)
    given = {"world": world, "port": free_port(), "environment": environment or {}}
    run_processes(partial(work, **given, settings=settings), folder, count=world)


def newest(folder):
    return checkpoint.newest(Path(folder) / "checkpoints")


def rates(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["lr"] for line in lines if line["kind"] == "step"}


def assert_same(one, other):
    """The last weights, the state of the optimizer and all rates of two runs."""
    first, second = newest(one).content, newest(other).content
    assert first["clock"] == second["clock"] == 18
    for name, weight in first["model"].items():
        torch.testing.assert_close(second["model"][name], weight, rtol=TOLERANCE, atol=TOLERANCE)
    for number, state in first["optimizer"]["state"].items():
        for key, value in state.items():
            found = second["optimizer"]["state"][number][key]
            torch.testing.assert_close(found, value, rtol=1e-4, atol=TOLERANCE)
    assert rates(one) == rates(other)
    assert len(rates(one)) == 18


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run in one process, with batches of double size."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "task.py").write_text(TASK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIZE", "8")
        fit(folder / "task.py", cpu=True, save_every="2 steps", out=folder / "run")
    return folder / "run"


def killed(folder, fsdp):
    """Return the folder of a run of two processes of which one was killed in its 9th step."""
    with pytest.raises(Exception, match=r"SIGKILL|terminated"):
        run(folder, 2, {"DIES": 9}, out="run", save_every="2 steps", fsdp=fsdp)
    found = newest(folder / "run")
    assert 2 <= found.content["clock"] <= 8
    return folder / "run"


@pytest.mark.parametrize(
    ("fsdp", "world"),
    [
        (True, 1),
        pytest.param(False, 1, marks=pytest.mark.slow),
        *(pytest.param(f, w, marks=pytest.mark.slow) for f in (True, False) for w in (2, 4)),
    ],
)
def test_killed_with_two_processes_and_resumed_with_others(fsdp, world, whole, tmp_path):
    home = killed(tmp_path, fsdp)
    path = newest(home).path
    assert path.with_suffix(".shards").exists() == fsdp
    if world == 1:
        fit(tmp_path / "task.py", cpu=True, resume=home)
    else:
        run(tmp_path, world, resume="run")
    assert_same(whole, home)
    about = json.loads((home / "run.json").read_text())
    assert about["status"] == "finished"
    assert about["processes"] == world


# ----------------------------------------------------------------------------- damage and refusals


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Return a run of two processes that shard their model, to its end."""
    folder = tmp_path_factory.mktemp("sharded")
    run(folder, 2, out="run", save_every="2 steps", fsdp=True)
    return folder


def copied(sharded, folder):
    shutil.copytree(sharded, folder / "copy")
    return folder / "copy" / "run"


def test_a_sharded_run_is_the_same_run(sharded, whole):
    assert_same(whole, sharded / "run")


def test_only_shards_of_checkpoints_that_are_kept_stay(sharded):
    folder = sharded / "run" / "checkpoints"
    files = {path.stem.replace("best-", "step-") for path in folder.glob("*.pt")}
    assert {path.stem for path in folder.glob("*.shards")} == files
    assert not list(folder.glob(".saving*"))


@pytest.mark.parametrize("damage", ["changed", "shortened", "missing", "no folder", "other name"])
def test_damaged_shards_are_passed_over_and_set_aside(damage, sharded, tmp_path):
    home = copied(sharded, tmp_path)
    last = newest(home).path
    shards = last.with_suffix(".shards")
    part = shards / "__1_0.distcp"
    content = bytearray(part.read_bytes())
    if damage == "changed":
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    elif damage == "shortened":
        part.write_bytes(content[:-1])
    elif damage == "missing":
        part.unlink()
    elif damage == "no folder":
        shutil.rmtree(shards)
    else:
        part.rename(shards / "__7_0.distcp")
    with pytest.raises(LaminaError, match=f"{last.name}: the checkpoint is damaged: its tensors"):
        checkpoint.read(last)
    found = newest(home)
    assert found.content["clock"] == 16
    assert last in found.damaged
    if damage != "changed":  # one resume is enough
        return
    result = fit(home.parent / "task.py", cpu=True, resume=home)
    assert result.steps == 18
    assert last.with_name(f"{last.name}.damaged").exists()


def test_a_checkpoint_that_names_other_files_reads_none_of_them(sharded, tmp_path):
    home = copied(sharded, tmp_path)
    last = newest(home).path
    content = torch.load(last, weights_only=True)
    content["shards"] = {"../../run.json": "0" * 64}
    content.pop("format")
    path = checkpoint.save(last.parent, 19, content)
    with pytest.raises(LaminaError, match="its tensors lie in"):
        checkpoint.read(path)


def test_what_a_kill_left_half_written_is_removed(sharded, tmp_path):
    home = copied(sharded, tmp_path)
    folder = home / "checkpoints"
    for name in (".saving-shards", "step-00000017-0123456789abcdef.shards"):
        (folder / name).mkdir()
        (folder / name / "__0_0.distcp").write_bytes(b"half")
    path = newest(home).path
    for last in folder.glob(f"*{path.stem[4:]}.pt"):
        last.unlink()
    fit(home.parent / "task.py", cpu=True, resume=home)
    names = {each.stem for each in folder.glob("*.shards")}
    assert "step-00000017-0123456789abcdef" not in names
    assert not (folder / ".saving-shards").exists()


def test_torch_reads_the_shards(sharded):
    """The layout is that of torch's own functions."""
    from torch.distributed.checkpoint import FileSystemReader

    found = newest(sharded / "run")
    saved = FileSystemReader(found.path.with_suffix(".shards")).read_metadata()
    names = set(saved.state_dict_metadata)
    assert {"model.head.weight", "optimizer.state.head.weight.exp_avg"} <= names


@pytest.mark.parametrize(
    ("batches", "processes", "expected"),
    [
        (1, 1, Dealing(1, 1)),
        (2, 1, Dealing(2, 1)),
        (2, 2, Dealing(1, 1)),
        (2, 4, Dealing(1, 2)),
        (6, 4, Dealing(3, 2)),
        (4, 3, Dealing(4, 3)),
        (8, 2, Dealing(4, 1)),
    ],
)
def test_a_step_has_the_same_examples(batches, processes, expected):
    dealing = Dealing.of(batches, processes)
    assert dealing == expected
    assert dealing.accumulate * processes == batches * dealing.parts


def loaders():
    data = TensorDataset(torch.arange(12))
    own = BatchSampler(range(12), 4, drop_last=False)
    own.__class__ = type("Own", (BatchSampler,), {})
    yield DataLoader(data, 3), "a batch of 3 cannot be cut into 2 equal parts"
    yield DataLoader(data, batch_sampler=own), "makes the batches itself"
    yield DataLoader(data, batch_size=None), "makes the batches itself"


@pytest.mark.parametrize(("loader", "words"), [*loaders()])
def test_batches_that_cannot_be_cut_are_refused(loader, words):
    before = list(loader)
    with pytest.raises(LaminaError, match=words):
        Dealing(1, 2).cut(loader)
    assert len(list(loader)) == len(before)


def test_a_loader_is_cut_in_its_order():
    loader = DataLoader(TensorDataset(torch.arange(10)), 4)
    Dealing(1, 2).cut(loader)
    assert [batch[0].tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_another_number_of_processes_needs_whole_parts(sharded, tmp_path, monkeypatch):
    """Batches of 4 cannot be cut into 3."""
    home = copied(sharded, tmp_path)
    monkeypatch.setattr("lamina.training.resume.launched", lambda: (3, "a test"))
    with pytest.raises(LaminaError, match="a batch of 4 cannot be cut into 3 equal parts"):
        fit(home.parent / "task.py", cpu=True, resume=home)


# ---------------------------------------------------------------------- different on each process


def disagree(rank, folder, world, port, what):
    plan = "optimizer = 'SGD'\nlr = 0.1\n"
    epochs = 2
    if what == "plan" and rank == 1:
        plan = plan.replace("0.1", "0.2")
    if what == "settings" and rank == 1:
        epochs = 3
    settings = {"plan": plan, "epochs": epochs, "out": "run"}
    with pytest.raises(LaminaError) as caught:
        work(rank, folder, world, port, {}, settings)
    Path(folder, f"{rank}.txt").write_text(str(caught.value))


@pytest.mark.parametrize("what", ["plan", pytest.param("settings", marks=pytest.mark.slow)])
def test_processes_with_different_plans_are_refused(what, tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    run_processes(partial(disagree, world=2, port=free_port(), what=what), tmp_path)
    texts = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert f"process 0 was given another {what} than process 1" in texts[0]
    assert f"process 1 was given another {what} than process 0" in texts[1]
    if what == "plan":
        assert "'lr = 0.1' against 'lr = 0.2'" in texts[0]
    assert not (tmp_path / "run").exists()


def build(rank, folder):
    """Build different plans one after the other, then the same, then one for another model."""
    join_group(rank, folder)
    model, first = torch.nn.Linear(3, 2), Path(folder, "first")
    told = []
    if rank == 1:
        while not first.exists():
            time.sleep(0.01)
    try:
        optimizer = lm.Plan(lm.SGD, lr=0.1 * (rank + 1)).build(model, steps=5)
    except LaminaError as error:
        told.append(str(error))
        Path(folder, "second").touch()
    else:
        first.touch()
        while not Path(folder, "second").exists():
            time.sleep(0.01)
        model(torch.ones(1, 3)).sum().backward()
        before = model.weight.detach().clone()
        with pytest.raises(LaminaError) as caught:
            optimizer.step()
        told.append(str(caught.value))
        assert torch.equal(model.weight, before)
    torch.distributed.barrier()
    lm.Plan(lm.SGD, lr=0.1).build(torch.nn.Linear(3, 2), steps=5)
    torch.distributed.barrier()
    # Stages of a pipeline: each process has parameters of its own, and may have a plan of its own.
    stage = torch.nn.ModuleDict({f"stage{rank}": torch.nn.Linear(3, 2)})
    lm.Plan(lm.SGD, lr=0.1 * (rank + 1)).build(stage, steps=5)
    Path(folder, f"{rank}.txt").write_text("\n".join(told))
    leave_group()


def test_a_build_with_another_plan_is_refused_without_waiting(tmp_path):
    run_processes(build, tmp_path)
    texts = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert "process 1 was given another plan than process 0" in texts[1]
    assert "process 0 was given another plan than process 1" in texts[0]


def test_another_length_is_told():
    mine = {"plan": "lr = 1", "steps": "10"}
    with pytest.raises(LaminaError, match=r"another steps than process 3: '10' against '12'"):
        compare(mine, mine | {"steps": "12"}, 0, 3)
    compare(mine, dict(mine), 0, 3)
    with pytest.raises(LaminaError, match="'b = 2' against 'no such line'"):
        compare({"plan": "a = 1\nb = 2"}, {"plan": "a = 1"}, 0, 1)


def test_functions_count_by_name():
    def falling(step):
        return 1 / (1 + step)

    texts = [
        describe_plan(lm.Plan(lm.SGD, lr=0.1, schedule=lm.from_function(falling))) for _ in range(2)
    ]
    assert texts[0] == texts[1]
    assert "0x" not in texts[0]["plan"]


# ------------------------------------------------------------------------------- a process is lost


@pytest.mark.parametrize(
    "text",
    [
        "[third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer",
        "Connection closed by peer [127.0.0.1]:4513",
    ],
)
def test_a_broken_connection_is_named(text):
    accelerator = SimpleNamespace(process_index=0, num_processes=2)
    message = r"process 0 of 2 lost another one.*--resume"
    with pytest.raises(LaminaError, match=message), naming_lost_processes(accelerator):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="shapes"), naming_lost_processes(accelerator):
        raise RuntimeError("shapes do not fit")


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_a_run_ends_soon_with_a_message_if_a_process_dies(fsdp, tmp_path):
    text = TASK.replace("model.training and len", "os.environ['RANK'] == '1' and len")
    (tmp_path / "task.py").write_text(text)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--out", "run", "--cpu", "--save-every", "2 steps", *["--fsdp"] * fsdp]
    environment = {"DIES": "9", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [*launcher, "--local-addr=127.0.0.1", "-m", "lamina", "run", "task.py", *options],
        cwd=tmp_path,
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode != 0
    own = [line for line in ended.stderr.splitlines() if line.startswith("lamina: ")]
    assert any("lost another one" in line or "interrupted" in line for line in own)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] != "running"
    assert newest(tmp_path / "run").content["clock"] >= 2


def test_sharing_the_model_with_nobody_is_told(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    with pytest.warns(lm.LaminaWarning, match=r"fsdp=True was given, but one process.*torchrun"):
        result = fit(tmp_path / "task.py", cpu=True, out=tmp_path / "run", epochs=1, fsdp=True)
    assert result.steps == 12
    fit(tmp_path / "task.py", cpu=True, resume=tmp_path / "run", epochs=2, extend="hold")
