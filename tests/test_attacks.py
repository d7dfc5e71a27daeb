"""The attacks of `python -m benchmarks.attacks`: small ones here, whole ones by `make soak`.

Each also meets a fault that is planted, which it must count: an attack that sees nothing proves
nothing.
"""

import re
import shutil
import sys

import pytest
import torch
from benchmarks.attacks import kills, plans, resumes, states, steps
from benchmarks.attacks.__main__ import ATTACKS
from benchmarks.attacks.count import Counts, Wrong, empty_folder, table
from benchmarks.attacks.gradients import gradients

import lamina as lm
import resume_task
from lamina.training import fit


def faults(rows):
    """How many faults of each kind all the rows have, and what is said of them."""
    kinds = ("code run", "hang", "traceback", "wrong")
    return {k: sum(row.numbers[k] for row in rows) for k in kinds}, [row.notes for row in rows]


def assert_clean(rows):
    print(f"\n{table(rows)}")
    found, notes = faults(rows)
    assert not any(found.values()), notes
    assert all(row.tried for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # of the resumes there are sixty, each in two new processes
@pytest.mark.parametrize("name", ATTACKS)
def test_attack_at_full_size(name):
    assert_clean(ATTACKS[name]())


# ----------------------------------------------------------------------------------- the counting


def hang():
    while True:
        pass


def run_code():
    open("ran", "w").close()


def raise_raw():
    raise KeyError("raw")


def be_wrong():
    raise Wrong("other bits")


def refuse():
    raise lm.StateError("what was given, what was expected,\nthe fix")


@pytest.mark.parametrize(
    ("work", "kind"),
    [
        (hang, "hang"),
        (run_code, "code run"),
        (raise_raw, "traceback"),
        (be_wrong, "wrong"),
        (refuse, "refused in one line"),
        (lambda: re.match(r"(a|a)*b", "a" * 40), "hang"),
        (lambda: "taken", "taken"),
        (lambda: "refused", "refused in one line"),
    ],
)
def test_an_attempt_is_counted_once_as_what_it_was(work, kind):
    counts = Counts("canary", limit=0.2)
    with empty_folder() as folder:
        assert counts.attempt("it", work) == kind
        assert not list(folder.iterdir())
    assert {k: n for k, n in counts.numbers.items() if n} == {kind: 1}
    assert counts.tried == 1
    assert table([counts]).splitlines()[2].startswith("| canary | 1 | ")
    assert bool(counts.notes) == bool(counts.faults)


def test_an_error_that_quotes_all_it_was_given_is_a_fault(monkeypatch):
    monkeypatch.setattr(lm.LaminaError, "__init__", Exception.__init__)

    def work():
        raise lm.PlanError("x" * 10_000)

    counts = Counts("canary")
    assert counts.attempt("it", work) == "wrong"


# -------------------------------------------------------------------------------------- gradients


def test_gradients():
    assert_clean(gradients(full=False))


def test_canary_gradients_that_are_not_looked_at(monkeypatch):
    monkeypatch.setattr("lamina.optimizer.steps.check_finite", lambda *_: None)
    found, _ = faults(gradients(full=False))
    assert found["wrong"] > 15


# --------------------------------------------------------------------------- states, checkpoints


def test_states_and_checkpoints():
    assert_clean(states.states(full=False))
    assert_clean(states.checkpoints(full=False))


def test_canary_states_that_are_not_validated(monkeypatch):
    """A load that changes the weights before it finds a fault."""
    load = lm.Optimizer.load_state_dict

    def careless(self, state):
        self.param_groups[0]["lr"] = 7.0
        load(self, state)

    monkeypatch.setattr(lm.Optimizer, "load_state_dict", careless)
    found, _ = faults(states.states(full=False))
    assert found["wrong"] > 4


def test_canary_checkpoints_that_run_code(monkeypatch):
    def trusting(source, **keywords):
        return load(source, **{**keywords, "weights_only": False})

    load = torch.load
    monkeypatch.setattr(torch, "load", trusting)
    found, _ = faults(states.checkpoints(full=False))
    assert found["code run"] > 0


# ------------------------------------------------------------------------------------------ plans


def test_plans():
    assert_clean(plans.plans(full=False))


def test_every_plan_that_is_mutated_is_one():
    assert [plans.read_and_show(text) for text in plans.PLANS] == ["taken"] * len(plans.PLANS)


def test_canary_a_grammar_that_evaluates_and_one_that_lets_errors_through(monkeypatch):
    monkeypatch.setattr("lamina.plan.validate.parse", lambda text, *rest: eval(text, {}))
    monkeypatch.setattr("lamina.plan.toml._CAUSED_BY_TEXT", ())
    found, _ = faults(plans.plans(full=False))
    assert found["code run"] > 0
    assert found["traceback"] > 0


@pytest.mark.parametrize("name", ["plan\0.toml", "plan\ud800.toml", "p\0" * 3000, "\udcff" * 3000])
def test_a_name_that_no_file_can_have_is_refused(name):
    with pytest.raises(lm.PlanError, match="cannot be read as a plan file") as caught:
        lm.Plan.from_toml(name)
    assert str(caught.value).isprintable()


# -------------------------------------------------------------------------------- kills, resumes


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """The folder of a run that ended."""
    monkeypatch.setattr("lamina.training.run_folder.RunFolder.picture", lambda *_: None)
    fit(resume_task, out=tmp_path / "run", epochs=1, cpu=True)
    return tmp_path / "run"


def repeat_a_line(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], *lines[1:]]))


