"""Saved states and checkpoints that are damaged: an error that changes nothing, or a valid load."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import pickle
import random
import shutil
import tempfile
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lamina as lm
import test_fuzz_checkpoints as fuzz
from lamina import checkpoint
from lamina.checkpoint.inspect import inspect
from lamina.training.run_folder import RunFolder
from models import equal, train
from test_state_atomic import picture

from .count import Counts, Wrong, empty_folder

#: other seeds than those of the tests
FIRST_SEED = 100_000


def states(full: bool = True) -> list[Counts]:
    """Load damaged states of lamina's own optimizers and of a guest, then train with them."""
    rows = []
    for name, plan in (("own", fuzz.WHOLE), ("guest", fuzz.GUEST)):
        counts = Counts(f"damaged states, {name}", limit=5.0)
        target = Target(plan)
        with empty_folder():
            for seed in range(FIRST_SEED, FIRST_SEED + (3000 if full else 10)):
                if counts.attempt(seed, partial(target.load, seed)) != CLEAN:
                    target.begin()
        rows.append(counts)
    return rows


CLEAN = "refused in one line"


class Target:
    """A live optimizer that damaged states are loaded into."""

    def __init__(self, plan: lm.Plan) -> None:
        self.plan = plan
        self.saved = fuzz.optimizer_at(8, plan)[1].state_dict()
        self.begin()

    def begin(self) -> None:
        self.model, self.optimizer = fuzz.optimizer_at(5, self.plan)
        self.before = picture(self.model, self.optimizer)

    def load(self, seed: int) -> str:
        state = fuzz.damaged(self.saved, random.Random(seed))
        if seed % 3 == 0:
            # A second damage, unless the first one left nothing that can be damaged in that way.
            with suppress(NotImplementedError, RuntimeError, StopIteration, ValueError, TypeError):
                state = fuzz.damaged(state, random.Random(-seed))
        try:
            self.optimizer.load_state_dict(state)
        except lm.StateError:
            if not equal(picture(self.model, self.optimizer), self.before):
                raise Wrong("a load that was refused changed the optimizer") from None
            raise
        str(self.optimizer.last_load)
        if self.plan is fuzz.WHOLE:  # what a guest keeps it alone can judge
            self.use()
        return "taken"

    def use(self) -> None:
        """Train and report; a plan may say that the run cannot go on, and only that."""
        with suppress(lm.LaminaError):
            train(self.model, self.optimizer, 2, first=self.optimizer.clock)
            self.optimizer.report(loss=0.5)
            self.optimizer.report(loss=1.5)


# ------------------------------------------------------------------------------------ checkpoints


class Runs:
    """What a pickle calls when it is read by one that runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def with_code(data: bytes) -> bytes:
    """Return a checkpoint whose pickle makes a folder when it is read without restriction."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(made, "w") as changed:
        for name in archive.namelist():
            record = archive.read(name)
            if name.endswith("data.pkl"):
                record = pickle.dumps({"model": Runs()}, protocol=2)
            changed.writestr(name, record)
    return made.getvalue()


def compressed(data: bytes) -> bytes:
    """Return a checkpoint with its records compressed, and one more that is very large so."""
    made = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as archive,
        zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as changed,
    ):
        for name in archive.namelist():
            changed.writestr(name, archive.read(name))
        changed.writestr("archive/data/999", bytes(50_000_000))
    return made.getvalue()


def nested(content: Any, chance: random.Random) -> Any:
    """Return content with a list that holds itself twice over, many times: 2**depth to print."""
    shared: list[Any] = [0]
    for _ in range(chance.choice([10, 30, 60])):
        shared = [shared, shared]
    content = copy.deepcopy(content)
    content[chance.choice([*content, "more"])] = shared
    return content


def altered(data: bytes, content: Any, seed: int) -> bytes:
    """Return the bytes of a checkpoint, damaged in the way and at the place that a seed says."""
    chance = random.Random(seed)
    kind = seed % 20
    if kind == 0:
        return with_code(data)
    if kind == 1:
        return compressed(data)
    if kind < 7:
        return fuzz.in_bytes(data, chance)
    if kind < 13:
        return fuzz.in_records(data, chance)
    if kind == 13:
        changed = nested(content, chance)
    else:
        changed = fuzz.in_structure(content, chance)
        if kind < 17:
            changed = fuzz.in_structure(changed, chance)
    made = io.BytesIO()
    torch.save(changed, made)
    return made.getvalue()


def checkpoints(full: bool = True) -> list[Counts]:
    """Read and inspect damaged checkpoints whose checksum is right, and resume from some."""
    read = Counts("damaged checkpoints, read and inspected")
    resumed = Counts("damaged checkpoints, resumed", limit=20.0)
    drawn, RunFolder.picture = RunFolder.picture, lambda *_: None
    with tempfile.TemporaryDirectory() as name, empty_folder():
        try:
            template, expected = fuzz.begin(Path(name))
            newest = checkpoint.candidates(template / "checkpoints")[0]
            data, content = newest.read_bytes(), checkpoint.read(newest)
            for seed in range(FIRST_SEED, FIRST_SEED + (4000 if full else 27)):
                changed = altered(data, content, seed)
                path = Path(name) / named(newest.name, changed)
                path.write_bytes(changed)
                read.attempt(seed, lambda path=path: read_and_inspect(path))
                path.unlink()
                if seed % (7 if full else 9) == 0:
                    folder = Path(name) / str(seed)
                    shutil.copytree(template, folder)
                    (folder / "checkpoints" / newest.name).unlink()
                    (folder / "checkpoints" / named(newest.name, changed)).write_bytes(changed)
                    resumed.attempt(seed, lambda f=folder, e=expected: resume(f, e))
                    shutil.rmtree(folder)
        finally:
            RunFolder.picture = drawn
    return [read, resumed]


def named(name: str, data: bytes) -> str:
    """Return the name of a checkpoint of the same step with other bytes."""
    return f"{name[:14]}{hashlib.sha256(data).hexdigest()[:16]}.pt"


def read_and_inspect(path: Path) -> str:
    before = path.read_bytes()
    try:
        str(inspect(path))
    finally:
        if path.read_bytes() != before:
            raise Wrong("the file was changed")
    checkpoint.read(path)
    return "taken"


def resume(folder: Path, expected: Any) -> str:
    try:
        return "refused" if fuzz.outcome(folder, expected) == "refused" else "taken"
    except AssertionError as error:
        raise Wrong(f"a file was changed although it was refused: {error}") from error
