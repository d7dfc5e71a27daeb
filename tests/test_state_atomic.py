"""A load that fails at any stage leaves everything as it was; a canary plants one that does not."""

import copy
import json
import math
from contextlib import contextmanager

import pytest
import torch

import lamina as lm
from lamina.state import entries, load
from models import encoder, equal, train

PLAN = lm.Plan(
    lm.AdamW,
    lr=0.05,
    schedule=lm.warmup(2) >> lm.cosine(to=0.1),
    feedback=lm.plateau("loss", patience=1),
    stop=lm.early_stop("loss"),
    clip_norm=1.0,
    rules=[
        lm.Rule("encoder.layer.{depth}.*", thaw=lm.top_down(every=3)),
        lm.Rule("embeddings", thaw=lm.on_plateau("loss")),
        lm.Rule("*.bias", weight_decay=0),
    ],
)


def running(steps=5):
    model = encoder()
    optimizer = PLAN.build(model, steps=20)
    train(model, optimizer, steps)
    optimizer.override(eps=1e-6)
    optimizer.report(loss=1.0)
    return model, optimizer


def picture(model, optimizer):
    """All that a load could change."""
    return {
        "state": {
            name: {key: (id(value), value.clone()) for key, value in optimizer.state[param].items()}
            for group in optimizer.param_groups
            for name, param in zip(group["param_names"], group["params"], strict=True)
        },
        "groups": [
            {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
        "published": copy.deepcopy(optimizer._run_state.published),
        "active": list(optimizer._freezer.active),
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "report": optimizer.last_load,
    }


@contextmanager
def assert_refused(model, optimizer, error, match):
    """What happens inside is an error, and changes nothing."""
    before = picture(model, optimizer)
    with pytest.raises(error, match=match):
        yield
    assert equal(picture(model, optimizer), before)


def last(state):
    return state["param_groups"][-1]


def of_last(state):
    """The entry of the last parameter of the last group that has tensors."""
    return next(e for e in reversed(list(state["state"].values())) if len(e) > 1)


def seen(change, key=""):
    """Change what the first reaction that keeps a key has seen, which is saved as a text."""

    def apply(state):
        group = state["param_groups"][0]
        feedback = json.loads(group["feedback"])
        chosen = [f for f in feedback.values() if key in f or not key]
        change(chosen[0])
        group["feedback"] = json.dumps(feedback)

    return apply


def every_clock(value):
    return lambda state: [group.update(clock=value) for group in state["param_groups"]]


STAGES = {
    "bad entry in the last group": lambda s: s["state"].update({last(s)["params"][-1]: 3}),
    "text in exp_avg": lambda s: of_last(s).update(exp_avg="x"),
    "integers in exp_avg": lambda s: of_last(s).update(exp_avg=of_last(s)["exp_avg"].long()),
    "another shape": lambda s: of_last(s).update(exp_avg_sq=torch.zeros(9)),
    "exp_avg lost": lambda s: of_last(s).pop("exp_avg"),
    "step lost": lambda s: of_last(s).pop("step"),
    "NaN step": lambda s: of_last(s).update(step=torch.tensor(math.nan)),
    "negative step": lambda s: of_last(s).update(step=-1),
    "half a step": lambda s: of_last(s).update(step=1.5),
    "step of many numbers": lambda s: of_last(s).update(step=torch.ones(3)),
    "groups are no list": lambda s: s.update(param_groups={"a": 1}),
    "a group is no dict": lambda s: s["param_groups"].append("x"),
    "params are no list": lambda s: last(s).update(params=3),
    "a tensor among the params": lambda s: last(s)["params"].append(torch.ones(1)),
    "clock of a wrong type": lambda s: last(s).update(clock="5"),
    "NaN clock": lambda s: last(s).update(clock=math.nan),
    "clocks that differ": lambda s: last(s).update(clock=9),
    "state is no dict": lambda s: s.update(state=[1]),
    "an index out of range": lambda s: s["state"].update({999: {}}),
    "an index twice": lambda s: last(s)["params"].__setitem__(0, 0),
    "a name twice": lambda s: last(s)["param_names"].__setitem__(0, "embeddings.weight"),
    "names and params of different number": lambda s: last(s)["param_names"].append("x"),
    "a name that is no text": lambda s: last(s)["param_names"].__setitem__(0, 3),
    "one parameter too many": lambda s: last(s)["params"].append(77),
    "an unreadable format": lambda s: last(s).update(format="new"),
    "a newer format": lambda s: last(s).update(format=99),
    "a malformed run": lambda s: s["param_groups"][0].update(run=[1, 2]),
    "overrides that cannot be read": lambda s: last(s).update(overrides="[[0"),
    "feedback that cannot be read": lambda s: s["param_groups"][0].update(feedback="{x}"),
    "feedback of a text": lambda s: s["param_groups"][0].update(feedback='"x"'),
    "overrides that are no list": lambda s: last(s).update(overrides=3),
    "an override without a step": lambda s: last(s).update(overrides=[{"lr": 1.0}]),
    "an override to a text": lambda s: last(s).update(overrides=[[0, {"lr": "high"}]]),
    "feedback that is no dict": lambda s: s["param_groups"][0].update(feedback=[1]),
    "feedback with an unknown key": seen(lambda f: f.update(more=1)),
    "feedback that lacks a key": seen(lambda f: f.pop("bad")),
    "feedback of a wrong type": seen(lambda f: f.update(bad="x")),
    "a number of reports below 0": seen(lambda f: f.update(bad=-1)),
    "a number of reports beyond all floats": seen(lambda f: f.update(since=10**400)),
    "NaN as the best": seen(lambda f: f.update(best=math.nan)),
    "a best beyond all floats": seen(lambda f: f.update(best=10**400)),
    "a thaw before the first step": seen(lambda f: f.update(opened=-1), "opened"),
    "a thaw within a step": seen(lambda f: f.update(opened=3.5), "opened"),
    "NaN as the step of a thaw": seen(lambda f: f.update(opened=math.nan), "opened"),
    "feedback of brackets": lambda s: s["param_groups"][0].update(feedback="[" * 100_000),
    "overrides of brackets": lambda s: last(s).update(overrides="[" * 100_000),
    "an override beyond all floats": lambda s: last(s).update(overrides=[[0, {"lr": 10**400}]]),
    "an override to NaN": lambda s: last(s).update(overrides='[[0, {"lr": NaN}]]'),
    "overrides out of order": lambda s: last(s).update(
        overrides=[[3, {"eps": 1e-6}], [1, {"eps": 1e-7}]]
    ),
    "an override at a step beyond all": lambda s: last(s).update(overrides=[[10**400, {}]]),
    **{
        f"names that are {names!r}": lambda s, names=names: last(s).update(param_names=names)
        for names in (5, "ab", {"a": 1}, torch.ones(2))
    },
    **{
        f"shapes that are {shapes!r}": lambda s, shapes=shapes: last(s).update(param_shapes=shapes)
        for shapes in (5, "ab", [1] * 5, ["ab"], [[-1]], [[10**400]], torch.ones(2))
    },
    **{
        f"a step that is {step!r}"[:40]: lambda s, step=step: of_last(s).update(step=step)
        for step in (10**400, 1e30, 2**63, torch.tensor(1e30), torch.ones(2) * 1j)
    },
    "a step of thousands of digits": lambda s: of_last(s).update(step=10**5000),
    "a step without data": lambda s: of_last(s).update(step=torch.ones((), device="meta")),
    **{
        f"a clock that is {clock:.0e}": every_clock(int(clock))
        for clock in (2.0**53 + 2, 1e18, 1e200)
    },
    "a clock of thousands of digits": every_clock(10**5000),
    "a run beyond all steps": lambda s: s["param_groups"][0].update(
        run={"steps": 10**30, "steps_per_epoch": None}
    ),
    "planned beyond all steps": lambda s: s["param_groups"][0].update(
        planned={"steps": 10**30, "steps_per_epoch": None}
    ),
    "exp_avg without data": lambda s: of_last(s).update(exp_avg=of_last(s)["exp_avg"].to("meta")),
    "a sparse exp_avg": lambda s: of_last(s).update(exp_avg=of_last(s)["exp_avg"].to_sparse()),
    "a complex exp_avg": lambda s: of_last(s).update(exp_avg=of_last(s)["exp_avg"] * 1j),
    "exp_avg in 8 bits": lambda s: of_last(s).update(
        exp_avg=of_last(s)["exp_avg"].to(torch.float8_e4m3fn)
    ),
}

#: what a plateau cannot have done to the lr
MULTIPLIERS = [
    *([[2, value]] for value in (-1.0, math.nan, math.inf, 1.0, 5.0, "x", True, None, 10**400)),
    *([[step, 0.5]] for step in (-1, 1.5, True, 10**400)),
    *([[2, 0.5], [3, 0.5]], [[2, 0.5], [3, 0.7]], [[3, 0.5], [2, 0.1]]),
    *(5, {}, [5], [[2]], [[2, 0.5, 1]]),
]


@pytest.mark.parametrize("changes", MULTIPLIERS, ids=lambda changes: str(changes)[:30])
def test_what_no_plateau_does_is_refused(changes):
    _, other = running(8)
    state = copy.deepcopy(other.state_dict())
    seen(lambda f: f.update(changes=changes), "changes")(state)
    model, optimizer = running()
    with assert_refused(model, optimizer, lm.StateError, r"plateau of plan .* has changes="):
        optimizer.load_state_dict(state)
    with pytest.raises(lm.StateError, match="has changes="):
        PLAN.build(encoder(), steps=20, resume=state)


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.999])
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("worst", [1.0, math.inf, -math.inf])
def test_whatever_reactions_see_is_taken_back(factor, mode, worst):
    """Everything that reports can lead to loads again, infinite metrics too."""
    plan = lm.Plan(
        lm.SGD,
        lr=0.1,
        feedback=lm.plateau("loss", factor=factor, patience=0, mode=mode, cooldown=1),
        stop=lm.early_stop("loss", patience=5, mode=mode),
        rules=[lm.Rule("encoder.layer.0.*", thaw=lm.on_plateau("loss", mode=mode, patience=1))],
    )
    model = encoder()
    optimizer = plan.build(model, steps=40)
    for value in (worst, 1.0, worst, 0.5, 2.0, 2.0, 2.0, worst):
        train(model, optimizer, 1, first=optimizer.clock)
        for _ in range(2):
            optimizer.report(loss=value)
        again = plan.build(encoder(), steps=40)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()), strict=True)
        assert again.param_groups[0]["feedback"] == optimizer.param_groups[0]["feedback"]
        lr = [[group["lr"] for group in each.param_groups] for each in (again, optimizer)]
        assert lr[0] == lr[1]


