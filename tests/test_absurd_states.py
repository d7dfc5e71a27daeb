"""States with numbers and texts that cannot be: one short error each, and nothing is changed."""

import copy
import hashlib
import json
import math
import pickle

import pytest
import torch

import lamina as lm
from lamina import checkpoint
from lamina.checkpoint.inspect import inspect
from lamina.training.resume import saved_task
from lamina.training.run_folder import read_about
from lamina.training.snapshot import Snapshot
from models import equal, mlp, train

LONE = "\ud800"
HUGE = 10**5000
PLAN = lm.Plan(lm.AdamW, lr=0.01, feedback=lm.plateau("loss", patience=0))
NAN = float("nan")


def built():
    model = mlp()
    optimizer = PLAN.build(model, steps=9)
    train(model, optimizer, 3)
    optimizer.report(loss=1.0)
    optimizer.override(lr=0.5)
    return optimizer


def in_group(key, value):
    return lambda state: state["param_groups"][0].update({key: value})


def renamed(key, other):
    return lambda state: state["state"][0].update({other: state["state"][0].pop(key)})


STATES = {
    "a clock": in_group("clock", 10**400),
    "a clock of thousands of digits": in_group("clock", HUGE),
    "a clock that is NaN": in_group("clock", NAN),
    "a format": in_group("format", HUGE),
    "a length": in_group("run", {"steps": 10**400, "steps_per_epoch": None}),
    "a length that is NaN": in_group("run", {"steps": NAN, "steps_per_epoch": None}),
    "a shape": in_group("param_shapes", [[10**400]] * 4),
    "a lone surrogate as a name": in_group("param_names", [LONE, "a", "b", "c"]),
    "a lone surrogate in the name of a group": in_group("name", f"body{LONE}"),
    "a lone surrogate as a key of a group": in_group(LONE, 1),
    "an override": in_group("overrides", [[1, {"lr": HUGE}]]),
    "an override of a lone surrogate": in_group("overrides", [[1, {LONE: 1.0}]]),
    "an override in a text": in_group("overrides", f'[[1, {{"lr": {"9" * 5000}}}]]'),
    "the step of an override": in_group("overrides", [[10**400, {"lr": 1.0}]]),
    "feedback in a text": in_group("feedback", "[" * 100_000),
    "a parameter": lambda state: state["param_groups"][0]["params"].__setitem__(0, HUGE),
    "a parameter again": lambda state: state["param_groups"][0].update(params=["x" * 10**6] * 4),
    "a step": lambda state: state["state"][0].update(step=10**400),
    "a step that is NaN": lambda state: state["state"][0].update(step=torch.tensor(NAN)),
    "a step that is infinite": lambda state: state["state"][0].update(step=torch.tensor(math.inf)),
    "an entry": lambda state: state["state"].update({"x" * 10**6: {}}),
    "an entry of a lone surrogate": lambda state: state["state"].update({LONE: {}}),
    "a key": renamed("exp_avg", LONE),
}


@pytest.mark.parametrize("what", STATES)
def test_a_state_is_refused_in_one_short_line(what):
    optimizer = built()
    before = copy.deepcopy(optimizer.state_dict())
    state = copy.deepcopy(before)
    STATES[what](state)
    with pytest.raises(lm.StateError) as caught:
        optimizer.load_state_dict(state)
    text = str(caught.value)
    assert len(text) < 500
    assert "\n" not in text
    text.encode()
    assert equal(optimizer.state_dict(), before)


GUEST = lm.Plan(torch.optim.NAdam, lr=0.01)


@pytest.mark.parametrize(
    "change",
    [in_group("own", HUGE), in_group("own", [LONE]), lambda s: s["state"][0].update(own=HUGE)],
    ids=range(3),
)
def test_what_a_guest_could_load_but_not_save(change):
    model = mlp()
    optimizer = GUEST.build(model, steps=9)
    train(model, optimizer, 3)
    plain = torch.optim.NAdam(model.parameters(), lr=0.01).state_dict()
    plain["state"] = copy.deepcopy(optimizer.state_dict()["state"])
    before = copy.deepcopy(optimizer.state_dict())
    change(plain)
    with pytest.raises(lm.StateError, match=r"bits|cannot be written"):
        optimizer.load_state_dict(plain)
    assert equal(optimizer.state_dict(), before)


def test_numbers_and_texts_that_can_be_are_loaded():
    optimizer = built()
    state = optimizer.state_dict()
    state["param_groups"][0] |= {"name": "Gewichte – 重み 🙂", "note": 2**1999}
    optimizer.load_state_dict(state)
    assert optimizer.clock == 3


