"""Schedulers together, in a row, restored, edited and on the other library's optimizers.

The oracle is torch, where it is sound; where lamina differs on purpose, the stated better value.
"""

import copy
import itertools
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as theirs

from lamina import optim
from lamina.optim import lr_scheduler as ours

RATES = (0.1, 1e-3)
PEAKS, LOWS = list(RATES), [0.01, 1e-4]

pytestmark = pytest.mark.filterwarnings("ignore:.*eta_min:lamina.errors.LaminaWarning")

#: schedulers by name; those that torch chains by multiplication or by overwriting
TORCHS = {
    "Lambda": lambda m, o: m.LambdaLR(o, lambda e: 0.95**e),
    "Lambda up": lambda m, o: m.LambdaLR(o, lambda e: min(1.0, (e + 1) / 5)),
    "Multiplicative": lambda m, o: m.MultiplicativeLR(o, lambda e: 0.97),
    "Step": lambda m, o: m.StepLR(o, 3, 0.5),
    "MultiStep": lambda m, o: m.MultiStepLR(o, [2, 5, 5, 9], 0.3),
    "Constant": lambda m, o: m.ConstantLR(o, 0.5, 4),
    "Linear": lambda m, o: m.LinearLR(o, 0.1, 1.0, 6),
    "Linear down": lambda m, o: m.LinearLR(o, 1.0, 0.2, 8),
    "Exponential": lambda m, o: m.ExponentialLR(o, 0.9),
    "Polynomial": lambda m, o: m.PolynomialLR(o, 30, 1.5),
    "Cosine": lambda m, o: m.CosineAnnealingLR(o, 40),
    "Cosine floor": lambda m, o: m.CosineAnnealingLR(o, 40, 1e-4),
    "OneCycle": lambda m, o: m.OneCycleLR(o, PEAKS, 40, cycle_momentum=False),
    "Cyclic": lambda m, o: m.CyclicLR(o, LOWS, PEAKS, 4, cycle_momentum=False),
}
RESTARTS = {
    "Restarts": lambda m, o: m.CosineAnnealingWarmRestarts(o, 5, 2),
    "Restarts floor": lambda m, o: m.CosineAnnealingWarmRestarts(o, 4, 1, 1e-4),
}
SHARED = TORCHS | RESTARTS
OWN = SHARED | {
    "Constant 0": lambda m, o: m.ConstantLR(o, 0.0, 4),
    "Linear warmup": lambda m, o: m.LinearWarmupLR(o, 5),
    "Warmup": lambda m, o: m.WarmupLR(o, 5),
}


def optimizer_of(cls=torch.optim.SGD, kind=float, rates=RATES):
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": kind(lr)} for lr in rates]
    return cls(groups, lr=0.1)


def double(lr):
    return torch.tensor(lr, dtype=torch.float64)


