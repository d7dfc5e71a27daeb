"""Folders of torch.distributed.checkpoint from somebody else: no code is run, nothing is taken."""

import copy
import io
import os
import pickle
import resource
import sys
import zipfile

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import lamina as lm
from lamina.checkpoint import load_safely
from lamina.checkpoint.inspect import inspect
from lamina.files.pickles import Call, Name, parse
from models import equal, mlp, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

PLAN = lm.Plan(lm.AdamW, lr=0.01)
LR = "optimizer.param_groups.0.lr"
WEIGHT = "optimizer.state.head.weight.exp_avg"


@pytest.fixture(scope="module")
def run():
    model = mlp()
    optimizer = PLAN.build(model, steps=9)
    train(model, optimizer, 3)
    return model, optimizer


@pytest.fixture
def folder(tmp_path, run):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    home = tmp_path / "saved"
    checkpoint.save({"optimizer": get_optimizer_state_dict(*run)}, checkpoint_id=home)
    return home


def metadata_of(folder):
    return pickle.loads((folder / ".metadata").read_bytes())


def stored(metadata, name):
    [(index, info)] = [(i, info) for i, info in metadata.storage_data.items() if i.fqn == name]
    return index, info


def change(folder, edit):
    """Edit the metadata of a folder that this test wrote."""
    metadata = metadata_of(folder)
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def put(folder, name, content):
    """Let an entry hold other bytes, at the end of its file."""

    def edit(metadata):
        _, info = stored(metadata, name)
        path = folder / info.relative_path
        info.offset, info.length = path.stat().st_size, len(content)
        with path.open("ab") as file:
            file.write(content)

    change(folder, edit)


def assert_refused(folder, run, words="."):
    """Both ways to read it end in one line, and the optimizer is as it was."""
    model, optimizer = run
    before = copy.deepcopy(optimizer.state_dict())
    for read in (
        lambda: lm.load_distributed(optimizer, folder),
        lambda: lm.read_distributed(model, folder),
    ):
        with pytest.raises(lm.StateError, match=words) as caught:
            read()
        text = str(caught.value)
        assert text.startswith(str(folder))
        assert "\n" not in text
        assert len(text) < 700
    assert equal(optimizer.state_dict(), before)


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, mark, by):
        self.mark, self.by = str(mark), by

    def __reduce__(self):
        return {
            "mkdir": (os.mkdir, (self.mark,)),
            "eval": (eval, (f"open({self.mark!r}, 'w').close()",)),
            "system": (os.system, (f"touch {self.mark}",)),
            "torch.save": (torch.save, (1, self.mark)),
        }[self.by]


BY = ["mkdir", "eval", "system", "torch.save"]


@pytest.mark.parametrize(
    ("where", "by"),
    [
        *(("whole", by) for by in BY),
        *((where, "eval") for where in ("planner_data", "storage_meta", "key", "size")),
    ],
)
def test_code_in_the_metadata_is_not_run(tmp_path, folder, run, by, where):
    mark = tmp_path / "it-ran"
    evil = Runs(mark, by)
    metadata = metadata_of(folder)
    if where == "key":
        metadata.storage_data[evil] = 1
    elif where == "size":
        metadata.state_dict_metadata[WEIGHT].size = evil
    else:
        setattr(metadata, where, evil)
    content = pickle.dumps(evil if where == "whole" else metadata)
    (folder / ".metadata").write_bytes(content)
    if where == "storage_meta":  # which nobody needs
        assert lm.load_distributed(run[1], folder).clock == 3
    else:
        assert_refused(folder, run)
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists()


@pytest.mark.parametrize("by", BY)
def test_code_in_a_value_is_not_run(tmp_path, folder, run, by):
    mark = tmp_path / "it-ran"
    content = io.BytesIO()
    torch.save(Runs(mark, by), content)
    put(folder, LR, content.getvalue())
    assert_refused(folder, run, "could run code")
    assert not mark.exists()