#: hyperparameters serve the report alone: what none can be is shown, and nothing else
SHOWN = [{}, {1}, [{}], "x", 10**400, 10**5000, 1j, [[[]]], torch.ones((), device="meta")]


@pytest.mark.parametrize("value", SHOWN, ids=lambda value: type(value).__name__)
def test_a_saved_hyperparameter_that_cannot_be_one_is_reported(value):
    _, other = running(8)
    state = copy.deepcopy(other.state_dict())
    for group in state["param_groups"]:
        group["lr"] = value
    _, optimizer = running()
    lr = [group["lr"] for group in other.param_groups]
    optimizer.load_state_dict(state)
    assert [group["lr"] for group in optimizer.param_groups] == lr
    assert "lr of 'embeddings': " in str(optimizer.last_load)


def test_a_hyperparameter_too_deep_to_be_read_names_what_was_read():
    _, other = running(8)
    state = copy.deepcopy(other.state_dict())
    deep = []
    for _ in range(100_000):
        deep = [deep]
    state["param_groups"][0]["lr"] = deep
    model, optimizer = running()
    with assert_refused(
        model, optimizer, lm.StateError, "the saved hyperparameters cannot be read"
    ):
        optimizer.load_state_dict(state)


def test_a_parameter_in_the_state_is_copied_as_a_tensor():
    _, other = running(8)
    state = copy.deepcopy(other.state_dict())
    of_last(state)["exp_avg"] = torch.nn.Parameter(of_last(state)["exp_avg"])
    _, optimizer = running()
    optimizer.load_state_dict(state)
    assert not any(v.requires_grad for entry in optimizer.state.values() for v in entry.values())
    copy.deepcopy(optimizer)  # of a graph, torch makes no copy


