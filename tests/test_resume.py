"""A run that was cut off and goes on ends with the same bits as one that was not."""

import dataclasses
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import resume_task
import training_task
from lamina import SGD, LaminaError, LaminaWarning, Plan, Rule, StateError, checkpoint, early_stop
from lamina.training import Task, fit, prepare_run
from lamina.training.resume import saved_task


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    monkeypatch.setattr("lamina.training.run_folder.RunFolder.picture", lambda *_: None)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


def variant(base=resume_task, **changes):
    """The task with some of its functions replaced."""
    module = types.ModuleType("variant")
    module.__dict__.update({**vars(base), **changes, "__name__": "variant"})
    return Task("variant", module)


def cut(task, call):
    """The task, stopped by Ctrl-C in a call of its loss."""
    calls = iter(range(10_000))

    def loss(model, batch):
        if next(calls) == call:
            raise KeyboardInterrupt
        return task.module.loss(model, batch)

    return variant(task.module, loss=loss)


def rows(folder):
    """The record of a run without its timings."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def weights(folder):
    return checkpoint.newest(Path(folder) / "checkpoints").content


def assert_same(one, other):
    """Equal records, weights and optimizer state, bit by bit."""
    assert rows(one) == rows(other)
    a, b = weights(one), weights(other)
    assert a["clock"] == b["clock"]
    torch.testing.assert_close(dict(a["model"]), dict(b["model"]), rtol=0, atol=0)
    torch.testing.assert_close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=0, atol=0)
    assert a["best"] == b["best"]
    groups = [
        [{**g, "params": len(g["params"])} for g in x["optimizer"]["param_groups"]] for x in (a, b)
    ]
    assert groups[0] == groups[1]


def workers():
    """Loaders whose worker processes draw."""
    made = resume_task.data()
    train = DataLoader(made["train"].dataset, batch_size=8, shuffle=True, num_workers=2)
    return {**made, "train": train}


# ------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize(
    ("changes", "settings", "calls"),
    [
        ({}, {}, (1, 9, 14)),
        ({}, {"accumulate": 3}, (5, 9, 15)),
        ({"data": workers}, {"epochs": 2}, (10,)),
    ],
    ids=["main process", "accumulated", "workers"],
)
def test_a_run_cut_off_goes_on_with_the_same_bits(tmp_path, changes, settings, calls):
    task = variant(**changes)
    settings = {**settings, "cpu": True, "save_every": 1}
    fit(task, out=tmp_path / "whole", **settings)
    for call in calls:
        out = tmp_path / f"cut-{call}"
        assert fit(cut(task, call), out=out, **settings).interrupted
        result = fit(task, resume=out, cpu=True)
        assert_same(tmp_path / "whole", out)
        assert result.confirmation.agrees
        assert str(result.confirmation).startswith(f"applied as planned: {result.steps} steps")


@pytest.mark.parametrize("lost", ["start", "before", "after"])
def test_canary_each_of_the_three_states_is_needed(tmp_path, lost, monkeypatch):
    from lamina.training import snapshot

    data = workers if lost == "start" else resume_task.data
    task = variant(data=data)
    settings = {"epochs": 2, "cpu": True, "save_every": 1}
    fit(task, out=tmp_path / "whole", **settings)
    fit(cut(task, 4), out=tmp_path / "cut", **settings)
    whole = snapshot.Snapshot.position

    def without(self, process):
        position = whole(self, process)
        wrong = {**position.start, "torch": torch.Generator().manual_seed(1).get_state()}
        return dataclasses.replace(position, **{lost: wrong})

    monkeypatch.setattr(snapshot.Snapshot, "position", without)
    fit(task, resume=tmp_path / "cut")
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_stream_read_by_the_dispatcher(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __len__(self):
            return 40

        def __iter__(self):
            for _ in range(40):
                point = torch.randn(4)
                yield point, (point[0] > 0).long()

    made = resume_task.data()
    task = variant(data=lambda: {**made, "train": DataLoader(Stream(), batch_size=8)})
    settings = {"epochs": 2, "cpu": True, "save_every": 1}
    fit(task, out=tmp_path / "whole", **settings)
    fit(cut(task, 10), out=tmp_path / "cut", **settings)
    fit(task, resume=tmp_path / "cut")
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_generators_of_ones_own(tmp_path):
    def data():
        made = resume_task.data()
        points = made["train"].dataset
        sampler = torch.utils.data.WeightedRandomSampler(
            torch.arange(1.0, 52.0), 51, generator=torch.Generator().manual_seed(4)
        )
        return {**made, "train": DataLoader(points, batch_size=8, sampler=sampler)}

    task = variant(data=data)
    settings = {"cpu": True, "save_every": 1}
    fit(task, out=tmp_path / "whole", **settings)
    fit(cut(task, 15), out=tmp_path / "cut", **settings)
    fit(task, resume=tmp_path / "cut")
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_step_that_was_skipped_counts_as_data(tmp_path):
    """The position is one of batches: the clock stands still where the gradient is not finite."""

    def task(bad, stop=None):
        calls = iter(range(1000))

        def loss(model, batch):
            call = next(calls)
            if call == stop:
                raise KeyboardInterrupt
            return training_task.loss(model, batch) * (math.inf if call == bad else 1)

        def metrics(model, batch):
            return {"loss": (model(batch[0])[:, 0] - batch[0][:, 0]).abs()}

        return variant(training_task, loss=loss, metrics=metrics)

    plan = Plan(SGD, lr=0.1, clip_norm=1.0, nonfinite="skip")
    fit(task(2), plan, out=tmp_path / "whole", cpu=True)
    fit(task(2, stop=5), plan, out=tmp_path / "cut", cpu=True)
    assert weights(tmp_path / "cut")["batches"] == 5
    assert weights(tmp_path / "cut")["clock"] == 4
    fit(task(None), resume=tmp_path / "cut", cpu=True)
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert weights(tmp_path / "cut")["skipped"] == 1


def with_scaler(session):
    """Scale the loss as fp16 does on a GPU, from too large a scale at first."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=5)
    session.accelerator.scaler = scaler
    return session


