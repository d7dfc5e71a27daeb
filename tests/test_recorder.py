"""What a recorder says is what was applied and measured, and costs no pass that was made anyway."""

import copy
import json
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lamina as lm
from lamina.gradients import norms as norms_module
from lamina.record import METRICS, JsonLines, Record, Recorder, TensorBoard
from lamina.record.recorder import Recorders

#: what a plan tells of 16-bit weights, and of gradients that nobody looks at
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{code}")
    for code in ("updates-round-away", "steps-round-to-nothing", "gradients-unchecked")
]
HEAD, BODY = "2.*", "0.*"


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def plan(optimizer="AdamW", **more):
    rules = [lm.Rule(HEAD, lr=1e-2), lm.Rule(BODY, thaw=3)]
    return lm.Plan(optimizer, lr=1e-3, weight_decay=0.1, schedule=lm.cosine(), rules=rules, **more)


def train(model, optimizer, steps, seed=0, each=lambda loss: None):
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 4, generator=generator).to(dtype)

        def closure(x=x):
            optimizer.zero_grad()
            loss = model(x).float().square().mean()
            loss.backward()
            return loss

        each(optimizer.step(closure))


def norm(tensors):
    return float(torch.cat([t.detach().double().flatten() for t in tensors]).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", torch.optim.Adagrad])
@pytest.mark.parametrize(
    "clip",
    [
        {},
        {"clip_norm": 0.05},
        {"nonfinite_check": "norms"},
        {"gradients": [lm.clip_value(0.001), lm.clip_norm(0.05)]},
    ],
)
def test_the_record_holds_what_was_applied_and_measured(dtype, optimizer, clip):
    model = net(dtype)
    built = plan(optimizer, **clip).build(model, steps=8)
    heads, bodies = list(model[2].parameters()), list(model[0].parameters())
    expected = {HEAD: [], BODY: []}
    before = {}

    def remember(*_):
        for name, params in ((HEAD, heads), (BODY, bodies)):
            grads = [p.grad for p in params if p.grad is not None]
            before[name] = [p.detach().clone() for p in params], norm(grads) if grads else None

    def compare(*_):
        for name, params in ((HEAD, heads), (BODY, bodies)):
            old, grad = before[name]
            moved = [new.detach() - was for new, was in zip(params, old, strict=True)]
            row = {"lr": built.applied[name]["lr"], "grad_norm": grad}
            row |= {"weight_norm": norm(params), "update_norm": norm(moved)}
            expected[name].append(row)

    with built.recorder(every=1) as recorder:
        for _ in range(8):
            built.zero_grad()
            model(torch.randn(8, 4).to(dtype)).float().square().mean().backward()
            remember()
            built.step()
            compare()
        record = recorder.record
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name, rows in expected.items():
        np.testing.assert_array_equal(record.series(name, "lr")[1], [row["lr"] for row in rows])
        first = 0 if name == HEAD else 3
        for key in ("grad_norm", "weight_norm", "update_norm"):
            steps, values = record.series(name, key)
            assert steps.tolist() == list(range(first, 8))
            np.testing.assert_allclose(
                values, [row[key] for row in rows[first:]], rtol=tolerance, atol=1e-7
            )
        ratio = record.series(name, "update_norm")[1] / record.series(name, "weight_norm")[1]
        np.testing.assert_array_equal(record.series(name, "ratio")[1], ratio)
    if "clip_norm" in clip:
        total = np.hypot(record.series(HEAD, "grad_norm")[1][3:], 0)
        assert len(total) == 5
        scope = record.series(METRICS, "norm/plan")[1]
        factor = record.series(HEAD, "clip")[1]
        np.testing.assert_allclose(factor, np.minimum(1, 0.05 / (scope + 1e-6)), rtol=1e-3)
    assert [(e.step, e.kind, e.groups) for e in record.events] == [(3, "thaw", (BODY,))]


@pytest.mark.parametrize("clip", [{"clip_norm": 0.1}, {}, {"gradients": [lm.clip_value(0.1)]}])
def test_weights_are_the_same_with_and_without(clip):
    results = []
    for recorded in (False, True):
        model = net()
        optimizer = plan(**clip).build(model, steps=10)
        if recorded:
            optimizer.recorder(every=2)
        train(model, optimizer, 10)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize(("settings", "passes"), [({"clip_norm": 1.0}, 0), ({}, 0)])
@pytest.mark.usefixtures("without_numba")
def test_norms_that_were_computed_anyway_are_not_computed_again(settings, passes, monkeypatch):
    model = net()
    optimizer = plan(**settings).build(model, steps=10)
    train(model, optimizer, 1)

    def count(recorded):
        calls = []
        with pytest.MonkeyPatch.context() as patch:
            original = torch._foreach_norm
            patch.setattr(
                torch,
                "_foreach_norm",
                lambda t, *a, **k: calls.append(len(t)) or original(t, *a, **k),
            )
            if recorded:
                with optimizer.recorder(every=1, updates=False):
                    train(model, optimizer, 1)
            else:
                train(model, optimizer, 1)
        return sum(calls)

    weights = 2  # the two tensors of the head, whose norm nobody else asks for
    assert count(True) - count(False) == weights + passes
    assert norms_module.each_norm is not None


def test_only_every_nth_step_is_measured_and_lr_in_all():
    model = net()
    optimizer = plan(clip_norm=1.0).build(model, steps=3000)
    with optimizer.recorder() as recorder:
        assert recorder.every == 3
        train(model, optimizer, 10)
        record = recorder.record
    assert record.series(HEAD, "grad_norm")[0].tolist() == [0, 3, 6, 9]
    assert record.series(HEAD, "lr")[0].tolist() == list(range(10))
    assert record.series(METRICS, "norm/plan")[0].tolist() == list(range(10))


def test_lbfgs_is_measured_too():
    model = net(torch.float64)
    rules = [lm.Rule("0.*", frozen=True)]
    optimizer = lm.Plan(lm.LBFGS, lr=0.5, rules=rules).build(model, steps=4)
    with optimizer.recorder(every=1) as recorder:
        train(model, optimizer, 4)
        record = recorder.record
    (group,) = [name for name in record.groups if record.series(name, "lr")[1].any()]
    assert len(record.series(group, "update_norm")[0]) == 4
    assert (record.series(group, "ratio")[1] > 0).all()
    assert record.names(group).count("grad_norm") == 0


def test_skipped_steps_overrides_and_feedback_are_events():
    model = net()
    reaction = lm.plateau("val_loss", factor=0.5, patience=1)
    optimizer = lm.Plan("SGD", lr=0.1, feedback=reaction, nonfinite="skip").build(model, steps=50)
    with optimizer.recorder(every=1) as recorder:
        train(model, optimizer, 2)
        model[0].weight.grad = torch.full((5, 4), float("nan"))
        optimizer.step()
        optimizer.override(lr=0.05)
        for _ in range(3):
            optimizer.report(val_loss=1.0)
        record = recorder.record
    kinds = [event.kind for event in record.events]
    assert kinds[:2] == ["skipped", "override"]
    assert "feedback" in kinds
    assert record.series(METRICS, "val_loss")[1].tolist() == [1.0]
    assert record.series("default", "lr")[0].tolist() == [0, 1]


def test_a_file_of_lines_is_a_record(tmp_path):
    path, model = tmp_path / "metrics.jsonl", net()
    optimizer = plan(clip_norm=1.0).build(model, steps=6)
    with optimizer.recorder(path, every=2) as recorder:
        train(model, optimizer, 6, each=lambda loss: recorder.metrics(loss=loss))
        record = recorder.record
    again = Record.load(path)
    assert again.damaged_lines == 0
    assert again.events == record.events
    for group, name, steps, values in record.curves():
        np.testing.assert_array_equal(again.series(group, name)[0], steps)
        np.testing.assert_array_equal(again.series(group, name)[1], values, err_msg=name)
    assert len(again.series(METRICS, "loss")[0]) == 6


class Wandb:
    def __init__(self):
        self.logged = []

    def log(self, data, step=None):
        self.logged.append((step, data))


class Mlflow:
    def __init__(self):
        self.logged = []

    def log_metrics(self, metrics, step=None, synchronous=None):
        self.logged.append((step, metrics))


class Board:
    def __init__(self, folder=""):
        self.logged, self.texts, self.closed = [], [], False

    def add_scalar(self, tag, value, global_step=None):
        self.logged.append((global_step, {tag: value}))

    def add_text(self, tag, text, global_step=None):
        self.texts.append((tag, text, global_step))

    def flush(self):
        self.closed = "flushed"

    def close(self):
        self.closed = True


@pytest.mark.parametrize("kind", [Wandb, Mlflow, Board])
def test_loggers_receive_plain_numbers_by_step(kind):
    logger, model = kind(), net()
    optimizer = plan(clip_norm=1.0).build(model, steps=4)
    with optimizer.recorder(logger, every=1):
        train(model, optimizer, 4)
    steps = [step for step, _ in logger.logged]
    assert steps == sorted(steps)
    assert set(steps) == {0, 1, 2, 3}
    values = {key: value for _, row in logger.logged for key, value in row.items()}
    assert {"lr/2.*", "clip/2.*", "update_norm/2.*", "ratio/2.*", "norm/plan"} <= set(values)
    assert all(type(value) is float for value in values.values())
    if kind is Board:
        assert logger.closed == "flushed"
        assert logger.texts[0][0] == "thaw"


def test_tensorboard_is_imported_only_when_asked_for(monkeypatch, tmp_path):
    assert "tensorboard" not in sys.modules
    module = types.ModuleType("torch.utils.tensorboard")
    vars(module)["SummaryWriter"] = Board
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    writer, model = TensorBoard(tmp_path), net()
    with plan().build(model, steps=4).recorder(writer):
        pass
    assert writer._writer.closed is True


def test_a_missing_tensorboard_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(lm.MissingExtraError, match="pip install tensorboard"):
        TensorBoard("somewhere")


def test_a_logger_that_fails_is_told_of_and_left_out(tmp_path):
    class Broken:
        def log(self, values, step):
            raise ConnectionError("no network")

    model, path = net(), tmp_path / "metrics.jsonl"
    optimizer = plan().build(model, steps=4)
    with (
        pytest.warns(lm.LaminaWarning, match="writes no more to ToLogger") as told,
        optimizer.recorder(Broken(), path, every=1),
    ):
        train(model, optimizer, 4)
    assert len(told) == 1
    assert optimizer.clock == 4
    assert len(Record.load(path).series(HEAD, "lr")[0]) == 4


@pytest.mark.parametrize(
    ("given", "match"),
    [((3,), "log"), (({"a": 1},), "log"), ((object(),), "log_metrics")],
)
def test_what_nothing_can_be_written_to_is_refused(given, match):
    optimizer = plan().build(net(), steps=4)
    with pytest.raises(lm.PlanError, match=match):
        optimizer.recorder(*given)
    assert not optimizer._recorders.on


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_every_is_checked(every):
    with pytest.raises(lm.PlanError, match="every"):
        plan().build(net(), steps=4).recorder(every=every)


def test_a_copy_of_an_optimizer_has_no_recorder(tmp_path):
    model = net()
    optimizer = plan().build(model, steps=4)
    recorder = optimizer.recorder(tmp_path / "metrics.jsonl")
    pair = copy.deepcopy((model, optimizer))
    assert not pair[1]._recorders.on
    assert optimizer._recorders.on
    assert not pickle.loads(pickle.dumps(optimizer._recorders)).on
    recorder.close()


def test_a_closed_recorder_hears_nothing_more(tmp_path):
    model = net()
    optimizer = plan().build(model, steps=8)
    first, second = optimizer.recorder(every=1), optimizer.recorder(every=1)
    train(model, optimizer, 2)
    first.close()
    train(model, optimizer, 2)
    assert first.record.last_step == 1
    assert second.record.last_step == 3
    first.close()


def test_a_resumed_run_is_recorded_from_where_it_goes_on():
    model = net()
    optimizer = plan().build(model, steps=8)
    train(model, optimizer, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    again = plan().build(net(), steps=8, resume=saved)
    with again.recorder(every=1) as recorder:
        train(net(), again, 0)
        again.zero_grad()
        for group in again.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        again.step()
        assert recorder.record.series(HEAD, "lr")[0].tolist() == [4]


def test_sparse_gradients_and_what_has_none():
    torch.manual_seed(0)
    model = nn.ModuleDict({"words": nn.Embedding(9, 3, sparse=True), "idle": nn.Linear(2, 2)})
    rules = [lm.Rule("words.*", lr=0.1), lm.Rule("idle.*", lr=0.2)]
    optimizer = lm.Plan("SGD", lr=0.3, rules=rules).build(model, steps=3)
    with optimizer.recorder(every=1) as recorder:
        model["words"](torch.tensor([1, 1, 2])).sum().backward()
        expected = model["words"].weight.grad.to_dense().norm()
        optimizer.step()
        record = recorder.record
    assert record.series("words.*", "grad_norm")[1] == pytest.approx(float(expected))
    assert record.series("words.*", "update_norm")[1] == pytest.approx(
        0.1 * float(expected), rel=1e-5
    )
    assert record.names("idle.*") == ("lr", "weight_decay")


def test_a_writer_of_ones_own_gets_rows_and_events():
    class Mine(JsonLines):
        def __init__(self):
            self.rows, self.events = [], []

        def write(self, row):
            self.rows.append(row.step)

        def event(self, event):
            self.events.append(event.kind)

        def close(self):
            self.rows.append("closed")

    mine, model = Mine(), net()
    optimizer = plan().build(model, steps=4)
    recorder = optimizer.recorder(mine, every=1)
    assert isinstance(recorder, Recorder)
    train(model, optimizer, 4)
    recorder.close()
    assert mine.rows == [0, 1, 2, 3, "closed"]
    assert mine.events == ["thaw"]


def test_numbers_that_are_not_finite_are_lines_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    optimizer = plan().build(net(), steps=4)
    with optimizer.recorder(path) as recorder:
        recorder.metrics(loss=float("nan"), other=torch.tensor(float("inf")))
    assert json.loads(path.read_text())["metrics"] == {"loss": None, "other": None}
    assert np.isnan(Record.load(path).series(METRICS, "loss")[1]).all()


class NoReads(TorchDispatchMode):
    """Fails where a number is read from a tensor, which would wait for an accelerator."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_step_reads_no_number_from_a_tensor():
    model = net()
    built = lm.Plan("SGD", lr=0.1, nonfinite_check="norms").build(model, steps=20)
    train(model, built, 1)
    with built.recorder(every=1) as recorder, NoReads():
        for _ in range(10):
            built.zero_grad()
            loss = model(torch.ones(8, 4)).square().mean()
            loss.backward()
            built.step()
            recorder.metrics(loss=loss)
        with pytest.raises(AssertionError):  # canary
            float(loss)
    assert len(recorder.record.series("default", "ratio")[0]) == 10


def test_rows_are_written_about_once_a_second(tmp_path, monkeypatch):
    path, model, now = tmp_path / "metrics.jsonl", net(), [100.0]
    monkeypatch.setattr("lamina.record.rows.time.monotonic", lambda: now[0])
    optimizer = plan(clip_norm=1.0).build(model, steps=9)
    recorder = optimizer.recorder(path, every=1)
    train(model, optimizer, 2)
    assert path.read_text() == ""
    now[0] += 2.0
    train(model, optimizer, 1)  # what a kill now would leave
    assert len(Record.load(path).series(HEAD, "ratio")[0]) == 3
    recorder.close()


@pytest.mark.parametrize(("names", "verb"), [(("a",), "trains"), (("a", "b"), "train")])
def test_an_event_agrees_with_the_number_of_groups(names, verb):
    told = []
    recorders = Recorders()
    recorders.event = lambda step, kind, text, groups: told.append(text)
    recorders.windows(3, [False] * len(names), [True] * len(names), names)
    assert told == [f"{', '.join(names)} {verb} from step 3 on"]