@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_state_changes_nothing(stage):
    _, other = running(8)
    state = copy.deepcopy(other.state_dict())
    STAGES[stage](state)
    model, optimizer = running()
    optimizer.load_state_dict(optimizer.state_dict())
    before = picture(model, optimizer)
    with pytest.raises(lm.StateError):
        optimizer.load_state_dict(state)
    assert equal(picture(model, optimizer), before)
    train(model, optimizer, 1, first=5)
    assert optimizer.clock == 6


def test_canary_a_load_that_succeeds_is_seen_in_the_picture():
    _, other = running(8)
    model, optimizer = running()
    before = picture(model, optimizer)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    after = picture(model, optimizer)
    changed = {key for key in before if not equal(before[key], after[key])}
    assert changed == {"state", "groups", "published", "active", "flags", "modes", "report"} - (
        {"modes"} if before["modes"] == after["modes"] else set()
    )


def fails(*_, **__):
    raise RuntimeError("planted")


@pytest.mark.parametrize("part", ["match", "restore_history", "values_at"])
def test_a_failure_inside_changes_nothing(part, monkeypatch):
    _, other = running(8)
    model, optimizer = running()
    before = picture(model, optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(load, part, fails)
        with pytest.raises(RuntimeError, match="planted"):
            optimizer.load_state_dict(other.state_dict())
    assert equal(picture(model, optimizer), before)


def test_a_failure_in_the_last_entry_changes_nothing(monkeypatch):
    _, other = running(8)
    model, optimizer = running()
    before, genuine, calls = picture(model, optimizer), entries.own_entry, []

    def last_fails(*args):
        calls.append(1)
        return fails() if len(calls) == 15 else genuine(*args)

    with monkeypatch.context() as patch:
        patch.setattr(load, "own_entry", last_fails)
        with pytest.raises(
            lm.StateError, match=r"state of '.*bias' cannot be read.*planted"
        ) as error:
            optimizer.load_state_dict(other.state_dict())
    assert isinstance(error.value.__cause__, RuntimeError)
    assert len(calls) == 15
    assert equal(picture(model, optimizer), before)


def test_a_pre_hook_that_raises_changes_nothing():
    _, other = running(8)
    model, optimizer = running()
    before = picture(model, optimizer)
    handle = optimizer.register_load_state_dict_pre_hook(fails)
    with pytest.raises(RuntimeError, match="planted"):
        optimizer.load_state_dict(other.state_dict())
    assert equal(picture(model, optimizer), before)
    handle.remove()
    saved = other.state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda _, state: state.update(param_groups=[]))
    with pytest.raises(lm.StateError):
        optimizer.load_state_dict(saved)
    assert saved["param_groups"]  # what a hook changes is not the caller's dict
    assert equal(picture(model, optimizer), before)


def test_a_schedule_that_fails_at_the_clock_changes_nothing():
    def falls(step):
        return 1.5 - 0.001 * step

    plan = lm.Plan(lm.SGD, lr=0.1, schedule=lm.from_function(falls))
    model = encoder()
    optimizer = plan.build(model)
    state = copy.deepcopy(optimizer.state_dict())
    every_clock(2000)(state)
    with assert_refused(model, optimizer, lm.ScheduleError, "at step 2000"):
        optimizer.load_state_dict(state)


def test_a_build_that_cannot_resume_gives_the_model_back():
    _, other = running(8)
    state = copy.deepcopy(other.state_dict())
    of_last(state).update(exp_avg="x")
    model = encoder()
    with pytest.raises(lm.StateError):
        PLAN.build(model, steps=20, resume=state)
    assert all(p.requires_grad for p in model.parameters())
    assert lm.Plan(lm.SGD, lr=0.1).build(model).findings == ()
