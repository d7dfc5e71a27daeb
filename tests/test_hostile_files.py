"""Files from somebody else: no code is run, and nothing takes time or memory beyond their size."""

import io
import json
import zipfile

import pytest
import torch

import lamina as lm
from lamina import checkpoint
from lamina.checkpoint.inspect import inspect
from lamina.files.plain import check_size
from lamina.state.schema import short
from lamina.training.resume import saved_task

EXAMPLES = {"digits": "examples/tasks/digits.py"}


def laughs(levels=40, width=10):
    """Lists in lists: few objects, but `width ** levels` values for who walks through them."""
    value = [1.0] * width
    for _ in range(levels):
        value = [value] * width
    return value


@pytest.mark.parametrize("where", ["state", "group", "top"])
def test_a_small_file_of_endless_lists_is_refused(tmp_path, where):
    path = tmp_path / "state.pt"
    state = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1, momentum=0.9).state_dict()
    if where == "state":
        state["state"][0] = {"momentum_buffer": laughs()}
    elif where == "group":
        state["param_groups"][0]["lr"] = laughs()
    else:
        state = laughs()
    torch.save(state, path)
    assert path.stat().st_size < 10_000
    for read in (checkpoint.load_safely, inspect):
        with pytest.raises(lm.StateError, match="values"):
            read(path)


def test_values_that_are_shared_are_counted_as_often_as_they_are_met():
    check_size({"a": laughs(levels=5), "b": [laughs(levels=4)] * 3}, "here")
    with pytest.raises(lm.StateError, match="here: it holds more than"):
        check_size(laughs(levels=7), "here")
    loop = []
    loop.append({"again": loop})
    check_size(loop, "here")  # and what contains itself does not keep it busy


def test_errors_quote_only_the_beginning_of_endless_values():
    assert len(short(laughs())) <= 60
    assert len(short({"a": laughs()})) <= 60
    assert len(short("x" * 10**6)) <= 60


def archive(path, compression, names=None):
    content = io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, content)
    with zipfile.ZipFile(path, "w", compression) as packed, zipfile.ZipFile(content) as plain:
        for record in plain.infolist():
            packed.writestr(record.filename, plain.read(record.filename))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_checkpoints_are_refused(tmp_path, compression):
    path = tmp_path / "state.pt"
    archive(path, compression)
    for read in (checkpoint.load_safely, checkpoint.read, inspect):
        with pytest.raises(lm.StateError, match="compressed"):
            read(path)
    archive(path, zipfile.ZIP_STORED)
    assert checkpoint.load_safely(path)["a"].shape == (1000,)


def test_records_that_overlap_are_refused(tmp_path):
    path = tmp_path / "state.pt"
    archive(path, zipfile.ZIP_STORED)
    with zipfile.ZipFile(path) as plain:
        largest = max(plain.infolist(), key=lambda record: record.file_size)
    with zipfile.ZipFile(path, "a") as packed:
        for index in range(50):  # 50 names more for the same bytes
            twin = zipfile.ZipInfo(f"archive/data/{index + 10}")
            for key in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(twin, key, getattr(largest, key))
            packed.filelist.append(twin)
            packed.NameToInfo[twin.filename] = twin
        packed._didModify = True  # type: ignore[attr-defined]
    with pytest.raises(lm.StateError, match="overlap"):
        checkpoint.load_safely(path)


@pytest.mark.parametrize(
    "about",
    [
        {"task": "run/other.py"},
        {"task": "./other.py"},
        {"task": "os"},
        {"task": "examples/tasks/digits.py"},
        {"task": "digits", "task_file": "run/other.py"},
        {"task": "digits", "task_file": "other.py"},
        {"task": "digits", "task_file": "../run/other.py"},
        {"task": "digits", "task_file": ""},
        {"task": "digits", "task_file": 3},
        {"task": "digits", "task_file": "/tmp/other.py\0"},
        {"task": "digits", "task_file": ["/tmp/other.py"]},
        {"task": "x" * 10_000},
        {"task": 3},
        {},
    ],
)
def test_no_file_is_run_that_the_user_did_not_name(tmp_path, monkeypatch, about):
    home = tmp_path / "run"
    home.mkdir()
    (home / "other.py").write_text("raise SystemExit('was run')")
    (home / "run.json").write_text(json.dumps(about))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lm.LaminaError, match="--resume") as caught:
        saved_task("run", EXAMPLES)
    assert len(str(caught.value)) < 1000


def test_a_file_by_its_whole_path_outside_of_the_run_is_the_users_own(tmp_path):
    home = tmp_path / "run"
    home.mkdir()
    (home / "link").symlink_to(tmp_path / "own.py")
    for file, fits in [(tmp_path / "own.py", True), (home / "own.py", False)]:
        (home / "run.json").write_text(json.dumps({"task": "own", "task_file": str(file)}))
        if fits:
            assert saved_task(home, EXAMPLES) == str(file)
        else:
            with pytest.raises(lm.TaskError, match="in the folder of the run"):
                saved_task(home, EXAMPLES)
    (home / "run.json").write_text(json.dumps({"task": "digits", "task_file": None}))
    assert saved_task(home, EXAMPLES) == "digits"