@pytest.mark.parametrize("by", BY)
def test_code_in_a_tensor_is_not_run(tmp_path, folder, run, by):
    mark = tmp_path / "it-ran"
    content = io.BytesIO()
    torch.save([torch.ones(2, 4), Runs(mark, by)], content)
    put(folder, WEIGHT, content.getvalue())
    assert_refused(folder, run, "could run code")
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle_is_read(folder, run, protocol):
    metadata = metadata_of(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol=protocol))
    assert equal(lm.read_distributed(run[0], folder), run[1].state_dict())


def test_an_enum_as_python_3_11_writes_it_is_read(folder, run, monkeypatch):
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    for reduce in (
        lambda each, _: (getattr, (type(each), each.name)),
        lambda each, _: (type(each), (each.value,)),
    ):
        monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", reduce)
        change(folder, lambda metadata: None)
        assert equal(lm.read_distributed(run[0], folder), run[1].state_dict())


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "a/../../secret",
        "..",
        "",
        "a\\b",
        "C:x",
        "x\0",
        "\ud800",
        3,
        None,
    ],
)
def test_files_outside_of_the_folder_are_not_read(tmp_path, folder, run, name):
    _, info = stored(metadata_of(folder), LR)
    (tmp_path / "secret").write_bytes((folder / info.relative_path).read_bytes())
    change(folder, lambda metadata: setattr(stored(metadata, LR)[1], "relative_path", name))
    assert_refused(folder, run, "cannot be read")