def test_the_scale_of_fp16_goes_on(tmp_path, monkeypatch):
    from lamina.training import session

    before = session.Session.__post_init__

    def scaled(self):
        with_scaler(self)
        before(self)

    monkeypatch.setattr(session.Session, "__post_init__", scaled)
    task = variant(training_task, loss=lambda m, batch: 16 * training_task.loss(m, batch))
    plan = Plan(SGD, lr=0.01)
    fit(task, plan, out=tmp_path / "whole", cpu=True)
    fit(cut(task, 4), plan, out=tmp_path / "cut", cpu=True)
    saved = weights(tmp_path / "cut")
    assert saved["clock"] < saved["batches"] == 4  # the first steps were skipped
    assert saved["scaler"]["scale"] < 2.0**127
    fit(task, plan, resume=tmp_path / "cut", cpu=True)
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert weights(tmp_path / "whole")["scaler"] == weights(tmp_path / "cut")["scaler"]


def test_early_stopping_goes_on_counting(tmp_path):
    plan = Plan(SGD, lr=1e-9, stop=early_stop("val_loss", patience=3, min_delta=0.5))
    settings = {"epochs": 9, "cpu": True}
    fit(training_task, plan, out=tmp_path / "whole", **settings)
    fit(cut(Task("training_task", training_task), 22), plan, out=tmp_path / "cut", **settings)
    fit(variant(training_task), resume=tmp_path / "cut", cpu=True)
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert rows(tmp_path / "cut")[-1]["event"] == "stop"
    with pytest.raises(StateError, match="finished: it stopped early at step 28 of 63"):
        prepare_run(variant(training_task), resume=tmp_path / "cut", cpu=True)
    with pytest.raises(StateError, match="stopped early"):
        prepare_run(variant(training_task), resume=tmp_path / "cut", epochs=20, cpu=True)


# ------------------------------------------------------------------------------ what is kept, when


def names(out, kind="*"):
    return sorted(path.name for path in (out / "checkpoints").glob(f"{kind}-*"))


