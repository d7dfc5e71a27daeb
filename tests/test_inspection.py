"""`lamina inspect`: what a file holds, in words, and one paragraph for what cannot be read."""

from pathlib import Path

import pytest
import torch

import training_task
from lamina import StateError, checkpoint
from lamina.checkpoint.inspect import inspect
from lamina.training import fit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch and a step: layer.0 never trained."""
    out = tmp_path_factory.mktemp("inspected") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lamina.training.run_folder.RunFolder.picture", lambda *_: None)
        plan = training_task.PLAN.replace("0.4 epochs", "1 epochs")
        fit(training_task, plan, out=out, cpu=True, save_every=8, keep=9)
    return out


def of_step(run, step):
    (path,) = (run / "checkpoints").glob(f"step-{step:08d}-*")
    return path


def test_a_run(run):
    path = of_step(run, 8)
    content = checkpoint.read(path)
    text = inspect(path)
    averages = content["validation"]["averages"]
    model = content["model"].values()
    for part in (
        str(path),
        "checksum OK",
        "a run of task 'training_task' (format 1, 1 process)",
        "step 8 of 14 · epoch 2, batch 1 · ",
        f"last validation, at step 7: accuracy {averages['accuracy']:.4g}",
        "best val_loss so far: ",
        "seed 3",
        f"torch {torch.__version__}",
        f"model: 6, {sum(p.numel() for p in model):,} elements, ",
        f"{sum(p.numel() * 4 for p in model)} bytes",
        "model.layer.0.weight float32 (4, 4)",
        "layer.0.* · AdamW · 2 parameters · lr 0 (frozen)",
        f"head.* · AdamW · 2 parameters · lr {content['optimizer']['param_groups'][-1]['lr']:.4g}"
        if content["optimizer"]["param_groups"][-1]["name"] == "head.*"
        else "default · AdamW · 2 parameters · lr ",
        '  optimizer = "AdamW"',
        "  [[rule]]",
    ):
        assert part in text
    assert content["model"].keys() == training_task.model().state_dict().keys()


def test_a_folder_means_its_newest(run):
    assert inspect(run).splitlines()[0] == str(of_step(run, 14))
    assert inspect(run / "checkpoints") == inspect(run)


def test_a_damaged_one_is_named_and_passed_over(run, tmp_path):
    for path in (run / "checkpoints").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    bad = tmp_path / of_step(run, 14).name
    bad.write_bytes(bad.read_bytes()[:-1])
    lines = inspect(tmp_path).splitlines()
    assert lines[0] == f"{bad.name}: checksum WRONG: the file is damaged"
    assert lines[2] == "checksum OK"
    with pytest.raises(StateError, match="is damaged"):
        inspect(bad)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (training_task.model().state_dict(), ["the state of a model", "model: 6, 50 elements"]),
        (
            torch.optim.SGD(training_task.model().parameters(), lr=0.5).state_dict(),
            ["the state of an optimizer", "group 0 · 6 parameters · lr 0.5"],
        ),
        ([torch.zeros(3)], ["not a state: the file holds a list", "1, 3 elements, 12 bytes"]),
        (torch.zeros(2), ["holds a tensor of shape (2,)"]),
        ({"epoch": 3, "net": {"w": torch.zeros(2)}}, ["holds: epoch, net", "net: 1, 2 elements"]),
        ({}, ["holds: nothing", "no tensors"]),
    ],
)
def test_other_files(tmp_path, content, parts):
    torch.save(content, tmp_path / "file.pt")
    text = inspect(tmp_path / "file.pt")
    for part in ("checksum not in the file name", *parts):
        assert part in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state": 3, "param_groups": 4}, "its parts are not what they should be"),
        ({"state": {}, "param_groups": [{}]}, "its parts are not what they should be"),
        (dict.fromkeys(("format", "task", "clock", "model", "optimizer")), "not what they should"),
    ],
)
def test_files_changed_by_hand(tmp_path, content, message):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(StateError, match=message):
        inspect(tmp_path / "file.pt")


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(StateError, match="there is no such file"):
        inspect(tmp_path / "gone.pt")
    with pytest.raises(StateError, match="there is no checkpoint here"):
        inspect(tmp_path)
    Path(tmp_path / "text.pt").write_text("text")
    with pytest.raises(StateError, match="not a torch file"):
        inspect(tmp_path / "text.pt")


def described(tmp_path, content):
    path = tmp_path / "x.pt"
    torch.save(content, path)
    return inspect(path)


def in_itself():
    cycle = {"w": torch.ones(2)}
    cycle["again"] = [cycle]
    return cycle


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (in_itself(), "w float32 (2,)"),
        ({"a": torch.ones(10, device="meta")}, "a float32 (10,)"),
        ({"\x1b[31mred\x07": torch.ones(2)}, r"\x1b[31mred\x07 float32 (2,)"),
        ({"a\nb": torch.ones(2)}, r"model.a"),
        *(
            ({"state": {}, "param_groups": [{"params": [0], "lr": lr}]}, f"lr {shown}")
            for lr, shown in [
                (1e-3, "0.001"),
                (torch.tensor(1e-3), "0.001"),
                (torch.ones(2), "a Tensor"),
                (torch.ones((), device="meta"), "a Tensor"),
                (10**400, "1000"),
                ("x", "'x'"),
                ({}, "{}"),
            ]
        ),
    ],
)
def test_what_a_file_may_hold(tmp_path, content, part):
    text = described(tmp_path, content)
    assert part in text
    assert all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor(tmp_path, layout):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    assert "a float32 nested, of 2 tensors" in described(tmp_path, {"a": nested})
    assert "nested, of 2 tensors" in described(tmp_path, nested)


@pytest.mark.parametrize("value", [10**400, torch.ones(2), "x", {}, None])
@pytest.mark.parametrize("key", ["seconds", "validated", "validation", "best", "optimizer"])
def test_a_run_with_a_part_of_another_kind(run, tmp_path, key, value):
    whole = checkpoint.newest(run / "checkpoints").content
    told = ""
    try:
        told = described(tmp_path, {**whole, key: value})
    except StateError as error:
        told = str(error)
    assert "checkpoint of a run" in told or "its parts are not what they should be" in told


def test_a_path_that_is_too_long(tmp_path):
    with pytest.raises(StateError, match=r"cannot be read \(File name too long\)"):
        inspect(tmp_path / ("a" * 300))
