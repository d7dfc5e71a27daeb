"""lamina.watch: what it records, that it leaves no trace, and faults in other settings."""

import copy
import gc
import pickle
import sys
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import Optimizer, _global_optimizer_pre_hooks

import lamina as lm
from correct_loops import data, network
from lamina.record.record import METRICS
from lamina.watch.guard import Guard
from lamina.watch.lengths import length_of
from lamina.watch.measure import Entry, StepMeasure
from lamina.watch.observer import Observer

pytestmark = pytest.mark.usefixtures("little_to_search")
LR = torch.optim.lr_scheduler


def codes(seen):
    return {finding.code for finding in seen.findings}


def steps(optimizer, model, count, zero=True):
    for x, y in ([*data()] * count)[:count]:
        if zero:
            optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def tapped():
    """Everything that a watch replaces, as it is now."""
    kinds = [LR.LRScheduler, *LR.LRScheduler.__subclasses__()]
    return [
        *(vars(Optimizer)[name] for name in ("__init__", "add_param_group", "zero_grad")),
        vars(nn.Module)["zero_grad"],
        torch.autograd.backward,
        nn.utils.clip_grad._clip_grads_with_norm_,
        torch.utils.data.DataLoader.__iter__,
        *(vars(torch.amp.GradScaler)[name] for name in ("scale", "step", "update")),
        *(vars(kind).get(name) for kind in kinds for name in ("__init__", "step")),
        len(_global_optimizer_pre_hooks),
    ]


# --- no trace ---------------------------------------------------------------------------------


def trained_by(model, optimizer, other=None):
    for _ in range(12):
        optimizer.zero_grad()
        (other or model)(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("how", ["made again", "loaded by assignment", "detached"])
def test_an_optimizer_whose_parameters_never_get_a_gradient(how):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    other = torch.nn.Linear(3, 2)
    if how == "loaded by assignment":
        model.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=True)
    with lm.watch() as seen:
        if how == "detached":
            head = torch.nn.Linear(2, 1)
            trained_by(model, optimizer, lambda x: head(model(x).detach()))
        else:
            trained_by(model, optimizer, None if "loaded" in how else other)
    [finding] = seen.findings
    assert finding.code == "no-gradient"
    assert "none of the parameters of Adam" in finding.message


def test_a_frozen_optimizer_and_one_that_is_zeroed_too_early_are_not_without_gradient():
    model = torch.nn.Linear(3, 2).requires_grad_(False)
    head = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    with lm.watch() as seen:
        trained_by(model, optimizer, lambda x: head(model(x)))
    assert not seen.findings


def test_statistics_of_an_average_follow_by_design():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    target = copy.deepcopy(model).requires_grad_(False)
    both = torch.nn.ModuleDict({"online": model, "target": target})
    optimizer = torch.optim.SGD(both.parameters(), lr=0.1)
    with lm.watch() as seen:
        for _ in range(12):
            x = torch.randn(8, 3)
            optimizer.zero_grad()
            (model(x) - target(x)).square().mean().backward()
            optimizer.step()
            for own, average in zip(model.parameters(), target.parameters(), strict=True):
                average.data.mul_(0.9).add_(own.data, alpha=0.1)
    assert "statistics-drift" not in {each.code for each in seen.findings}


def test_everything_is_put_back_also_after_an_error():
    before = tapped()

    def fail():
        with lm.watch():
            assert all(a is not b for a, b in zip(tapped()[:10], before[:10], strict=True))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert tapped() == before


def test_a_watch_in_a_watch_sees_the_same():
    before = tapped()
    model = network()
    with lm.watch() as outer, lm.watch() as inner:
        steps(torch.optim.SGD(model.parameters(), lr=0.1), model, 6, zero=False)
    assert codes(inner) == codes(outer) == {"gradients-accumulate"}
    assert tapped() == before


def test_nothing_is_kept_alive():
    with lm.watch():
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        scheduler = LR.StepLR(optimizer, 3)
        steps(optimizer, model, 6)
        scheduler.step()
        kept = (model, model[0], model[0].weight, optimizer, scheduler)
        gone = [weakref.ref(each) for each in kept]
        del model, optimizer, scheduler, kept
        gc.collect()
        assert [ref() for ref in gone] == [None] * 5