def test_the_last_two_and_the_best_are_kept(out):
    losses, calls = [3.0, 1.0, math.nan, 1.0, 2.0], iter(range(100))

    def metrics(model, batch):  # called for three batches in each validation
        return {"loss": torch.full((len(batch[0]),), losses[next(calls) // 3])}

    task = variant(training_task, metrics=metrics)
    fit(task, Plan(SGD, lr=0.1), epochs=5, out=out, cpu=True)
    assert [name[:13] for name in names(out)] == ["best-00000014", "step-00000028", "step-00000035"]
    assert weights(out)["best"] == {"metric": "val_loss", "value": 1.0, "step": 14}


def test_what_the_plan_stops_by_says_what_is_best(out):
    plan = Plan(SGD, lr=0.1, stop=early_stop("val_accuracy", patience=99, mode="max"))
    fit(training_task, plan, epochs=4, out=out, cpu=True)
    accuracy = {
        row["step"]: row["averages"]["accuracy"] for row in rows(out) if row["kind"] == "validation"
    }
    best = weights(out)["best"]
    assert best["metric"] == "val_accuracy"
    assert best["value"] == max(accuracy.values())
    assert best["step"] == min(step for step, value in accuracy.items() if value == best["value"])


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        ("1 epochs", {7, 14}),
        ("50%", {7, 14}),
        (4, {4, 7, 8, 12, 14}),
        ("0.5 epochs", {4, 7, 11, 14}),
    ],
)
def test_save_every(out, every, steps, monkeypatch):
    seen = []
    write = checkpoint.save
    monkeypatch.setattr(
        "lamina.training.saver.save", lambda *a, **k: (seen.append(a[1]), write(*a, **k))[1]
    )
    fit(training_task, out=out, cpu=True, save_every=every, keep=3)
    best = weights(out)["best"]["step"]  # each best is saved as well
    assert set(seen) - {best} <= steps
    assert steps - {7} <= set(seen)
    assert len(seen) == len(set(seen))
    assert len(names(out, "step")) == min(3, len(seen))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_every": "0 steps"}, "save_every='0 steps'"),
        ({"save_every": "often"}, "'often' is not a length of time"),
        ({"save_every": 0.5}, "0.5 has no unit"),
        ({"keep": 0}, "keep=0"),
    ],
)
def test_saving_that_cannot_be_meant(out, settings, message):
    with pytest.raises(LaminaError, match=message):
        fit(training_task, out=out, cpu=True, **settings)
    assert not out.exists()


# ------------------------------------------------------------------------------- what can be wrong


@pytest.fixture
def stopped(out):
    """A run that was stopped in its second epoch, saved at steps 7 and 9."""
    fit(cut(Task("training_task", training_task), 12), PLAN, out=out, cpu=True, seed=3)
    assert [name[:13] for name in names(out, "step")] == ["step-00000007", "step-00000009"]
    return out


PLAN = Plan.from_toml(training_task.PLAN)


def again(stopped, **settings):
    return fit(variant(training_task), resume=stopped, cpu=True, **settings)


def newest(stopped):
    return checkpoint.candidates(stopped / "checkpoints")[0]


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over(stopped, tmp_path):
    events = []

    class Heard:
        def on_event(self, event):
            events.append((event.kind, event.text))

        on_step = on_validation = lambda *_: None

    bad = newest(stopped)
    bad.write_bytes(bad.read_bytes()[:-100])
    again(stopped, listeners=[Heard()])
    assert events[0][0] == "resumed"
    assert bad.name in events[0][1]
    assert "step-00000007" in events[0][1]
    noted = json.loads((stopped / "run.json").read_text())["resumed"]
    assert noted[0]["passed_over"] == [bad.name]
    assert (stopped / "checkpoints" / f"{bad.name}.damaged").exists()
    fit(variant(training_task), PLAN, out=tmp_path / "whole", cpu=True)
    assert_same(stopped, tmp_path / "whole")


def test_no_checkpoint_is_whole(stopped):
    bad = list((stopped / "checkpoints").glob("step-*"))
    for path in bad:
        damage(path)
    with pytest.raises(StateError, match="no checkpoint is whole") as error:
        again(stopped)
    assert all(path.name in str(error.value) for path in bad)


