"""The engine: what it records is what was applied, averages are exact, files are whole."""

import json
import math
import types
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import training_task
from lamina import (
    SGD,
    AdamW,
    LaminaError,
    NonFiniteError,
    Plan,
    Rule,
    TaskError,
    checkpoint,
    early_stop,
    plateau,
)
from lamina.files.atomic import atomic
from lamina.training import Task, fit, prepare_run
from lamina.training.display import Pace, PlainDisplay, lr_text
from lamina.training.evaluate import batch_size
from lamina.training.recorder import Recorder
from lamina.training.records import StepRecord

PLAN = Plan.from_toml(training_task.PLAN)
THAWS = ["layer.1.*", "layer.0.*"]


def variant(**changes):
    """The tiny task with some of its functions replaced; None removes one."""
    module = types.ModuleType("variant")
    module.__dict__.update({**vars(training_task), **changes, "__name__": "variant"})
    for name in [name for name, value in changes.items() if value is None]:
        delattr(module, name)
    return Task("variant", module)


def lines(folder, kind):
    text = (Path(folder) / "metrics.jsonl").read_text()
    return [row for row in map(json.loads, text.splitlines()) if row["kind"] == kind]


def load(folder):
    return checkpoint.newest(Path(folder) / "checkpoints").content


@pytest.fixture(autouse=True)
def _no_picture(request, monkeypatch):
    """Drawing takes longer than training here, so that only a test that asks for it does."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("lamina.training.run_folder.RunFolder.picture", lambda *_: None)


@pytest.fixture
def drawn():
    """Asks for the picture."""


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


# ------------------------------------------------------------------------------ what is recorded


def test_metrics_hold_what_the_optimizer_applied(out):
    with prepare_run(training_task, out=out, cpu=True) as session:
        applied = []
        step = session.optimizer.step

        def watched(*args, **kwargs):
            before = session.optimizer.clock
            result = step(*args, **kwargs)
            lr = {name: hyper["lr"] for name, hyper in session.optimizer.applied.items()}
            applied.append((before, lr, {k: float(v) for k, v in session.optimizer.norms.items()}))
            return result

        session.optimizer.step = watched
        result = session.train()
    rows = lines(out, "step")
    assert [(row["step"], row["lr"], row["norms"]) for row in rows] == applied
    assert len(rows) == result.steps == 14
    assert [row["epoch"] for row in rows] == [0] * 7 + [1] * 7
    assert str(result.confirmation).startswith("applied as planned: 14 steps")
    planned = session.preview
    assert all(
        row["lr"] == {name: hyper["lr"] for name, hyper in planned.at(row["step"]).items()}
        for row in rows
    )


def test_events_tell_every_thaw(out):
    fit(training_task, out=out, cpu=True)
    events = lines(out, "event")
    assert [(row["event"], row["groups"]) for row in events] == [("thaw", [g]) for g in THAWS]
    frozen = {
        row["step"]: [g for g, lr in row["lr"].items() if not lr] for row in lines(out, "step")
    }
    for row in events:
        assert row["groups"][0] in frozen[row["step"] - 1]
        assert row["groups"][0] not in frozen[row["step"]]


def test_freeze_is_told_as_well(out):
    plan = Plan(SGD, lr=0.1, rules=[Rule("layer.0", freeze=3)])
    fit(training_task, plan, epochs=1, out=out, cpu=True)
    assert [(row["event"], row["step"]) for row in lines(out, "event")] == [("freeze", 3)]


def test_a_skipped_step_is_told_and_not_counted(out):
    calls = iter(range(100))

    def loss(model, batch):
        return training_task.loss(model, batch) * (math.inf if next(calls) == 2 else 1)

    plan = Plan(SGD, lr=0.1, clip_norm=1.0, nonfinite="skip")
    result = fit(variant(loss=loss), plan, epochs=1, out=out, cpu=True)
    assert [(row["event"], row["step"]) for row in lines(out, "event")] == [("skipped", 2)]
    assert [row["step"] for row in lines(out, "step")] == list(range(6))
    assert result.steps == 6


def test_a_raised_step_leaves_a_record_and_no_checkpoint(out):
    calls = iter(range(100))

    def loss(model, batch):
        return training_task.loss(model, batch) * (math.nan if next(calls) == 2 else 1)

    with pytest.raises(NonFiniteError):
        fit(variant(loss=loss), Plan(SGD, lr=0.1, clip_norm=1.0), out=out, cpu=True)
    assert len(lines(out, "step")) == 2
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    assert not (out / "checkpoints").exists()


def test_numbers_that_json_lacks_are_null(tmp_path):
    recorder = Recorder(tmp_path / "m.jsonl")
    recorder.on_step(StepRecord(0, 0, math.nan, {"a": math.inf}, {}, 1, 0.0))
    recorder.close()
    row = json.loads((tmp_path / "m.jsonl").read_text())
    assert row["loss"] is None
    assert row["lr"] == {"a": None}


def test_plateaus_and_early_stopping_hear_the_held_out_metrics(out):
    plan = Plan(
        SGD,
        lr=1e-9,
        feedback=plateau("val_loss", factor=0.5, patience=0, threshold=0.5, min_factor=0.2),
        stop=early_stop("val_loss", patience=2, min_delta=0.5),
    )
    result = fit(training_task, plan, epochs=50, out=out, cpu=True)
    kinds = [row["event"] for row in lines(out, "event")]
    assert kinds[-1] == "stop"
    assert "feedback" in kinds
    assert result.steps < 50 * 7
    assert result.confirmation.agrees  # given what the metrics changed


# ----------------------------------------------------------------------------------- the training


@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_equals_a_loop_by_hand(out, accumulate):
    # 7 batches in steps of 3, 3 and 1: the last divides by the one batch that it has.
    order = training_task.data()["train"].dataset

    def data():
        loader = DataLoader(order, batch_size=8)
        return {"train": loader, "validation": loader}

    plan = Plan(SGD, lr=0.1)
    model = training_task.model()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task = variant(data=data, model=lambda: model)
    fit(task, plan, epochs=1, accumulate=accumulate, out=out, cpu=True)

    mine = training_task.model()
    mine.load_state_dict(start)
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
    batches = list(data()["train"])
    losses = []
    for begin in range(0, len(batches), accumulate):
        window = batches[begin : begin + accumulate]
        loss = sum(training_task.loss(mine, batch) for batch in window) / len(window)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch.testing.assert_close(load(out)["model"], dict(mine.state_dict()))
    assert [row["loss"] for row in lines(out, "step")] == pytest.approx(losses)
    assert load(out)["clock"] == len(losses)


def test_the_seed_decides_everything(tmp_path):
    runs = [
        fit(training_task, seed=s, out=tmp_path / f"{i}", cpu=True) for i, s in enumerate([5, 5, 6])
    ]
    weights = [load(run.folder)["model"]["head.weight"] for run in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert runs[0].metrics == runs[1].metrics


def test_part_of_an_epoch(out):
    result = fit(training_task, epochs=1.3, out=out, cpu=True)
    assert result.steps == math.ceil(1.3 * 7)
    assert [row["step"] for row in lines(out, "validation")] == [7, 10]


def test_everything_frozen_at_first_waits_for_the_thaw(out):
    plan = Plan(SGD, lr=0.1, thaw=3)
    result = fit(training_task, plan, epochs=1, out=out, cpu=True)
    assert result.steps == 7


def test_a_loss_without_gradient_is_an_error(out):
    task = variant(loss=lambda model, batch: training_task.loss(model, batch).detach())
    with pytest.raises(TaskError, match="without gradient"):
        fit(task, PLAN, out=out, cpu=True)


# ----------------------------------------------------------------------------------- the averages


def test_averages_are_exact_over_an_uneven_last_batch(out):
    result = fit(training_task, out=out, cpu=True)
    model = training_task.model()
    model.load_state_dict(load(out)["model"])
    points, labels = training_task.data()["validation"].dataset.tensors
    assert len(points) % 8
    with torch.no_grad():
        logits = model(points)
    right = (logits.argmax(1) == labels).double().mean().item()
    assert result.metrics["accuracy"] == pytest.approx(right, abs=1e-12)
    expected = functional.cross_entropy(logits, labels).item()
    assert result.metrics["loss"] == pytest.approx(expected, rel=1e-6)
    assert result.examples == len(points)
    assert lines(out, "validation")[-1]["averages"] == result.metrics


def test_a_task_without_metrics_gives_the_loss(out):
    result = fit(variant(metrics=None, baseline=None), PLAN, out=out, cpu=True)
    assert set(result.metrics) == {"loss"}


def test_a_metric_named_loss_is_the_only_call(out):
    def metrics(model, batch):
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"loss": functional.cross_entropy(model(batch[0]), batch[1], reduction="none")}

    def loss(model, batch):
        assert model.training
        return training_task.loss(model, batch)

    assert set(fit(variant(metrics=metrics, loss=loss), PLAN, out=out, cpu=True).metrics) == {
        "loss"
    }


def test_length_of_a_batch():
    tensor = torch.zeros(3, 2)
    for batch in (tensor, [tensor], {"x": tensor}, {"text": ["a"], "x": (tensor,)}, ("a", tensor)):
        assert batch_size(batch) == 3
    for batch in ("text", ["a", "b"], 3, torch.zeros(())):
        assert batch_size(batch) is None


# -------------------------------------------------------------------------------------- the files


@pytest.mark.usefixtures("drawn")
def test_the_run_folder(out):
    result = fit(training_task, out=out, cpu=True)
    names = {"plan.toml", "run.json", "metrics.jsonl", "lr.png", "planned.json"}
    assert {path.name for path in out.iterdir()} == {*names, "checkpoints", ".lock"}
    assert set(result.saved) == names
    assert result.checkpoint.parent == out / "checkpoints"
    assert Plan.from_toml(out / "plan.toml") == PLAN
    about = json.loads((out / "run.json").read_text())
    assert (about["seed"], about["epochs"], about["status"]) == (3, 2, "finished")
    assert about["versions"]["torch"] == torch.__version__
    assert (out / "lr.png").read_bytes().startswith(b"\x89PNG")
    saved = load(out)
    assert saved["clock"] == 14
    model = training_task.model()
    model.load_state_dict(saved["model"])
    optimizer = PLAN.build(model, epochs=2, steps_per_epoch=7)
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.clock == 14


def test_a_plan_that_toml_cannot_hold_is_kept_as_python(out):
    plan = Plan(AdamW, lr=1e-3, rules=[Rule(lambda info: info.ndim < 2, weight_decay=0)])
    fit(training_task, plan, epochs=1, out=out, cpu=True)
    assert "Plan(AdamW" in (out / "plan.py.txt").read_text()
    assert not (out / "plan.toml").exists()


def test_default_folders_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {fit(training_task, epochs=0.1, cpu=True).folder for _ in range(2)}
    assert len(folders) == 2
    assert all(folder.parent == Path("runs") for folder in folders)


def test_nothing_is_overwritten(out):
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(LaminaError, match="not empty"):
        fit(training_task, out=out, cpu=True)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_file_that_fails_half_way_is_not_there(tmp_path, error):
    def write():
        with atomic(target) as file:
            file.write(b"half")
            raise error

    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(error):
        write()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(LaminaError, match="No space left"), atomic(tmp_path / "file"):
        raise OSError(28, "No space left on device")


# ------------------------------------------------------------------------------------ interrupted


def interrupting(step):
    calls = iter(range(100))

    def loss(model, batch):
        if next(calls) == step:
            raise KeyboardInterrupt
        return training_task.loss(model, batch)

    return variant(loss=loss)


def test_an_interrupted_run_saves_its_last_whole_step(out):
    result = fit(interrupting(4), PLAN, out=out, cpu=True)
    assert result.interrupted
    assert result.steps == load(out)["clock"] == 4
    assert len(lines(out, "step")) == 4
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"


def test_a_step_cut_in_the_middle_is_not_saved(out):
    with prepare_run(training_task, out=out, cpu=True) as session:
        step = session.optimizer.step

        def cut(*args, **kwargs):
            if session.optimizer.clock == 3:
                raise KeyboardInterrupt
            return step(*args, **kwargs)

        session.optimizer.step = cut
        result = session.train()
    assert result.interrupted
    assert result.checkpoint is None
    assert not (out / "checkpoints").exists()


# ---------------------------------------------------------------------------------- wrong returns


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.zeros(4), torch.tensor(0)


def loaders(**changes):
    return lambda: {**training_task.data(), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": None}, "the function 'loss' is missing"),
        ({"loss": None, "los": print}, "Did you mean 'los'"),
        ({"model": lambda: 3}, r"model\(\) gives 3 \(int\); expected a torch.nn.Module"),
        ({"data": lambda: None}, r"data\(\).train gives nothing"),
        ({"data": loaders(train=[1])}, r"data\(\).train gives \[1\] \(list\)"),
        ({"data": loaders(train=DataLoader(Endless()))}, "has no length"),
        ({"data": loaders(train=DataLoader(TensorDataset(torch.zeros(0, 4))))}, "no batches"),
        ({"loss": lambda m, b: 0.5}, r"loss\(model, batch\) gives 0.5 \(float\)"),
        ({"loss": lambda m, b: m(b[0])}, r"a tensor of shape \(8, 2\); expected a tensor with one"),
        ({"metrics": lambda m, b: 1.0}, r"metrics\(model, batch\) gives 1.0"),
        ({"metrics": lambda m, b: {"a": 1.0}}, r"metrics\(model, batch\)\['a'\] gives 1.0"),
        ({"metrics": lambda m, b: {"a": torch.tensor(1.0)}}, "one number per example"),
        ({"metrics": 3}, "'metrics' is not a function"),
        ({"DEFAULTS": {"epoch": 3}}, "unknown key 'epoch'.* Did you mean 'epochs'"),
        ({"DEFAULTS": 3}, "DEFAULTS is 3"),
        ({"DEFAULTS": {"epochs": 0}}, "epochs=0: expected a number above 0"),
        ({"PLAN": None}, "no plan of its own"),
        ({"PLAN": 3}, "PLAN gives 3"),
        ({"PLAN": "optimizer = 3"}, "PLAN: "),
        ({"model": lambda: 1 / 0}, r"model\(\) failed with ZeroDivisionError"),
        ({"baseline": lambda d: 3.0}, r"baseline\(data\) gives 3.0"),
    ],
)
def test_a_task_that_is_wrong_is_told_where(changes, message, out):
    with pytest.raises(LaminaError, match=message):
        fit(variant(**changes), epochs=None if "DEFAULTS" in changes else 1, out=out, cpu=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": -1}, "epochs=-1"),
        ({"epochs": math.nan}, "epochs=nan"),
        ({"seed": -1}, "seed=-1"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"mixed_precision": "fp61"}, "Did you mean 'fp16'"),
    ],
)
def test_settings_that_cannot_be_meant(settings, message, out):
    with pytest.raises(LaminaError, match=message):
        fit(training_task, out=out, cpu=True, **settings)
    assert not out.exists()


def test_bf16_trains(out):
    result = fit(training_task, mixed_precision="bf16", epochs=1, out=out, cpu=True)
    assert math.isfinite(result.metrics["loss"])


def test_fp16_on_a_cpu_is_told(out):
    with pytest.raises(LaminaError, match="mixed_precision='fp16'"):
        fit(training_task, mixed_precision="fp16", out=out, cpu=True)


# ------------------------------------------------------------------------------------ the display


def test_lr_of_few_and_many_groups():
    assert lr_text({"a": 0.1, "b": 0.0}) == "lr a 0.1"
    assert (
        lr_text({name: 10.0**-i for i, name in enumerate("abcde")}) == "lr 0.0001 to 1 in 5 groups"
    )
    assert lr_text({"a": 0.0}) == "lr 0"


def test_pace_leaves_out_pauses():
    pace = Pace()
    pace.note(StepRecord(0, 0, 1.0, {}, {}, 10, 1.0))
    assert pace.rate == 10
    pace.pause(100)
    pace.note(StepRecord(1, 0, 1.0, {}, {}, 10, 102.0))
    assert pace.rate == pytest.approx(10)


def test_plain_lines_are_not_cut(capsys):
    from rich.console import Console

    display = PlainDisplay(Console(width=40), 2, 14)
    display.say("a [bold] pattern " + "x" * 100)
    assert capsys.readouterr().out.splitlines() == ["a [bold] pattern " + "x" * 100]


def test_live_display_shows_epoch_step_and_lr(out):
    import io

    from rich.console import Console

    from lamina.training.display import display

    console = Console(file=io.StringIO(), force_terminal=True, width=110)
    with display(console, 2, 14) as shown:
        fit(training_task, out=out, cpu=True, listeners=[shown])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("epoch 2/2", "step 14/14", "layer.1.* trains from", "held-out accuracy", "ETA"):
        assert part in text


@pytest.mark.parametrize("metric", ["accuracy", "vall_loss"])
def test_a_metric_that_no_validation_reports_is_named_before_training(metric, tmp_path):
    plan = Plan(SGD, lr=0.1, stop=early_stop(metric))
    with pytest.raises(TaskError, match=rf"watches '{metric}', but .* reports val_loss, val_accur"):
        fit(training_task, plan, out=tmp_path / "run", cpu=True)
    assert not (tmp_path / "run").exists()