def test_schedulers_and_optimizers_pickle_as_without():
    with lm.watch():
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        scheduler = LR.CosineAnnealingLR(optimizer, 5)
        steps(optimizer, model, 2)
        scheduler.step()
        saved = pickle.dumps((scheduler.state_dict(), optimizer.state_dict()))
        copy.deepcopy(model)
    loaded, _ = pickle.loads(saved)
    assert loaded["last_epoch"] == 1
    assert not any(callable(value) for value in loaded.values())


def test_a_failing_watcher_does_not_stop_the_loop(monkeypatch):
    def fail(self, *_):
        raise RuntimeError("broken")

    monkeypatch.setattr(Observer, "gradients_ready", fail)
    model = network()
    before = copy.deepcopy(model.state_dict())
    with lm.watch() as seen:
        steps(torch.optim.SGD(model.parameters(), lr=0.1), model, 30)
    assert "broken" in seen.failure
    assert not torch.equal(before["0.weight"], model[0].weight)
    assert seen.findings == ()


def test_a_guard_keeps_the_first_failure_and_closes_after_many():
    guard, calls = Guard(), []

    def fail(number):
        calls.append(number)
        raise ValueError(number)

    for number in range(50):
        guard.call(fail, number)
    assert len(calls) == 20
    assert "ValueError" in guard.failure
    assert ": 0" in guard.failure


def test_a_script_that_clears_hooks_and_wraps_the_same_functions():
    model = network()
    original = torch.autograd.backward
    with lm.watch() as seen:
        inside = torch.autograd.backward
        torch.autograd.backward = lambda *args, **kwargs: inside(*args, **kwargs)
        steps(torch.optim.SGD(model.parameters(), lr=0.1), model, 3)
        _global_optimizer_pre_hooks.clear()
        steps(torch.optim.SGD(model.parameters(), lr=0.1), model, 3)
    try:
        assert seen.failure is None
        assert seen.steps == 3
        steps(torch.optim.SGD(model.parameters(), lr=0.1), model, 3)  # what is left is inert
        assert seen.steps == 3
    finally:
        torch.autograd.backward = original


def test_closures_run_once_and_their_value_comes_back():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (x, y), *_ = data()
    calls = []

    def closure():
        optimizer.zero_grad()
        calls.append(1)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with lm.watch() as seen:
        for _ in range(6):
            assert isinstance(optimizer.step(closure), torch.Tensor)
        optimizer.step(closure=closure)
    assert len(calls) == 7
    assert seen.findings == ()
    assert len(seen.record.series("group 0", "grad_norm")[0]) == 7


def test_a_failed_step_is_not_taken_for_one_around_the_next():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise ValueError("no step")

    model = network()
    failing = Failing(model.parameters(), lr=0.1)
    with lm.watch() as seen:
        with pytest.raises(ValueError, match="no step"):
            failing.step()
        steps(torch.optim.SGD(model.parameters(), lr=0.1), model, 4)
    assert seen.steps == 4


def test_more_optimizers_than_are_followed():
    with lm.watch() as seen:
        for _ in range(300):
            model = nn.Linear(2, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    assert seen.failure is None
    assert codes(seen) == set()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [((3,), "expected a torch.nn.Module"), ((None, "adam"), "expected a torch.optim.Optimizer")],
)
def test_wrong_arguments(arguments, part):
    with pytest.raises(lm.PlanError, match=part):
        lm.watch(*arguments)


MODEL = nn.Linear(2, 1)
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((3, None), "expected a torch.nn.Module"),
        ((nn.Linear(2, 1), []), "is empty"),
        (
            (OPTIMIZER, MODEL),
            r"SGD as the model; expected the order lamina.check\(model, optimizer",
        ),
        ((MODEL, MODEL), "Linear as the optimizer; expected the order"),
    ],
)
def test_check_refuses_wrong_arguments(arguments, part):
    with pytest.raises(lm.PlanError, match=part):
        lm.check(*arguments)


# --- what is recorded --------------------------------------------------------------------------


def test_the_record_has_what_the_steps_did():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD([{"params": model.parameters(), "name": "all"}], lr=0.5)
    scheduler = LR.ExponentialLR(optimizer, 0.5)
    rows = []
    with lm.watch() as seen:
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 3)).square().mean()
            loss.backward()
            before = nn.utils.parameters_to_vector(model.parameters()).detach()
            grad = torch.cat([param.grad.flatten() for param in model.parameters()])
            lr = optimizer.param_groups[0]["lr"]
            optimizer.step()
            after = nn.utils.parameters_to_vector(model.parameters()).detach()
            rows.append((lr, grad.norm(), before.norm(), (after - before).norm(), loss.item()))
            scheduler.step()
    names = ("lr", "grad_norm", "weight_norm", "update_norm")
    for place, name in enumerate(names):
        at, values = seen.record.series("all", name)
        assert at.tolist() == [0, 1, 2, 3]
        torch.testing.assert_close(values.tolist(), [float(row[place]) for row in rows])
    assert seen.record.series(METRICS, "loss")[1].tolist() == [row[4] for row in rows]