def rewritten(stopped, **changes):
    """The newest checkpoint, written again with other content under its right checksum."""
    path = newest(stopped)
    content = {**checkpoint.read(path), **changes}
    path.unlink()
    format = content.pop("format")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", format)
        checkpoint.save(stopped / "checkpoints", 9, content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "has format 99, and this version of lamina reads up to 1"),
        ({"task": "other"}, "of the task 'other', but 'variant' was given"),
        (
            {
                "processes": 2,
                "random": [dict.fromkeys(("start", "before", "after"))] * 2,
                "data": {"batches": 7, "examples_in_a_batch": 8, "examples": 49},
            },
            "had 7 steps per epoch .* has 4 now",
        ),
        (
            {"model": {"head.weight": torch.zeros(3)}},
            "of another model: .*'?layer.0.weight, .* and 2 more",
        ),
        ({"clock": -1}, "its 'clock' is -1"),
        ({"random": []}, "random states"),
        ({"optimizer": {"state": {}}}, "has no groups"),
        ({"optimizer": {"state": {}, "param_groups": [{"params": [0]}]}}, "no parameter names"),
        (
            {"data": {"batches": 9, "examples_in_a_batch": 8, "examples": 49}},
            "had 9 batches .* has 7 now",
        ),
        ({"scaler": {}}, "with fp16"),
    ],
)
def test_a_checkpoint_that_does_not_fit(stopped, changes, message):
    rewritten(stopped, **changes)
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(StateError, match=message):
        again(stopped)
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}


def test_a_state_that_is_not_lamina_s_is_refused_and_the_folder_left_alone(stopped):
    rewritten(stopped, optimizer={"state": {}, "param_groups": [{"params": [0]}]})
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(StateError, match="state"):
        again(stopped)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 4}, "seed=4 was given, but the run to resume has seed=3"),
        ({"accumulate": 2}, "accumulate=2"),
        ({"mixed_precision": "bf16"}, "mixed_precision='bf16'"),
        ({"out": "elsewhere"}, "out='elsewhere' and resume="),
        ({"epochs": 1}, r"at step 9, and this one is to end after 7 steps; give it more"),
        ({"epochs": 1.5}, r"planned for 14 steps.*this one has 11.*--extend"),
        (
            {"extend": "hole"},
            r"extend='hole': expected None, 'hold' or 'stretch'.*Did you mean 'hold'",
        ),
    ],
)
def test_settings_that_contradict_the_run(stopped, settings, message):
    with pytest.raises(LaminaError, match=message):
        again(stopped, **settings)


@pytest.mark.parametrize("extend", ["hold", "stretch"])
def test_a_finished_run_says_so_and_can_be_made_longer(out, stopped, extend):
    again(stopped)
    with pytest.raises(StateError, match=r"finished: it is at step 14 of 14.*more --epochs than 2"):
        again(stopped)
    with pytest.raises(StateError, match=r"planned for 14 steps.*this one has 18"):
        again(stopped, epochs=2.5)
    result = again(stopped, epochs=2.5, extend=extend)
    assert result.steps == 18
    steps = [row for row in rows(out) if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(18))
    held = [row["lr"] for row in steps[14:]]
    end = again_values(stopped, 13, 14)
    assert (held == [end[1]] * 4) is (extend == "hold")
    assert str(result.confirmation).startswith("applied as planned: 4 steps")


def again_values(folder, *steps):
    """The lr of every group of the run as it was first planned."""
    preview = Plan.from_toml(folder / "plan.toml").preview(
        variant(training_task).model(), steps=14, steps_per_epoch=7
    )
    return [{name: hyper["lr"] for name, hyper in preview.at(step).items()} for step in steps]


def test_extend_needs_a_run_to_resume():
    with pytest.raises(LaminaError, match=r"extend='hold'.*--resume"):
        prepare_run(variant(training_task), PLAN, extend="hold", cpu=True)


def test_part_of_an_epoch_can_be_made_longer(tmp_path):
    """It goes on in the middle of the epoch, with the data that were not used yet."""
    plan, task = Plan(SGD, lr=0.1), variant()
    fit(task, plan, epochs=2, out=tmp_path / "whole", cpu=True)
    fit(task, plan, epochs=1.3, out=tmp_path / "longer", cpu=True)
    fit(task, resume=tmp_path / "longer", epochs=2, cpu=True)
    steps = [
        [row for row in rows(tmp_path / name) if row["kind"] == "step"]
        for name in ("whole", "longer")
    ]
    assert [row["examples"] for row in steps[0]] == [row["examples"] for row in steps[1]]
    assert steps[0][:10] == steps[1][:10]


def test_a_new_plan_is_taken_and_confirmed_from_there_on(stopped):
    plan = Plan(SGD, lr=0.5)
    with pytest.warns(LaminaWarning, match="of another optimizer: layer.0.weight"):
        result = fit(variant(training_task), plan, resume=stopped, cpu=True)
    assert str(result.confirmation).startswith("applied as planned: 5 steps, 1 groups")
    assert Plan.from_toml(stopped / "plan.toml") == plan
    assert rows(stopped)[-2]["lr"] == {"default": 0.5}


