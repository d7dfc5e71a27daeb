"""Files that verify themselves, and reading that runs nothing."""

import errno
import os
import pickle
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from lamina import LaminaError, StateError, checkpoint
from lamina.files import atomic as files

CONTENT = {"clock": 3, "w": torch.arange(4.0), "deep": [1, (2.5, None), {"a": True, 0: "x"}]}


def saved(folder, step=3, **content):
    return checkpoint.save(folder / "c", step, {**CONTENT, **content})


def names(folder):
    return sorted(path.name for path in (folder / "c").iterdir())


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_is_saved_comes_back(tmp_path):
    path = saved(tmp_path)
    content = checkpoint.read(path)
    assert content.pop("format") == checkpoint.FORMAT
    assert torch.equal(content.pop("w"), CONTENT["w"])
    assert content == {key: CONTENT[key] for key in ("clock", "deep")}
    assert path.name.startswith("step-00000003-")
    assert files.digest_of(path).startswith(path.stem.rpartition("-")[2])


def test_every_damaged_byte_is_found(tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert checkpoint.is_whole(path) is False
    for length in (0, 1, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(StateError, match="is damaged"):
            checkpoint.read(path)
    path.write_bytes(whole)
    assert checkpoint.is_whole(path)


def test_the_newest_whole_one_is_found(tmp_path):
    good, bad = saved(tmp_path, 3), saved(tmp_path, 20)
    checkpoint.mark_best(bad)
    damage(bad)
    (tmp_path / "c" / "step-00000099.pt").write_text("not ours")
    (tmp_path / "c" / "notes.txt").write_text("not ours")
    found = checkpoint.newest(tmp_path / "c")
    assert found.path == good
    assert found.damaged == (bad,)
    checkpoint.tidy(tmp_path / "c", found.damaged)
    assert bad.with_name(f"{bad.name}.damaged").exists()
    assert checkpoint.candidates(tmp_path / "c") == [good]


def test_the_best_remains_when_its_first_name_goes(tmp_path):
    best = saved(tmp_path, 1)
    checkpoint.mark_best(best)
    for step in (2, 3, 4):
        checkpoint.prune(tmp_path / "c", 2, saved(tmp_path, step))
    assert [name[:13] for name in names(tmp_path)] == [
        "best-00000001",
        "step-00000003",
        "step-00000004",
    ]
    for path in checkpoint.candidates(tmp_path / "c")[:2]:
        damage(path)
    assert checkpoint.newest(tmp_path / "c").path.name == best.name.replace("step", "best")


def test_the_best_without_hard_links_is_a_copy(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    old, new = saved(tmp_path, 1), saved(tmp_path, 2)
    checkpoint.mark_best(old)
    checkpoint.mark_best(new)
    assert names(tmp_path) == sorted([old.name, new.name, new.name.replace("step", "best")])
    assert checkpoint.is_whole(new.with_name(new.name.replace("step", "best")))


def test_the_one_just_saved_is_kept_whatever_its_number(tmp_path):
    paths = [saved(tmp_path, step) for step in (5, 6, 2)]
    checkpoint.prune(tmp_path / "c", 2, paths[-1])
    assert names(tmp_path) == sorted(path.name for path in paths[1:])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.float64(1.0), r"content\['x'\] is of type float64"),
        ([{"y": object()}], r"content\['x'\]\[0\]\['y'\] is of type object"),
        ({(1, 2): 3}, r"has the key \(1, 2\)"),
        (defaultdict(int), "of type defaultdict"),
        (print, "builtin_function"),
    ],
)
def test_what_could_not_be_read_back_is_not_saved(tmp_path, value, message):
    with pytest.raises(StateError, match=message):
        saved(tmp_path, x=value)
    assert not (tmp_path / "c").exists()


def test_what_is_plain_is_read_back_by_torch_itself(tmp_path):
    path = saved(
        tmp_path, a=OrderedDict(b=torch.Size([1, 2])), c=b"bytes", d=torch.nn.Linear(1, 1).weight
    )
    assert torch.load(path, weights_only=True)["a"] == {"b": torch.Size([1, 2])}


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def under_its_checksum(folder, write):
    """A file whose name is right, whatever it holds."""
    raw = folder / "raw"
    write(raw)
    path = folder / f"step-00000001-{files.digest_of(raw)[:16]}.pt"
    return raw.rename(path)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_nothing_in_a_file_is_run(tmp_path, form):
    mark = tmp_path / "it-ran"
    content = {"format": 1, "model": Malicious(mark)}
    if form == "torch":
        path = under_its_checksum(tmp_path, lambda raw: torch.save(content, raw))
    else:
        path = under_its_checksum(tmp_path, lambda raw: raw.write_bytes(pickle.dumps(content)))
    with pytest.raises(StateError, match="which could run code and is therefore not opened"):
        checkpoint.newest(tmp_path)
    assert not mark.exists()
    if form == "torch":  # a canary: the file does what it is feared for
        torch.load(path, weights_only=False)
        assert mark.exists()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda raw: raw.write_text("hello"), "not a torch file"),
        (lambda raw: raw.write_bytes(b""), "not a torch file"),
        (lambda raw: torch.save([1], raw), "not a checkpoint of lamina"),
        (lambda raw: torch.save({"format": 2}, raw), "has format 2, and this version .* up to 1"),
        (lambda raw: torch.save({"format": "x"}, raw), "no format number"),
    ],
)
def test_foreign_files(tmp_path, write, message):
    with pytest.raises(StateError, match=message):
        checkpoint.read(under_its_checksum(tmp_path, write))