def test_weight_decay_and_the_factor_of_clipping_are_recorded():
    model = network()
    groups = [
        {"params": model[0].parameters(), "name": "first"},
        {"params": model[4].parameters(), "name": "last", "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.02)
    norms = []
    with lm.watch(model, optimizer) as seen:
        for x, y in data():
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            norms.append(nn.utils.clip_grad_norm_(model[4].parameters(), 0.3).item())
            optimizer.step()
    assert seen.record.series("first", "weight_decay")[1].tolist() == [0.02] * 5
    assert seen.record.series("last", "weight_decay")[1].tolist() == [0.0] * 5
    factors = seen.record.series("last", "clip_factor")[1].tolist()
    torch.testing.assert_close(factors, [min(1.0, 0.3 / (norm + 1e-6)) for norm in norms])
    assert len(seen.record.series("first", "clip_factor")[0]) == 0


def test_the_update_of_a_large_tensor_is_estimated_from_a_sample():
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(300, 400))
    param.grad = torch.randn(300, 400)
    measure = StepMeasure([Entry("w", 0, param)])
    with torch.no_grad():
        param.add_(param.grad, alpha=-0.1)
    measure.complete()
    (row,) = measure.read()
    assert row.update == pytest.approx(0.1 * param.grad.norm().item(), rel=0.1)
    assert row.grad == pytest.approx(param.grad.norm().item(), rel=1e-5)
    assert (row.asked, row.still) == (1009, 0)  # every 119th of 120,000


@pytest.mark.parametrize("form", ["channels_last", "transposed"])
def test_elements_of_weights_and_gradients_are_sampled_at_the_same_places(form):
    torch.manual_seed(0)
    value = torch.randn(32, 16, 3, 3)
    grad = torch.zeros_like(value)
    grad[:16] = 1.0  # only these elements move
    if form == "channels_last":
        value = value.to(memory_format=torch.channels_last)
    else:
        value = value.transpose(0, 1).contiguous().transpose(0, 1)
    param = nn.Parameter(value)
    param.grad = grad
    measure = StepMeasure([Entry("w", 0, param)])
    with torch.no_grad():
        param.sub_(grad)
    measure.complete()
    (row,) = measure.read()
    assert row.still == 0
    assert 450 < row.asked < 470  # half of every fifth of 4,608


def test_the_loss_and_thaws_are_recorded():
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with lm.watch(model, optimizer) as seen:
        steps(optimizer, model, 3)
        model[0].requires_grad_(True)
        steps(optimizer, model, 3)
    (event,) = seen.record.events
    assert (event.kind, event.step) == ("thaw", 3)
    assert seen.findings == ()


def test_only_given_optimizers_are_watched():
    one, other = network(), network()
    first = torch.optim.SGD(one.parameters(), lr=0.1)
    with lm.watch(one, first) as seen:
        steps(torch.optim.SGD(other.parameters(), lr=0.1), other, 5, zero=False)
        steps(first, one, 2)
    assert seen.steps == 2
    assert seen.findings == ()


def test_a_report_shows_what_was_seen(tmp_path):
    model = nn.Sequential(network(), nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with lm.watch(model, optimizer) as seen:
        steps(optimizer, model, 6)
    seen.report(tmp_path / "seen.html", title="a <run>")
    page = (tmp_path / "seen.html").read_text()
    assert "not-in-optimizer" in page
    assert "a &lt;run&gt;" in page
    assert "<run>" not in page
    entries = {entry.name: entry for entry in seen._parameters()}
    assert entries["0.0.weight"].group == "group 0"
    assert (entries["1.weight"].group, entries["1.weight"].shape) == (None, (3, 3))


def test_a_report_needs_plotly(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with lm.watch() as seen:
        pass
    with pytest.raises(lm.MissingExtraError, match="lamina\\[report\\]"):
        seen.report(tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


# --- faults in other settings than those of the page -------------------------------------------


def test_a_given_model_whose_head_was_replaced_before_the_watch():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[4] = nn.Linear(16, 3)
    assert [each.code for each in lm.check(model, optimizer)] == ["parameter-replaced"]
    with lm.watch(model, optimizer) as seen:
        steps(optimizer, model, 4)
    assert "not-in-optimizer" in codes(seen)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, lm.optim.Adam])
@pytest.mark.parametrize("closure", [False, True])
def test_accumulation_with_other_optimizers(kind, closure):
    model = network()
    optimizer = kind(model.parameters(), lr=1e-3, weight_decay=0)
    with lm.watch() as seen:
        if closure:
            for x, y in data():
                optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y).backward())
        else:
            steps(optimizer, model, 5, zero=False)
    assert codes(seen) == {"gradients-accumulate"}


