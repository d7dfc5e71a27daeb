"""Damaged checkpoints: each run goes on, or is refused by an error of lamina and left as it was.

Of every ten, five are damaged in their bytes, so that the checkpoint before is taken and the run
ends with the same bits. Five have a right checksum again: two of them are damaged in their bytes,
two in a record of the archive that torch writes, one in its structure.
"""

from __future__ import annotations

import copy
import hashlib
import io
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import training_task
from lamina import LaminaError, Plan, checkpoint
from lamina.training import Task, fit
from models import equal

TASK = Task("training_task", training_task)
PLAN = Plan.from_toml(training_task.PLAN)
#: what a value becomes
OTHERS: list[Any] = [
    *(None, True, -1, 0, 10**30, 1.5, float("nan"), float("inf"), "", "x", b"\0", [], {}, [[]]),
    *([1, 2], {"a": 1}, {0: {}}, torch.zeros(0), torch.ones(3, dtype=torch.int64)),
    *(torch.tensor(float("nan")), torch.zeros(2, 2, dtype=torch.complex64)),
]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A run that stands in its second epoch, with two checkpoints, and the weights it ends with."""
    home = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lamina.training.run_folder.RunFolder.picture", lambda *_: None)
        patch.setattr(training_task, "loss", interrupted(12))
        fit(TASK, PLAN, out=home / "stopped", cpu=True, seed=3)
        patch.undo()
        patch.setattr("lamina.training.run_folder.RunFolder.picture", lambda *_: None)
        fit(TASK, PLAN, out=home / "whole", cpu=True, seed=3)
    return home / "stopped", checkpoint.newest(home / "whole" / "checkpoints").content["model"]


def interrupted(call):
    loss, calls = training_task.loss, iter(range(1000))

    def stopping(model, batch):
        if next(calls) == call:
            raise KeyboardInterrupt
        return loss(model, batch)

    return stopping


def in_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes changed, lost, doubled, put in or cut off."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        kind, place = chance.randrange(6), chance.randrange(max(len(changed), 1))
        length = chance.choice([1, 2, 8, 64, 1000])
        if kind <= 1:
            changed[place] = chance.randrange(256)
        elif kind == 2:
            del changed[place : place + length]
        elif kind == 3:
            changed[place:place] = changed[place : place + length]
        elif kind == 4:
            changed[place:place] = chance.randbytes(length)
        else:
            del changed[place:]
    return bytes(changed)


def in_records(data: bytes, chance: random.Random) -> bytes:
    """As `in_bytes`, in one record of the archive, whose own checksums are right again."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    chosen = chance.choice([pickled, chance.choice(list(records))])
    records[chosen] = in_bytes(records[chosen], chance)
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            for name, record in records.items():
                archive.writestr(name, record)
        return file.getvalue()


def in_structure(content: Any, chance: random.Random) -> Any:
    """One value somewhere in nested dicts and lists is another one, missing, or under a new key."""
    content = copy.deepcopy(content)
    inside = content
    while True:
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        key = chance.choice(keys)
        if isinstance(inside[key], (dict, list)) and inside[key] and chance.random() < 0.85:
            inside = inside[key]
            continue
        kind = chance.randrange(4)
        if kind == 0:
            del inside[key]
        elif kind == 1 and isinstance(inside, dict):
            inside[chance.choice([f"{key}x", 7, ""])] = inside.pop(key)
        elif kind == 2 and isinstance(inside[key], torch.Tensor):
            inside[key] = chance.choice(
                [inside[key][:-1], inside[key].double(), inside[key].int(), inside[key] + 1]
            )
        else:
            inside[key] = copy.deepcopy(chance.choice(OTHERS))
        return content


def put(folder: Path, data: bytes | None, content: Any = None) -> None:
    """Replace the newest checkpoint by other content with the right checksum."""
    path = checkpoint.candidates(folder / "checkpoints")[0]
    path.unlink()
    if data is None:
        torch.save(content, path)
        data = path.read_bytes()
        path.unlink()
    digest = hashlib.sha256(data).hexdigest()
    path.with_name(f"{path.name[:14]}{digest[:16]}.pt").write_bytes(data)


def outcome(folder: Path, expected: Any) -> str:
    """Go on with a run; an error must be lamina's, and leave every file as it was."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    try:
        result = fit(TASK, resume=folder, cpu=True)
    except LaminaError:
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
        return "refused"
    assert result.steps >= 0
    ended = checkpoint.newest(folder / "checkpoints").content["model"]
    return "the same" if equal(ended, expected) else "another"


def fuzz(pristine, tmp_path: Path, rounds: range) -> dict[str, int]:
    template, expected = pristine
    newest = checkpoint.candidates(template / "checkpoints")[0]
    data, content = newest.read_bytes(), checkpoint.read(newest)
    found: dict[str, int] = {}
    for number in rounds:
        chance = random.Random(number)
        folder = tmp_path / str(number)
        shutil.copytree(template, folder)
        kind = number % 10
        if kind < 5:
            changed = in_bytes(data, chance)
            (folder / "checkpoints" / newest.name).write_bytes(changed)
            assert outcome(folder, expected) == "the same", number
        else:
            structure = in_structure(content, chance) if kind == 9 else None
            damage = in_bytes if kind < 7 else in_records
            put(folder, None if kind == 9 else damage(data, chance), structure)
            told = outcome(folder, expected)
            found[told] = found.get(told, 0) + 1
        shutil.rmtree(folder)
    return found


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    monkeypatch.setattr("lamina.training.run_folder.RunFolder.picture", lambda *_: None)


def test_damaged_checkpoints(pristine, tmp_path):
    found = fuzz(pristine, tmp_path, range(100))
    assert found["refused"] > 10
    assert found["the same"] > 1


@pytest.mark.slow
def test_a_thousand_damaged_checkpoints(pristine, tmp_path):
    found = fuzz(pristine, tmp_path, range(1000))
    print(found)
    assert found["refused"] > 100
    assert found["another"] > 5
    assert found["the same"] > 5