def content(**changed):
    state = built().state_dict()
    settings = {"seed": 0, "epochs": 1.0}
    return {
        "task": "digits",
        "plan": "",
        "settings": settings,
        "data": {},
        "processes": 1,
        "clock": 3,
        "skipped": 0,
        "since": 0,
        "steps": 9,
        "epoch": 0,
        "batches": 3,
        "validated": False,
        "seconds": 1.0,
        "recorded": 10,
        "validation": None,
        "best": None,
        "random": [dict.fromkeys(("start", "before", "after"))],
        "scaler": None,
        "versions": {},
        "model": {},
        "optimizer": state,
        **changed,
    }


def written(folder, saved):
    """A checkpoint under the right name, of content that `checkpoint.save` may refuse."""
    path = folder / "made"
    torch.save({"format": 1, **saved}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return path.rename(folder / f"step-00000003-{digest}.pt")


@pytest.mark.parametrize("name", ["clock", "skipped", "steps", "epoch", "batches", "recorded"])
@pytest.mark.parametrize("value", [10**400, 2**63, -1, NAN, math.inf, LONE, True], ids=range(7))
def test_counts_of_a_checkpoint(tmp_path, name, value):
    saved = content(**{name: value})
    with pytest.raises(lm.StateError, match=f"'{name}' is") as caught:
        Snapshot.of(saved, tmp_path)
    assert len(str(caught.value)) < 500
    assert Snapshot.of(content(), tmp_path).clock == 3


@pytest.mark.parametrize(
    "value", [NAN, math.inf, HUGE, [HUGE], {LONE: HUGE}, "x" * 10**6], ids=range(6)
)
@pytest.mark.parametrize("name", ["seconds", "random", "best", "validation"])
def test_other_values_of_a_checkpoint(tmp_path, name, value):
    with pytest.raises(lm.StateError) as caught:
        Snapshot.of(content(**{name: value}), tmp_path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "changed",
    [
        {"task": LONE},
        {"plan": f"lr = 1 # {LONE}"},
        {"settings": {LONE: 1}},
        {"settings": {"seed": LONE}},
        {"versions": {"torch": [{"deep": LONE}]}},
        {"model": {LONE: torch.ones(1)}},
        {"best": {"metric": LONE, "value": 1.0, "step": 1}},
    ],
    ids=range(7),
)
def test_a_lone_surrogate_in_a_file(tmp_path, changed):
    path = written(tmp_path, content(**changed))
    for read in (inspect, checkpoint.read, checkpoint.newest):
        with pytest.raises(lm.StateError, match="cannot be written") as caught:
            read(tmp_path if read is checkpoint.newest else path)
        str(caught.value).encode()
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", [10**400, NAN, "x" * 10**6, [[]] * 10**4], ids=range(4))
@pytest.mark.parametrize("key", ["clock", "epoch", "seconds", "validation", "best", "optimizer"])
def test_inspect_says_what_it_can_or_one_short_line(tmp_path, key, value):
    path = written(tmp_path, content(**{key: value}))
    try:
        lines = inspect(path).splitlines()
    except lm.StateError as error:
        lines = [str(error)]
    assert str(path) in lines[0]
    if len(lines) == 1:
        assert len(lines[0]) < 600


@pytest.mark.parametrize(
    "text",
    [
        '{"task": "\\ud800"}',
        '{"\\udfff": 1}',
        '{"resumed": [{"at": "\\ud800"}]}',
        f'{{"steps": {"9" * 5000}}}',
        f'{{"steps": {"9" * 1000}}}',
        "[" * 100_000,
        '{"a":' * 100_000,
        "\ufeff{}",
        "[]",
        "",
    ],
    ids=range(10),
)
def test_run_json(tmp_path, text):
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    for read in (read_about, saved_task):
        with pytest.raises(lm.StateError, match=r"run\.json") as caught:
            read(tmp_path)
        assert len(str(caught.value)) < 500
        str(caught.value).encode()


def test_run_json_with_text_that_can_be(tmp_path):
    about = {"task": "digits", "note": "重み 🙂", "seed": 2**1999}
    (tmp_path / "run.json").write_text(json.dumps(about), encoding="utf-8")
    assert read_about(tmp_path) == about


def test_a_number_that_only_a_pickle_can_hold(tmp_path):
    path = tmp_path / "state.pt"
    torch.save({"a": 2**2020}, path)
    assert pickle.loads(pickle.dumps(2**2020)) == 2**2020
    with pytest.raises(lm.StateError, match=r"2,021 bits"):
        inspect(path)