def test_of_many_optimizers_with_one_fault_the_first_are_told():
    models = [network() for _ in range(8)]
    with lm.watch() as seen:
        for model in models:
            steps(torch.optim.SGD(model.parameters(), lr=0.1), model, 5, zero=False)
    assert [finding.code for finding in seen.findings] == ["gradients-accumulate"] * 5


def test_a_group_that_torch_refuses_is_named():
    model = network()
    groups = [{"params": model.parameters()}, {"params": model[4].parameters(), "lr": 1.0}]
    with lm.watch(model) as seen, pytest.raises(ValueError, match="more than one"):
        torch.optim.SGD(groups, lr=0.1)
    (finding,) = seen.findings
    assert finding.code == "listed-twice"
    assert "4.weight" in finding.message


def test_a_tensor_twice_in_one_group():
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = torch.optim.SGD([*model.parameters(), model[4].weight], lr=0.1)
    (finding,) = lm.check(model, optimizer)
    assert finding.code == "listed-twice"
    assert "4.weight" in finding.message


def test_a_floor_inside_a_sequence_and_a_minimum_of_a_plateau():
    optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=1e-6)
    parts = [LR.LinearLR(optimizer, 0.1, total_iters=2), LR.CosineAnnealingLR(optimizer, 5, 1e-4)]
    scheduler = LR.SequentialLR(optimizer, parts, [2])
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    floor = LR.ReduceLROnPlateau(optimizer, min_lr=1e-3)
    found = lm.check(model, optimizer, [scheduler, floor])
    assert [each.code for each in found] == ["floor-raises-lr", "floor-raises-lr"]


def test_nan_names_the_first_parameter_and_its_step():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with lm.watch(model) as seen:
        steps(optimizer, model, 2)
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 6)), torch.zeros(8, dtype=torch.long)).backward()
        model[4].bias.grad[1] = float("inf")
        optimizer.step()
        steps(optimizer, model, 2)
    first = next(each for each in seen.findings if each.code == "nonfinite-gradient")
    assert "step 2" in first.message
    assert "4.bias" in first.message
    # Everything that follows from it is left out, but for the loss.
    assert codes(seen) <= {"nonfinite-gradient", "nonfinite-loss"}


@pytest.mark.slow  # the import takes seconds
def test_a_schedule_of_transformers_made_for_steps_and_stepped_by_epochs():
    transformers = pytest.importorskip("transformers")
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, 30)
    assert length_of(scheduler) == 30
    with lm.watch(model, optimizer, schedulers=[scheduler]) as seen:
        for _ in range(6):
            steps(optimizer, model, 5)
            scheduler.step()
    assert codes(seen) == {"scheduler-per-epoch"}


def test_lengths():
    optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)
    warmup, cosine = LR.LinearLR(optimizer, total_iters=5), LR.CosineAnnealingLR(optimizer, 20)
    assert length_of(LR.SequentialLR(optimizer, [warmup, cosine], [5])) == 25
    assert length_of(LR.OneCycleLR(optimizer, 0.1, epochs=3, steps_per_epoch=4)) == 12
    assert length_of(LR.StepLR(optimizer, 30)) is None
    assert length_of(LR.ReduceLROnPlateau(optimizer)) is None
    assert length_of(LR.ChainedScheduler([cosine, LR.ExponentialLR(optimizer, 0.9)])) == 20


def test_a_restarting_schedule_may_jump_and_a_long_one_may_be_cut_off():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = LR.CosineAnnealingWarmRestarts(optimizer, 4, eta_min=1e-6)
    with lm.watch() as seen:
        for _ in range(12):
            steps(optimizer, model, 1)
            scheduler.step()
    assert seen.findings == ()