def test_a_plan_that_toml_cannot_hold_comes_from_the_task(tmp_path):
    plan = Plan(SGD, lr=0.1, rules=[Rule(lambda info: info.ndim < 2, weight_decay=0)])
    task = variant(training_task, PLAN=plan)
    fit(task, out=tmp_path / "whole", cpu=True)
    fit(cut(task, 12), out=tmp_path / "cut", cpu=True)
    with pytest.raises(StateError, match="could not be written as TOML"):
        fit(variant(training_task), resume=tmp_path / "cut", cpu=True)
    fit(task, resume=tmp_path / "cut", cpu=True)
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_record_that_was_changed(stopped):
    metrics = stopped / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:200])
    with pytest.raises(StateError, match="the record of the run was changed"):
        again(stopped)
    metrics.unlink()
    result = again(stopped)
    assert [row["step"] for row in rows(stopped) if row["kind"] == "step"] == list(range(9, 14))
    assert result.confirmation.agrees


def test_two_processes_do_not_train_in_one_folder(stopped):
    holder = (
        "import sys, time\nfrom pathlib import Path\n"
        "from lamina.training.folder_lock import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(60)\n"
    )
    command = [sys.executable, "-c", holder, str(stopped)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(LaminaError, match="another process uses this run"):
                again(stopped)
        finally:
            other.kill()
    again(stopped)


def test_folders_that_are_not_runs(tmp_path, out):
    with pytest.raises(StateError, match="there is no such folder"):
        again(tmp_path / "gone")
    with pytest.raises(StateError, match=r"run.json cannot be read"):
        again(tmp_path)
    fit(cut(Task("training_task", training_task), 0), PLAN, out=out, cpu=True)
    with pytest.raises(StateError, match="has no checkpoint"):
        again(out)


def test_a_task_file_in_the_folder_of_the_run_is_not_run(tmp_path):
    about = {"task": "evil", "task_file": str(tmp_path / "evil.py")}
    (tmp_path / "run.json").write_text(json.dumps(about))
    with pytest.raises(LaminaError, match="lies in the folder of the run"):
        saved_task(tmp_path)


# ----------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("function", ["lamina.files.atomic.Hashing.write", "os.fsync"])
def test_a_full_disk_leaves_the_checkpoints_as_they_are(stopped, function, monkeypatch):
    import os

    from lamina.files import atomic as files

    before = {path: path.read_bytes() for path in (stopped / "checkpoints").iterdir()}
    owner, name = (files.Hashing, "write") if "Hashing" in function else (os, "fsync")
    real = getattr(owner, name)
    armed = []

    def full(*args):
        if armed:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(owner, name, full)
    with prepare_run(variant(training_task), resume=stopped, cpu=True) as session:
        step = session.optimizer.step
        session.optimizer.step = lambda *a, **k: (armed.append(1), step(*a, **k))[1]
        with pytest.raises(LaminaError, match=r"No space left on device.*Free some space"):
            session.train()
        session.optimizer.step = step
    monkeypatch.undo()
    assert before == {path: path.read_bytes() for path in (stopped / "checkpoints").iterdir()}
    assert [path.name for path in stopped.rglob(".*")] == [".lock"]


def test_what_another_plan_leaves_behind_is_said(stopped):
    events = []

    class Heard:
        def on_event(self, event):
            events.append(event.text)

        on_step = on_validation = lambda *_: None

    with pytest.warns(LaminaWarning, match="of another optimizer: layer.0.weight"):
        again(stopped, plan=Plan(SGD, lr=0.5), listeners=[Heard()])
    assert "restarted, since the state was another optimizer's: " in events[0]
    noted = json.loads((stopped / "run.json").read_text())["resumed"]
    assert noted[0]["changed"][0].startswith("restarted")


def test_a_checkpoint_under_the_name_of_another_step_is_refused(stopped):
    path = newest(stopped)
    path.rename(path.with_name(path.name.replace("step-00000009", "step-00000090")))
    with pytest.raises(StateError, match=r"step-00000090.*is of step 9; it was renamed"):
        again(stopped)