def rates(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def advance(optimizer, schedulers, steps):
    """The learning rates now and after each of some steps."""
    rows = [rates(optimizer)]
    for _ in range(steps):
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        rows.append(rates(optimizer))
    return rows


def assert_rows(got, wanted, what, rel=1e-10):
    for step, (row, other) in enumerate(zip(got, wanted, strict=True)):
        assert row == pytest.approx(other, rel=rel, abs=1e-300), (what, step)


def side_by_side(module, optimizer, makers):
    return [make(module, optimizer) for make in makers]


def chained(module, optimizer, makers):
    return [module.ChainedScheduler(side_by_side(module, optimizer, makers))]


def sequential(module, optimizer, makers):
    return [module.SequentialLR(optimizer, side_by_side(module, optimizer, makers), [5])]


TOGETHER = [side_by_side, chained, sequential]


# --- together -------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", SHARED)
def test_every_pair_in_a_sequence_is_torchs(first):
    for second, milestone in itertools.product(SHARED, (1, 7)):
        rows = []
        for module in (theirs, ours):
            optimizer = optimizer_of()
            parts = [SHARED[name](module, optimizer) for name in (first, second)]
            scheduler = module.SequentialLR(optimizer, parts, [milestone])
            rows.append(advance(optimizer, [scheduler], 16))
        assert_rows(rows[1], rows[0], (first, second, milestone))


@pytest.mark.parametrize("first", TORCHS)
@pytest.mark.parametrize("together", [side_by_side, chained])
def test_every_pair_side_by_side_is_torchs(first, together):
    for second in TORCHS:
        rows = []
        for module in (theirs, ours):
            optimizer = optimizer_of()
            schedulers = together(module, optimizer, [TORCHS[first], TORCHS[second]])
            rows.append(advance(optimizer, schedulers, 16))
        assert_rows(rows[1], rows[0], (first, second))


@pytest.mark.parametrize("name", TORCHS)
@pytest.mark.parametrize("kind", [float, double])
def test_restarts_multiply_whatever_is_beside_them_in_either_order(name, kind):
    # those two set initial learning rates of their own, so a floor means another share of it
    absolute = name in ("OneCycle", "Cyclic")
    for restarts in ["Restarts"] if absolute else RESTARTS:
        alone = [optimizer_of(), optimizer_of()]
        factors = RESTARTS[restarts](ours, alone[0])
        base = advance(alone[0], [factors], 24)
        other = advance(alone[1], [TORCHS[name](ours, alone[1])], 24)
        wanted = [
            [a * b / lr for a, b, lr in zip(*rows, RATES, strict=True)]
            for rows in zip(base, other, strict=True)
        ]
        for order in ([name, restarts], [restarts, name]):
            optimizer = optimizer_of(kind=kind)
            schedulers = chained(ours, optimizer, [SHARED[each] for each in order])
            got = advance(optimizer, schedulers, 24)
            # as in torch, CyclicLR takes the first value from what another has made the initial lr
            assert_rows(got[absolute:], wanted[absolute:], order)


@pytest.mark.parametrize("name", TORCHS)
def test_a_factor_of_zero_hides_what_the_other_does_and_loses_nothing(name):
    alone = optimizer_of()
    wanted = advance(alone, [TORCHS[name](ours, alone)], 12)
    wanted[:4] = [[0.0, 0.0]] * 4
    for order in ([name, "Constant 0"], ["Constant 0", name]):
        optimizer = optimizer_of()
        schedulers = chained(ours, optimizer, [OWN[each] for each in order])
        assert_rows(advance(optimizer, schedulers, 12), wanted, order)


def test_restarts_within_a_chain_within_a_sequence():
    optimizer = optimizer_of()
    chain = chained(ours, optimizer, [TORCHS["Linear"], RESTARTS["Restarts"]])
    parts = [ours.ExponentialLR(optimizer, 0.5), *chain]
    rows = advance(optimizer, [ours.SequentialLR(optimizer, parts, [3])], 12)
    again = optimizer_of()
    wanted = advance(again, chained(ours, again, [TORCHS["Linear"], RESTARTS["Restarts"]]), 9)
    assert_rows(rows[3:], wanted, "the chain begins anew")
    assert rows[2] == [0.025, 0.00025]


# --- two in a row ---------------------------------------------------------------------------------


@pytest.mark.parametrize("first", SHARED)
@pytest.mark.parametrize("kept", [True, False])
def test_a_second_scheduler_on_the_same_optimizer_begins_as_torchs(first, kept):
    for second in SHARED:
        rows = []
        for module in (theirs, ours):
            optimizer = optimizer_of()
            schedulers = [SHARED[first](module, optimizer)]
            row = advance(optimizer, schedulers, 6)
            if not kept:
                schedulers.clear()
            later = SHARED[second](module, optimizer)
            rows.append(row + advance(optimizer, [later], 4))
            optimizer.param_groups[0]["lr"] *= 0.5
            rows[-1] += advance(optimizer, [later], 6)
        assert_rows(rows[1], rows[0], (first, second))


def test_a_warmup_made_later_beside_restarts_that_go_on():
    optimizer = optimizer_of()
    restarts = ours.CosineAnnealingWarmRestarts(optimizer, 8)
    advance(optimizer, [restarts], 6)
    warmup = ours.LinearLR(optimizer, 0.1, 1.0, 10)
    for place in range(7, 30):
        advance(optimizer, [restarts, warmup], 1)
        wanted = restarts.at(place)[0] * min(1.0, 0.1 + 0.09 * (place - 6))
        assert rates(optimizer)[0] == pytest.approx(wanted, rel=1e-12)


def test_a_second_phase_of_warmup_and_restarts_begins_from_the_initial_lr():
    optimizer = optimizer_of()
    advance(optimizer, [ours.ExponentialLR(optimizer, 0.5)], 5)
    schedulers = chained(ours, optimizer, [TORCHS["Linear"], RESTARTS["Restarts"]])
    again = optimizer_of()
    wanted = advance(again, chained(ours, again, [TORCHS["Linear"], RESTARTS["Restarts"]]), 9)
    assert_rows(advance(optimizer, schedulers, 9), wanted, "phase two")


# --- edits by hand --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("kind", [float, double])
def test_an_edit_by_hand_is_followed_or_overwritten_as_by_torch(name, kind):
    rows = []
    for module in (theirs, ours):
        optimizer = optimizer_of(kind=kind)
        scheduler = SHARED[name](module, optimizer)
        row = advance(optimizer, [scheduler], 3)
        for index, factor in ((0, 0.3), (1, 5.0), (0, 0.0)):
            optimizer.param_groups[index]["lr"] *= factor
            row += advance(optimizer, [scheduler], 5)
        rows.append(row)
    assert_rows(rows[1], rows[0], name)


@pytest.mark.parametrize("beside", [n for n in TORCHS if n not in ("OneCycle", "Cyclic")])
def test_edits_beside_restarts_never_raise_the_lr_above_its_base(beside):
    optimizer = optimizer_of()
    schedulers = chained(ours, optimizer, [TORCHS[beside], RESTARTS["Restarts"]])
    for step in range(40):
        optimizer.param_groups[0]["lr"] = 0.1 * (step % 7) / 7
        advance(optimizer, schedulers, 1)
        assert rates(optimizer)[0] <= 0.1 * (1 + 1e-12)


def test_an_edit_ends_a_factor_of_zero():
    optimizer = optimizer_of()
    schedulers = chained(ours, optimizer, [OWN["Constant 0"], OWN["Exponential"]])
    advance(optimizer, schedulers, 2)
    optimizer.param_groups[0]["lr"] = 0.05
    wanted = [[0.05 * 0.9**k, 0.0 if k < 2 else 1e-3 * 0.9 ** (k + 2)] for k in range(6)]
    assert_rows(advance(optimizer, schedulers, 5), wanted, "edited while 0")


# --- restored -------------------------------------------------------------------------------------


def restored(make, saved, order, kind=float, cls=torch.optim.SGD):
    """A new optimizer and schedulers, restored in an order: b build, o optimizer, s schedulers."""
    optimizer, schedulers = optimizer_of(cls, kind), []
    for letter in order:
        if letter == "o":
            optimizer.load_state_dict(copy.deepcopy(saved[0]))
        elif letter == "b":
            schedulers = make(optimizer)
        else:
            for scheduler, state in zip(schedulers, saved[1], strict=True):
                scheduler.load_state_dict(copy.deepcopy(state))
    return optimizer, schedulers


def assert_resumes(make, what, places=(0, 3, 5, 8), kind=float, cls=torch.optim.SGD):
    for place in places:
        first = optimizer_of(cls, kind)
        schedulers = make(first)
        advance(first, schedulers, place)
        saved = copy.deepcopy((first.state_dict(), [each.state_dict() for each in schedulers]))
        wanted = advance(first, schedulers, 8)
        for order in ("obs", "bos", "bso", "bs"):
            optimizer, others = restored(make, saved, order, kind, cls)
            got = advance(optimizer, others, 8)
            assert_rows(got, wanted, (what, place, order))


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("kind", [float, double])
def test_every_scheduler_resumes_in_every_order_of_restoring(name, kind):
    assert_resumes(lambda o: [OWN[name](ours, o)], name, kind=kind)


@pytest.mark.parametrize("first", OWN)
@pytest.mark.parametrize(
    "together",
    [
        chained,
        pytest.param(sequential, marks=pytest.mark.slow),
        pytest.param(side_by_side, marks=pytest.mark.slow),
    ],
)
def test_every_pair_resumes_in_every_order_of_restoring(first, together):
    some = ("Lambda up", "Multiplicative", "Linear", "Cosine floor", "Restarts", "Constant 0")
    for second in some:
        makers = [OWN[first], OWN[second]]
        assert_resumes(lambda o, m=makers: together(ours, o, m), (first, second), (3, 5))


@pytest.mark.parametrize("name", RESTARTS)
@pytest.mark.parametrize("together", TOGETHER)
def test_restarts_resume_on_an_optimizer_of_lamina(name, together):
    for first in ("Linear", "Step"):
        makers = [OWN[first], OWN[name]]
        assert_resumes(lambda o, m=makers: together(ours, o, m), first, (3, 5), cls=optim.SGD)


def test_momentum_is_restored_with_the_scheduler():
    def make(cls, optimizer):
        return getattr(ours, cls)(optimizer, **options[cls])

    options = {
        "OneCycleLR": {"max_lr": 0.1, "total_steps": 20},
        "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 4},
    }
    for cls, base in itertools.product(options, (torch.optim.SGD, optim.AdamW)):
        hyper = {"momentum": 0.9} if base is torch.optim.SGD else {}
        first, second = (base([nn.Parameter(torch.ones(1))], lr=0.1, **hyper) for _ in range(2))
        scheduler = make(cls, first)
        advance(first, [scheduler], 6)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        make(cls, second).load_state_dict(scheduler.state_dict())
        for key in ("momentum", "betas", "lr"):
            assert second.param_groups[0].get(key) == first.param_groups[0].get(key)


def test_an_edit_just_before_saving_survives_each_order():
    def make(optimizer):
        return [ours.ExponentialLR(optimizer, 0.9)]

    first = optimizer_of()
    [scheduler] = make(first)
    advance(first, [scheduler], 3)
    first.param_groups[0]["lr"] = 0.02
    saved = copy.deepcopy((first.state_dict(), [scheduler.state_dict()]))
    for order in ("obs", "bos", "bso"):
        optimizer, schedulers = restored(make, saved, order)
        rows = advance(optimizer, schedulers, 2)
        assert [row[0] for row in rows] == pytest.approx([0.02, 0.018, 0.0162])


def test_only_the_optimizer_restored_lets_restarts_begin_anew_as_torchs():
    rows = []
    for module in (theirs, ours):
        first, second = optimizer_of(), optimizer_of()
        advance(first, [module.CosineAnnealingWarmRestarts(first, 9)], 8)
        scheduler = module.CosineAnnealingWarmRestarts(second, 9)
        second.load_state_dict(first.state_dict())
        rows.append(advance(second, [scheduler], 20))
    assert_rows(rows[1], rows[0], "optimizer only")


def test_a_plateau_restored_alone_keeps_its_reductions():
    first, second = optimizer_of(), optimizer_of()
    schedulers = [ours.ReduceLROnPlateau(each, patience=0) for each in (first, second)]
    for _ in range(3):
        schedulers[0].step(1.0)
    schedulers[1].load_state_dict(schedulers[0].state_dict())
    assert rates(second) == rates(first) == pytest.approx([1e-3, 1e-5])


def test_a_plateau_beside_restarts_lowers_every_later_cycle():
    optimizer = optimizer_of()
    restarts = ours.CosineAnnealingWarmRestarts(optimizer, 4)
    plateau = ours.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    advance(optimizer, [restarts], 2)
    plateau.step(1.0)
    plateau.step(1.0)
    for place in range(3, 20):
        advance(optimizer, [restarts], 1)
        assert rates(optimizer) == pytest.approx([lr / 2 for lr in restarts.at(place)])


# --- copies, the other library, reports -----------------------------------------------------------


@pytest.mark.parametrize("first", ["Linear", "Restarts", "Constant 0", "Cyclic"])
@pytest.mark.parametrize("together", TOGETHER)
def test_copies_in_the_middle_go_on_by_themselves(first, together):
    for second in ("Exponential", "Restarts floor"):
        optimizer = optimizer_of()
        schedulers = together(ours, optimizer, [OWN[first], OWN[second]])
        advance(optimizer, schedulers, 3)
        copies = copy.deepcopy(schedulers)
        wanted = advance(optimizer, schedulers, 8)
        assert advance(copies[0].optimizer, copies, 8) == wanted


def test_a_pickled_scheduler_goes_on():
    optimizer = optimizer_of()
    makers = [OWN["Linear"], RESTARTS["Restarts"], OWN["Constant 0"], OWN["Step"]]
    schedulers = chained(ours, optimizer, makers)
    advance(optimizer, schedulers, 3)
    [again] = pickle.loads(pickle.dumps(schedulers))
    wanted = advance(optimizer, schedulers, 8)
    assert advance(again.optimizer, [again], 8) == wanted


@pytest.mark.parametrize("name", SHARED)
def test_each_librarys_schedulers_drive_the_others_optimizers(name):
    rows = []
    for module, cls in itertools.product((theirs, ours), (torch.optim.SGD, optim.SGD)):
        optimizer = optimizer_of(cls)
        rows.append(advance(optimizer, [SHARED[name](module, optimizer)], 16))
    for row in rows[1:]:
        assert_rows(row, rows[0], name)


@pytest.mark.parametrize("first", TORCHS)
def test_torchs_schedulers_beside_ours_work_as_beside_their_own(first):
    some = ("Lambda", "Multiplicative", "Linear", "Cosine floor", "OneCycle")
    for second, together, flip in itertools.product(some, TOGETHER, (False, True)):
        wanted = optimizer_of()
        makers = [TORCHS[first], TORCHS[second]]
        rows = advance(wanted, together(theirs, wanted, makers), 12)
        modules = (theirs, ours) if flip else (ours, theirs)
        parts = [
            lambda _, o, m=m, make=make: make(m, o) for m, make in zip(modules, makers, strict=True)
        ]
        optimizer = optimizer_of()
        got = advance(optimizer, together(ours, optimizer, parts), 12)
        assert_rows(got, rows, (first, second, together.__name__, flip))


def test_torchs_warmup_in_our_chain_is_multiplied_by_restarts():
    for make in (TORCHS["Linear"], TORCHS["Lambda up"]):
        optimizers = optimizer_of(), optimizer_of()
        parts = [
            [make(module, optimizer), ours.CosineAnnealingWarmRestarts(optimizer, 6)]
            for module, optimizer in zip((theirs, ours), optimizers, strict=True)
        ]
        chains = [ours.ChainedScheduler(each) for each in parts]
        rows = [advance(o, [c], 20) for o, c in zip(optimizers, chains, strict=True)]
        assert_rows(rows[0], rows[1], "torch's warmup")


def test_torchs_writes_are_no_edits_for_a_scheduler_made_after_them():
    rows = []
    for module in (theirs, ours):
        optimizer = optimizer_of()
        advance(optimizer, [module.LambdaLR(optimizer, lambda e: 0.9**e)], 3)
        advance(optimizer, [theirs.ExponentialLR(optimizer, 0.5)], 3)
        rows.append(advance(optimizer, [module.CosineAnnealingWarmRestarts(optimizer, 4)], 6))
    assert_rows(rows[1], rows[0], "after torch's")


def test_every_change_is_reported_once(caplog):
    optimizer = optimizer_of(rates=(0.1,))
    parts = [ours.LinearLR(optimizer, 0.5, 1.0, 2), theirs.ExponentialLR(optimizer, 0.5)]
    scheduler = ours.SequentialLR(optimizer, parts, [2], verbose=True)
    with caplog.at_level(logging.INFO, logger="lamina"):
        advance(optimizer, [scheduler], 3)
        assert [m.split("lr ")[1] for m in caplog.messages] == ["0.075", "0.1", "0.05"]
        caplog.clear()
        again = optimizer_of(rates=(0.1,))
        restarts = ours.CosineAnnealingWarmRestarts(again, 3, verbose=True)
        advance(again, [restarts], 2)
        restarts.load_state_dict({**restarts.state_dict(), "_last_lr": [0.0125]})
    assert [m.split("lr ")[1] for m in caplog.messages] == ["0.075", "0.025", "0.0125"]