def test_kahan_compensation_is_no_loss():
    class Kahan(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for param in group["params"]:
                    state = self.state[param]
                    lost = state.setdefault("kahan_comp", torch.zeros_like(param))
                    lost.sub_(group["lr"] * param.grad)
                    before = param.clone()
                    param.add_(lost)
                    lost.add_(before - param)

    def train(kind):
        torch.manual_seed(0)
        model = nn.Linear(64, 8).to(torch.bfloat16)
        optimizer = kind(model.parameters(), lr=1e-5)
        with lm.watch() as seen:
            for _ in range(8):
                optimizer.zero_grad()
                model(torch.ones(4, 64, dtype=torch.bfloat16)).square().mean().backward()
                optimizer.step()
        return codes(seen)

    assert train(torch.optim.SGD) == {"updates-round-away"}
    assert "updates-round-away" not in train(Kahan)


@pytest.mark.slow  # dynamo is imported
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_step_is_left_alone():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    @torch.compile(backend="eager", fullgraph=False)
    def step():
        optimizer.step()

    with lm.watch() as seen:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).sum().backward()
            step()
    assert seen.failure is None


def test_findings_can_be_read_in_the_middle():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lm.watch() as seen:
        steps(optimizer, model, 6, zero=False)
        middle = codes(seen)
        steps(optimizer, model, 6, zero=False)
    assert middle == codes(seen) == {"gradients-accumulate"}
    assert [each.code for each in seen.record.findings] == ["gradients-accumulate"]


# --- eval mode, and schedulers without effect ------------------------------------------------


def dropping():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.1), nn.Linear(4, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_an_evaluation_after_which_nobody_calls_train():
    model, optimizer = dropping()
    with lm.watch() as seen:
        steps(optimizer, model, 3)
        model.eval()
        steps(optimizer, model, 3)
    (finding,) = seen.findings
    assert finding.code == "trains-in-eval-mode"
    assert "Sequential trains in eval mode from step 3 on" in finding.message


@pytest.mark.parametrize("how", ["trained again", "no dropout", "dropout 0", "a part"])
def test_eval_mode_that_is_none(how):
    model, optimizer = dropping()
    model.eval()
    if how == "no dropout":
        model[1] = nn.Identity()
    elif how == "dropout 0":
        model[1].p = 0.0
    elif how == "a part":
        model.train()
        model[1].eval()
    with lm.watch() as seen:
        steps(optimizer, model, 4)
        if how == "trained again":
            model.train()
            steps(optimizer, model, 2)
    assert codes(seen) == set()


def passes(scheduler, optimizer, model, count, each=lambda: None):
    data = torch.utils.data.DataLoader(range(4), batch_size=2)
    for _ in range(count):
        for _ in data:
            steps(optimizer, model, 1)
        each()


@pytest.mark.parametrize("end", ["never", "at the end"])
@pytest.mark.parametrize("kind", ["StepLR", "ReduceLROnPlateau"])
def test_a_scheduler_that_is_not_stepped_in_the_loop(kind, end):
    model, optimizer = dropping()
    with lm.watch() as seen:
        arguments = {"step_size": 1} if kind == "StepLR" else {}
        scheduler = getattr(torch.optim.lr_scheduler, kind)(optimizer, **arguments)
        passes(scheduler, optimizer, model, 2)
        if end == "at the end":
            scheduler.step(*([] if kind == "StepLR" else [1.0]))
    (finding,) = seen.findings
    assert finding.code == "scheduler-without-effect"
    assert ("was never called" in finding.message) is (end == "never")


@pytest.mark.parametrize("how", ["every pass", "one pass", "another", "built later", "a plan"])
def test_schedulers_that_have_an_effect_or_cannot_have_one_yet(how):
    model, optimizer = dropping()
    if how == "a plan":
        optimizer = lm.Plan(lm.SGD, lr=0.1).build(model)
    with lm.watch() as seen:
        if how == "built later":
            steps(optimizer, model, 1)
        make = torch.optim.lr_scheduler.StepLR
        scheduler = optimizer.scheduler_view() if how == "a plan" else make(optimizer, 10)
        if how == "another":
            scheduler = make(optimizer, 10)
        each = scheduler.step if how in ("every pass", "another") else lambda: None
        passes(scheduler, optimizer, model, 1 if how == "one pass" else 2, each)
    assert "scheduler-without-effect" not in codes(seen)