@pytest.mark.parametrize("where", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "gone", "device", "short", "empty"])
def test_what_is_no_whole_file_is_told(folder, run, where, kind):
    path = folder / where
    content = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind != "gone":
        path.write_bytes(content[: len(content) // 2] if kind == "short" else b"")
    assert_refused(folder, run)


def test_a_folder_of_links_is_read(tmp_path, folder, run):
    links = tmp_path / "links"
    links.mkdir()
    for path in folder.iterdir():
        (links / path.name).symlink_to(path)
    assert equal(lm.read_distributed(run[0], links), run[1].state_dict())


def sized(*size):
    """Another shape of a tensor, and of its one part."""

    def edit(metadata):
        saved = metadata.state_dict_metadata[WEIGHT]
        saved.size = torch.Size(size)
        saved.chunks[0].sizes = torch.Size(size)

    return edit


def chunked(*chunks):
    """Other parts of a tensor, which are all stored."""

    def edit(metadata):
        index, info = stored(metadata, WEIGHT)
        del metadata.storage_data[index]
        saved = metadata.state_dict_metadata[WEIGHT]
        saved.chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in chunks]
        path = info.relative_path
        for place, chunk in enumerate(saved.chunks):
            part = type(info)(path, info.offset + 500 * place, 500)
            metadata.storage_data[MetadataIndex(WEIGHT, chunk.offsets)] = part

    return edit


def placed(**values):
    return lambda metadata: vars(stored(metadata, LR)[1]).update(values)


def shared(metadata):
    """The parts of one tensor as those of a thousand."""
    saved = metadata.state_dict_metadata[WEIGHT]
    saved.chunks = saved.chunks * 1_000
    for place in range(1_000):
        metadata.state_dict_metadata[f"more.{place}"] = saved
        metadata.planner_data[f"more.{place}"] = ("optimizer", "state", "more", str(place))


def other_path(*path):
    return lambda metadata: metadata.planner_data.update({LR: path})


EDITS = {
    "huge": sized(2**20, 2**20),
    "huger": sized(*[2**40] * 8),
    "negative": sized(-1, 4),
    "many dimensions": sized(*[1] * 10_000),
    "beyond all numbers": lambda m: vars(stored(m, LR)[1]).update(length=10**400),
    "a hole": chunked(((0, 0), (1, 4))),
    "an overlap": chunked(((0, 0), (1, 4)), ((0, 2), (1, 2)), ((0, 3), (2, 1))),
    "outside": chunked(((0, 0), (1, 4)), ((5, 0), (1, 4))),
    "other dimensions": chunked(((0,), (8,))),
    "shared": shared,
    "negative place": placed(offset=-5),
    "far place": placed(offset=2**50),
    "long entry": placed(length=2**50),
    "entries in each other": placed(offset=0, length=2000),
    "compressed": placed(transform_descriptors=["zstd/1"]),
    "no entry": lambda m: m.storage_data.pop(stored(m, LR)[0]),
    "no entry of a tensor": lambda m: m.storage_data.pop(stored(m, WEIGHT)[0]),
    "nothing stored": lambda m: setattr(m, "storage_data", None),
    "no tensors": lambda m: setattr(m, "state_dict_metadata", 3),
    "unknown name": lambda m: m.planner_data.update({"x": ("optimizer", "state", "x", "y")}),
    "deep path": other_path("optimizer", *["x"] * 100_000),
    "empty path": other_path(),
    "path of a number": other_path(10**400),
    "path of NaN": other_path("optimizer", float("nan")),
    "a place in a list": other_path("optimizer", "param_groups", 10**9, "lr"),
    "a list in a dict": other_path("optimizer", "param_groups", "x", "lr"),
    "surrogate": lambda m: m.planner_data.update({"\ud800": ("optimizer",)}),
    "endless name": lambda m: m.planner_data.update({"x" * 10**6: ("optimizer",)}),
    "no properties": lambda m: setattr(m.state_dict_metadata[WEIGHT], "properties", None),
    "another dtype": lambda m: setattr(
        m.state_dict_metadata[WEIGHT], "properties", TensorProperties(torch.int8)
    ),
    "no tensor": lambda m: m.state_dict_metadata.update(
        {LR: TensorStorageMetadata(TensorProperties(), torch.Size([]), [])}
    ),
}


@pytest.mark.parametrize("what", EDITS)
def test_metadata_that_cannot_be_right_is_refused(folder, run, what):
    change(folder, EDITS[what])
    assert_refused(folder, run, "cannot be read")


def test_parts_of_a_tensor_are_put_together(folder, run):
    weight = run[1].state[run[0].head.weight]["exp_avg"]

    def edit(metadata):
        index, info = stored(metadata, WEIGHT)
        del metadata.storage_data[index]
        path, chunks = folder / info.relative_path, metadata.state_dict_metadata[WEIGHT].chunks
        chunks.clear()
        for row, column in [(0, 0), (1, 0), (0, 2), (1, 2)]:
            content = io.BytesIO()
            torch.save(weight[row : row + 1, column : column + 2].clone(), content)
            place = torch.Size([row, column])
            chunks.append(ChunkStorageMetadata(place, torch.Size([1, 2])))
            part = type(info)(path.name, path.stat().st_size, len(content.getvalue()))
            metadata.storage_data[MetadataIndex(WEIGHT, place)] = part
            with path.open("ab") as file:
                file.write(content.getvalue())

    change(folder, edit)
    assert equal(lm.read_distributed(run[0], folder), run[1].state_dict())


def archive(pickled):
    """What `torch.save` writes, with another pickle in it."""
    plain, made = io.BytesIO(), io.BytesIO()
    torch.save(torch.ones(2), plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(made, "w") as target:
        for record in source.infolist():
            content = source.read(record)
            target.writestr(
                record.filename, pickled if record.filename.endswith("data.pkl") else content
            )
    return made.getvalue()


BILLION = b"J\xff\xff\xff\x3f"
BOMBS = {
    "bytes": b"cbuiltins\nbytearray\n" + BILLION + b"\x85R.",
    "new bytes": b"cbuiltins\nbytearray\n" + BILLION + b"\x85\x81.",
    "a tensor": b"ctorch\nTensor\n" + BILLION + b"\x85R.",
    "a storage": b"ctorch\nFloatStorage\n" + BILLION + b"\x85R.",
    "a nested key": b"}(" + b")" + b"\x85" * 5_000 + b"Nu.",
    "a nested item of a set": b"cbuiltins\nset\n](" + b")" + b"\x85" * 5_000 + b"e\x85R.",
    "a nested key of a dict": b"ccollections\nOrderedDict\n]]("
    + b")"
    + b"\x85" * 5_000
    + b"Nee\x85R.",
    "an encoding": b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00idna\x86R.",
    "colliding keys": b"}("
    + b"".join(pickle.dumps(i * (2**61 - 1), 2)[2:-1] + b"N" for i in range(2, 3_000))
    + b"u.",
}


@pytest.mark.parametrize("what", BOMBS)
def test_small_files_that_grow_are_refused(tmp_path, folder, run, what):
    content = archive(b"\x80\x02" + BOMBS[what])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / "state.pt"
    path.write_bytes(content)
    for read in (load_safely, inspect):
        with pytest.raises(lm.StateError, match=r"state\.pt: this is no checkpoint"):
            read(path)
    for name in (LR, WEIGHT):
        put(folder, name, content)
        assert_refused(folder, run, "this is no checkpoint")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 300e6


def test_numbers_that_stand_for_a_billion_elements_are_refused(tmp_path, folder, run):
    content = io.BytesIO()
    torch.save({"lr": [torch.ones(1).expand(2**30)]}, content)
    path = tmp_path / "state.pt"
    path.write_bytes(content.getvalue())
    for read in (load_safely, inspect):
        with pytest.raises(lm.StateError, match="a tensor of 4,294,967,296 bytes"):
            read(path)
    put(folder, LR, content.getvalue())
    assert_refused(folder, run, "a tensor of 4,294,967,296 bytes")
    torch.save(torch.ones(3).expand(1000, 3), path)
    assert load_safely(path).shape == (1000, 3)


def test_endless_and_compressed_values_are_refused(folder, run):
    laughs = [1.0] * 10
    for _ in range(40):
        laughs = [laughs] * 10
    content = io.BytesIO()
    torch.save(laughs, content)
    put(folder, LR, content.getvalue())
    assert_refused(folder, run, "more than 10,000,000 values")
    packed = io.BytesIO()
    with zipfile.ZipFile(content) as source, zipfile.ZipFile(packed, "w", 8) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    put(folder, LR, packed.getvalue())
    assert_refused(folder, run, "compressed")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b".",
        b"\x80",
        b"\x80\x04.",
        b"\x80\x04N",
        b"(.",
        b"N0.",
        b"r\xff\xff\xff\xff.",
        b"Nr\xff\xff\xff\xff0.",
        b"h\x07.",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x8b\xff\xff\xff\x7f.",
        b"]N}s.",
        b"NNs.",
        b"Na.",
        b"NN\x93.",
        b"NNR.",
        b"N}b.",
        b"cos\nsystem\nN}b.",
        b"cos\nsystem\n(X\x01\x00\x00\x00ao.",
        b"L" + b"9" * 100_000 + b"L\n.",
        b"\x82\x01.",
        b"(" * 10_000,
        b"NNN.",
    ],
)
def test_what_is_no_pickle_of_a_state_is_a_plain_error(raw, folder, run):
    with pytest.raises(ValueError, match=r".*"):
        parse(io.BytesIO(raw))
    (folder / ".metadata").write_bytes(raw)
    assert_refused(folder, run, "cannot be read")


def test_what_a_pickle_would_call_is_kept_as_text():
    found = parse(io.BytesIO(pickle.dumps([os.system, Runs("mark", "mkdir"), {"a": 1}])))
    assert isinstance(found[0], Name)
    assert found[0].text.endswith(".system")
    assert isinstance(found[1], Call)
    assert (found[1].name, found[1].args) == ("posix.mkdir", ("mark",))
    assert found[2] == {"a": 1}