def driven(finished, statuses):
    """What would drive runs that are killed, but leaves whole ones."""

    def drive(folder, jobs, **environment):
        for job in jobs:
            shutil.copytree(finished, job["out"], dirs_exist_ok=True)
        return [0, *statuses]

    return drive


@pytest.mark.parametrize(
    ("statuses", "spoil", "wrong"),
    [
        ([-9, 0], lambda folder: None, 0),
        ([0, 0], lambda folder: None, 1),
        ([-9, 1], lambda folder: None, 1),
        ([-9, 0], repeat_a_line, 1),
        ([-9, 0], lambda folder: (folder / ".left").touch(), 1),
    ],
)
def test_kills_are_judged(finished, monkeypatch, statuses, spoil, wrong):
    monkeypatch.setattr("test_kill.drive", driven(finished, statuses))
    rows = kills.kills(full=False, spoil=spoil)
    assert [row.numbers["wrong"] for row in rows] == [wrong], rows[0].notes
    assert sum(row.tried for row in rows) == 1


SAYS = "lamina: run: another process uses this run: process 12 on host, since 2026-01-01. Wait.\n"


def test_a_race_with_one_winner_is_right():
    assert resumes.judge([0, 2], ["", SAYS], [12, 13]) is None
    assert resumes.judge([2, 0], [SAYS, ""], [13, 12]) is None


@pytest.mark.parametrize(
    ("codes", "said", "message"),
    [
        ([0, 0], ["", ""], "both ended"),
        ([2, 2], [SAYS, SAYS], "both ended"),
        ([0, 1], ["", SAYS], "both ended"),
        ([0, 2], ["", "Traceback (most recent call last):\n"], "traceback"),
        ([0, 2], ["", SAYS * 2], "not one line"),
        ([0, 2], ["", SAYS.replace("process 12 on host", "it has just begun")], "not named"),
        ([0, 2], ["", SAYS.replace("12", "13")], "13 is named"),
    ],
)
def test_a_race_that_went_wrong_is_seen(codes, said, message):
    with pytest.raises(Wrong, match=message):
        resumes.judge(codes, said, [12, 13])


def test_a_record_with_a_step_twice_is_seen(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "other")
    resumes.judge_folder(finished, tmp_path / "other")
    repeat_a_line(tmp_path / "other")
    with pytest.raises(Wrong, match="twice"):
        resumes.judge_folder(finished, tmp_path / "other")


def test_a_record_whose_weights_differ_is_seen(finished, tmp_path):
    fit(resume_task, out=tmp_path / "other", epochs=1, cpu=True, seed=4)
    shutil.copy(finished / "metrics.jsonl", tmp_path / "other")
    with pytest.raises(Wrong, match="other bits"):
        resumes.judge_folder(finished, tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize("lock", [True, False])
def test_a_race_without_the_lock_of_the_folder_is_seen(lock):
    found, _ = faults(resumes.resumes(full=False, lock=lock))
    assert found["wrong"] == (0 if lock else 1)


# ------------------------------------------------------------------------------------------ steps


class Calls:
    """A clock that counts the calls of Python functions: the same on every machine."""

    def __init__(self):
        self.count = 0

    def __enter__(self):
        sys.setprofile(self._called)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _called(self, frame, event, argument):
        self.count += event == "call"

    def __call__(self):
        return self.count


def test_steps():
    with Calls() as clock:
        rows = steps.steps(full=False, clock=clock, show=False)
    assert_clean(rows)


def test_canary_steps_and_states_that_grow(monkeypatch):
    step, save = lm.Optimizer.step, lm.Optimizer.state_dict

    def slower(self, closure=None):
        for _ in range(10 * self.clock if self.plan.rules else 0):
            Calls.__call__(clock)
        return step(self, closure)

    monkeypatch.setattr(lm.Optimizer, "step", slower)
    monkeypatch.setattr(
        lm.Optimizer, "state_dict", lambda self: {**save(self), "more": "x" * 100 * self.clock}
    )
    with Calls() as clock:
        found, notes = faults(steps.steps(full=False, clock=clock, show=False))
    assert found["wrong"] == 2, notes
