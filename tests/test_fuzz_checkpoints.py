"""Damaged checkpoints: each run goes on, or is refused by an error of lamina and left as it was.

Of every ten, five are damaged in their bytes, so that the checkpoint before is taken and the run
ends with the same bits. Five have a right checksum again: two of them are damaged in their bytes,
two in a record of the archive that torch writes, one in its structure.

And states of an optimizer that are damaged in their structure: each loads, and then trains and
hears reports, or is refused and changes nothing.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import random
import shutil
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import training_task
from lamina import (
    SGD,
    AdamW,
    LaminaError,
    Muon,
    Plan,
    RMSprop,
    Rule,
    StateError,
    checkpoint,
    early_stop,
    linear,
    on_plateau,
    plateau,
    top_down,
)
from lamina.training import Task, fit
from models import encoder, equal, train
from test_state_atomic import picture

TASK = Task("training_task", training_task)
PLAN = Plan.from_toml(training_task.PLAN)
#: what a value becomes
OTHERS: list[Any] = [
    *(None, True, -1, 0, 10**30, 1.5, float("nan"), float("inf"), "", "x", b"\0", [], {}, [[]]),
    *([1, 2], {"a": 1}, {0: {}}, torch.zeros(0), torch.ones(3, dtype=torch.int64)),
    *(torch.tensor(float("nan")), torch.zeros(2, 2, dtype=torch.complex64)),
]
#: what only a state that never was a file can hold, and what no file was known to
WORSE: list[Any] = [
    *({1}, [{}], 10**400, -(10**400), 10**5000, 2**63, 1j, -1.0, 1e30, "[" * 100_000, (), [[[0]]]),
    *(torch.ones((), device="meta"), torch.ones(4, 4, device="meta"), torch.ones(4, 4).to_sparse()),
    *(torch.ones(4, 4) * 1j, torch.ones(4, 4).to(torch.float8_e4m3fn), torch.ones(2, 4).bool()),
    *(torch.nn.Parameter(torch.ones(4)), [[3, 0.5]], [[3, -0.5]], [[3, {"lr": 1e400}]]),
]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return begin(tmp_path_factory.mktemp("fuzz"))


def begin(home):
    """A run that stands in its second epoch, with two checkpoints, and the weights it ends with."""
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
        if kind <= 1 and changed:  # a record may be empty
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


def in_structure(content: Any, chance: random.Random, others: list[Any] = OTHERS) -> Any:
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
        elif kind == 2 and isinstance(inside[key], torch.Tensor) and inside[key].ndim:
            inside[key] = chance.choice(
                [inside[key][:-1], inside[key].double(), inside[key].int(), inside[key] + 1]
            )
        else:
            inside[key] = copy.deepcopy(chance.choice(others))
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


def fuzz(pristine, tmp_path: Path, rounds: Iterable[int]) -> dict[str, int]:
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
    # 387: the state of a generator that is made when the loader is asked for its first batch
    found = fuzz(pristine, tmp_path, [*range(30), 387])
    assert found["refused"] > 3
    assert found["the same"]


@pytest.mark.slow
def test_a_thousand_damaged_checkpoints(pristine, tmp_path):
    found = fuzz(pristine, tmp_path, range(1000))
    print(found)
    assert found["refused"] > 100
    assert found["another"] > 5
    assert found["the same"] > 5


# ------------------------------------------------------------------------- states of an optimizer

WHOLE = Plan(
    AdamW,
    lr=0.01,
    weight_decay=linear(0.1, 0.2),
    clip_norm=1.0,
    feedback=plateau("loss", patience=0),
    stop=early_stop("loss", patience=20),
    rules=[
        Rule("encoder.layer.{depth}.*", thaw=top_down(every=3)),
        Rule("embeddings", optimizer=SGD, lr=0.1, momentum=0.9),
        Rule("classifier.weight", optimizer=Muon, lr=0.02),
        Rule("encoder.layer.1.norm", optimizer=RMSprop, lr=0.01, thaw=on_plateau("loss")),
        Rule("classifier.bias", lr=0.02),
    ],
)
#: what a guest keeps is its own, so that it alone can say whether it trains with it
GUEST = Plan(torch.optim.NAdam, lr=0.01, rules=[Rule("classifier.bias", weight_decay=0.1)])


def optimizer_at(steps: int, plan: Plan) -> tuple[Any, Any]:
    model = encoder()
    optimizer = plan.build(model, steps=20)
    train(model, optimizer, steps)
    optimizer.override(lr=3e-3, rule="classifier.bias")
    for loss in (1.0, 2.0):
        optimizer.report(loss=loss)
    return model, optimizer


def damaged(state: Any, chance: random.Random) -> Any:
    """A state with one value changed, also within what is saved as a text."""
    if chance.random() < 0.7:
        return in_structure(state, chance, [*OTHERS, *WORSE])
    state = copy.deepcopy(state)
    key, kept = chance.choice(["overrides", "feedback"]), [*OTHERS, *WORSE]
    if state["param_groups"][0]["feedback"] == "{}":
        key = "overrides"
    plain = [value for value in kept if isinstance(value, (int, float, str, list, type(None)))]
    plain = [value for value in plain if value not in (10**5000, [{}])]
    group = next(group for group in state["param_groups"] if group[key] != "[]")
    text = json.dumps(in_structure(json.loads(group[key]), chance, plain))
    for each in state["param_groups"] if key == "feedback" else [group]:
        each[key] = text
    return state


def fuzz_states(plan: Plan, rounds: range) -> dict[str, int]:
    whole = optimizer_at(8, plan)[1].state_dict()
    found = {"refused": 0, "loaded": 0}
    model, optimizer = optimizer_at(5, plan)
    before = picture(model, optimizer)
    for number in rounds:
        state = damaged(whole, random.Random(number))
        try:
            optimizer.load_state_dict(state)
        except StateError:
            found["refused"] += 1
            assert equal(picture(model, optimizer), before), number
            continue
        found["loaded"] += 1
        str(optimizer.last_load)
        if plan is WHOLE:
            with suppress(LaminaError):
                train(model, optimizer, 2, first=optimizer.clock)
                optimizer.report(loss=0.5)
                optimizer.report(loss=1.5)
        model, optimizer = optimizer_at(5, plan)
        before = picture(model, optimizer)
    return found


# What fits in part is loaded, with a warning.
@pytest.mark.filterwarnings("ignore:the saved state was loaded, but")
@pytest.mark.parametrize("plan", [WHOLE, GUEST], ids=["own", "guest"])
def test_damaged_states(plan):
    found = fuzz_states(plan, range(50))
    assert found["refused"] > 10
    assert found["loaded"] > 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the saved state was loaded, but")
@pytest.mark.parametrize("plan", [WHOLE, GUEST], ids=["own", "guest"])
def test_thousands_of_damaged_states(plan):
    found = fuzz_states(plan, range(2000))
    print(found)
    assert found["refused"] > 500
    assert found["loaded"] > 500