def test_missing_files(tmp_path):
    with pytest.raises(StateError, match="cannot be read"):
        checkpoint.read(tmp_path / "step-00000001-0123456789abcdef.pt")
    with pytest.raises(StateError, match="there is no checkpoint here"):
        checkpoint.newest(tmp_path)


def test_a_disk_that_really_is_full(tmp_path):
    """The kernel refuses to write beyond a limit, in the middle of the tensors."""
    import resource

    old = saved(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        with pytest.raises(LaminaError, match="cannot be written"):
            saved(tmp_path, 4, big=torch.zeros(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == [old.name]
    assert checkpoint.is_whole(old)


def test_what_save_and_prune_cannot_mean(tmp_path):
    (tmp_path / "c").mkdir()
    with pytest.raises(StateError, match=r"given step=-1; expected"):
        saved(tmp_path, -1)
    with pytest.raises(StateError, match=r"given the key 'format'"):
        saved(tmp_path, format="mine")
    path = saved(tmp_path)
    with pytest.raises(StateError, match=r"given keep=0; expected at least 1"):
        checkpoint.prune(path.parent, 0, path)
    assert names(tmp_path) == [path.name]


def test_a_whole_best_stands_in_for_its_damaged_twin(tmp_path):
    """Copied without hard links, the two names are two files."""
    path = saved(tmp_path)
    checkpoint.mark_best(path)
    data = path.read_bytes()
    best = path.with_name(path.name.replace("step-", "best-"))
    best.unlink()
    best.write_bytes(data)
    damage(path)
    found = checkpoint.newest(path.parent)
    assert (found.path, found.damaged) == (best, (path,))


#: what may stand where a newer checkpoint should: what cannot be read at all
UNREADABLE = {
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a folder": lambda path: path.mkdir(),
    "a full folder": lambda path: (path.mkdir(), (path / "x").write_text("x")),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_cannot_be_read_is_damaged_like_any_other(tmp_path, what):
    good = saved(tmp_path, 3)
    bad = good.with_name("step-00000009-0123456789abcdef.pt")
    UNREADABLE[what](bad)
    assert checkpoint.candidates(good.parent) == [bad, good]
    found = checkpoint.newest(good.parent)
    assert found.path == good
    assert found.damaged == (bad,)
    last = saved(tmp_path, 10)
    checkpoint.prune(good.parent, 1, last)  # what it cannot read is not its to remove
    assert set(names(tmp_path)) == {last.name, bad.name}
    checkpoint.tidy(good.parent, found.damaged)
    assert set(names(tmp_path)) == {last.name, f"{bad.name}.damaged"}


@pytest.mark.parametrize("what", UNREADABLE)
def test_nothing_that_can_be_read(tmp_path, what):
    bad = tmp_path / "best-00000009-0123456789abcdef.pt"
    UNREADABLE[what](bad)
    with pytest.raises(StateError, match=rf"no checkpoint is whole; {bad.name} cannot be read"):
        checkpoint.newest(tmp_path)


def test_a_file_that_the_disk_does_not_give_is_damaged(tmp_path, monkeypatch):
    good, bad = saved(tmp_path, 3), saved(tmp_path, 9)
    digest_of = files.digest_of

    def failing(path):
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return digest_of(path)

    monkeypatch.setattr(checkpoint, "digest_of", failing)
    found = checkpoint.newest(bad.parent)
    assert (found.path, found.damaged) == (good, (bad,))
    with pytest.raises(StateError, match=rf"{bad.name}: cannot be read \(Input/output error"):
        checkpoint.read(bad)


@pytest.mark.parametrize("moment", ["listed", "summed"])
def test_files_that_go_while_the_folder_is_read(tmp_path, monkeypatch, moment):
    """As when a run that goes on saves and prunes meanwhile."""
    folder, digest_of, taken = tmp_path / "c", files.digest_of, []

    def went(path):
        if len(taken) < 3:
            taken.append(path)
            checkpoint.prune(folder, 1, saved(tmp_path, 3 + len(taken)))
        if moment == "listed":
            return digest_of(path)
        return path.stem.rpartition("-")[2] + "0" * 48

    first = saved(tmp_path, 3)
    monkeypatch.setattr(checkpoint, "digest_of", went)
    found = checkpoint.newest(folder)
    assert checkpoint.step_of(found.path) == 6
    assert found.damaged == ()
    assert not first.exists()
    for path in [*folder.iterdir()]:
        path.unlink()
    monkeypatch.setattr(checkpoint, "candidates", lambda _: [first])
    with pytest.raises(StateError, match="there is no checkpoint here"):
        checkpoint.newest(folder)


def cyclic(kind):
    value = kind()
    value.update(a=value) if kind is dict else value.append(value)
    return value


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def with_attribute(tensor):
    tensor.mark = "mine"
    return tensor


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (with_attribute(torch.ones(2)), r"content\['x'\] is a tensor with attributes .*\(mark\)"),
        (with_attribute(torch.nn.Parameter(torch.ones(2))), r"attributes of its own \(mark\)"),
        ([with_attribute(torch.ones(2))], r"content\['x'\]\[0\] is a tensor with attributes"),
        (cyclic(dict), "nested in itself, or too deeply"),
        (cyclic(list), "nested in itself, or too deeply"),
        (deep(100_000), "nested in itself, or too deeply"),
        (-(10**5000), r"content\['x'\] is a number of 16,610 bits; expected at most 2,000"),
        ({2**2000: 1}, "is a number of 2,001 bits"),
        ("\ud800", r"content\['x'\] is '\\ud800', which is no text"),
        ({"\udc80": 1}, r"the key '\\udc80' of content\['x'\] is '\\udc80', which is no text"),
    ],
    ids=range(10),
)
def test_what_could_not_be_read_back_is_an_error_that_names_it(tmp_path, value, message):
    good = saved(tmp_path, 1)
    with pytest.raises(StateError, match=message):
        saved(tmp_path, 2, x=value)
    assert names(tmp_path) == [good.name]


def test_what_is_saved_at_any_depth_can_be_read_back(tmp_path):
    refused = []
    for levels in (50, 100, 200, 300, 400, 600, 900, 5000):  # Python 3.13 goes deeper
        try:
            path = saved(tmp_path, levels, x=deep(levels))
        except StateError:
            refused.append(levels)
            continue
        assert checkpoint.read(path)["x"] == deep(levels)
    assert refused != []
    assert 100 not in refused


@pytest.mark.parametrize("step", ["1", 1.0, True, None, torch.tensor(1), -1])
def test_a_step_is_a_whole_number(tmp_path, step):
    with pytest.raises(StateError, match=r"checkpoint\.save was given step="):
        checkpoint.save(tmp_path, step, {})


@pytest.mark.parametrize("content", [5, [1], "text", None, [("a", 1)]])
def test_content_is_a_dict(tmp_path, content):
    with pytest.raises(StateError, match=r"checkpoint\.save was given a \w+ as content"):
        checkpoint.save(tmp_path, 1, content)


def test_paths_may_be_texts(tmp_path):
    folder = str(tmp_path / "c")
    paths = [str(checkpoint.save(folder, step, CONTENT | {"step": step})) for step in (1, 2, 3)]
    checkpoint.mark_best(paths[1])
    checkpoint.prune(folder, 1, paths[2])
    assert [name[:13] for name in names(tmp_path)] == ["best-00000002", "step-00000003"]
    assert checkpoint.newest(folder).content["step"] == 3


def test_a_name_that_is_too_long(tmp_path):
    for function in (checkpoint.candidates, checkpoint.newest, checkpoint.read):
        with pytest.raises(StateError, match="File name too long"):
            function(tmp_path / ("a" * 300))


def test_the_largest_number_is_read_back(tmp_path):
    for number in (2**2000 - 1, -(2**2000) + 1):
        assert checkpoint.read(saved(tmp_path, 1, x=number))["x"] == number


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (FileNotFoundError(2, "No such file or directory"), "Make its folder first, or choose"),
        (
            PermissionError(13, "Permission denied"),
            r"\(Permission denied\)\. Choose another folder",
        ),
        (OSError(28, "No space left on device"), "Free some space, or choose another folder"),
    ],
)
def test_what_cannot_be_written_is_told_with_what_helps(error, advice):
    with pytest.raises(LaminaError, match=advice), files.wrap_write_errors(Path("x.html")):
        raise error
