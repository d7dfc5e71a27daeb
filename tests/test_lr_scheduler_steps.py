"""`optimizer.step` replaced by anything callable: schedulers still count steps."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as theirs

from lamina import optim
from lamina.errors import LaminaWarning
from lamina.optim import lr_scheduler as ours

ORDER = r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`"


def optimizer_of(cls=torch.optim.SGD):
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    return cls([param], lr=0.1)


def partial(optimizer):
    optimizer.step = functools.partial(optimizer.step)


def plain_function(optimizer):
    original = optimizer.step

    def step(closure=None):
        return original(closure)

    optimizer.step = step


def callable_object(optimizer):
    class Counting:  # as a gradient scaler of one's own may do
        def __init__(self, step):
            self.step, self.calls = step, 0

        def __call__(self, *args, **kwargs):
            self.calls += 1
            return self.step(*args, **kwargs)

    optimizer.step = Counting(optimizer.step)


def bound_to_another(optimizer):
    class Accelerator:  # as Accelerate patches the step of an optimizer under a scaler
        def __init__(self, optimizer):
            self.original = type(optimizer).step

        def patched(self, closure=None):
            return self.original(optimizer, closure)

    optimizer.step = Accelerator(optimizer).patched


def compiled(optimizer):
    optimizer.step = torch.compile(optimizer.step, backend="eager")


def untouched(optimizer):
    """As it was."""


WAYS = [untouched, partial, plain_function, callable_object, bound_to_another, compiled]
#: dynamo runs torch's step inside the graph, which takes seconds to compile; ours stays outside
CASES = [
    pytest.param(cls, way, marks=[pytest.mark.slow] * (cls is torch.optim.SGD and way is compiled))
    for cls in (torch.optim.SGD, optim.SGD)
    for way in WAYS
]

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
MAKERS = {
    "StepLR": lambda o: ours.StepLR(o, 1, 0.5),
    "LambdaLR": lambda o: ours.LambdaLR(o, lambda e: 0.5**e),
    "OneCycleLR": lambda o: ours.OneCycleLR(o, 0.1, 10, cycle_momentum=False),
    "WarmRestarts": lambda o: ours.CosineAnnealingWarmRestarts(o, 4),
    "SequentialLR": lambda o: ours.SequentialLR(o, [ours.LinearLR(o, 0.5), ours.StepLR(o, 1)], [3]),
    "ChainedScheduler": lambda o: ours.ChainedScheduler([ours.LinearLR(o), ours.StepLR(o, 1)]),
    "Plateau": lambda o: ours.ReduceLROnPlateau(o),
}


@pytest.mark.parametrize(("cls", "replace"), CASES)
@pytest.mark.parametrize("name", MAKERS)
def test_a_scheduler_is_made_for_a_replaced_step(name, cls, replace):
    optimizer, plain = optimizer_of(cls), optimizer_of(cls)
    replace(optimizer)
    schedulers = [MAKERS[name](each) for each in (optimizer, plain)]
    for _ in range(4):
        for each, scheduler in zip((optimizer, plain), schedulers, strict=True):
            each.step()
            scheduler.step(*[1.0] * (name == "Plateau"))
    assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert torch.equal(*[each.param_groups[0]["params"][0] for each in (optimizer, plain)])


@pytest.mark.parametrize(("cls", "replace"), CASES)
@pytest.mark.parametrize("late", [False, True])
def test_a_scheduler_that_steps_first_is_told_and_only_that(cls, replace, late):
    for early in (True, False):
        optimizer = optimizer_of(cls)
        late or replace(optimizer)
        scheduler = ours.StepLR(optimizer, 1)
        late and replace(optimizer)
        if not early:
            optimizer.step()
            scheduler.step()  # a warning would be an error
            continue
        with pytest.warns(LaminaWarning, match=ORDER) as caught:
            scheduler.step()
        assert caught[0].filename == __file__
        scheduler.step()


def test_the_step_is_not_replaced_by_ours():
    optimizer = optimizer_of()
    step = optimizer.step
    for _ in range(3):
        ours.StepLR(optimizer, 1)
    assert optimizer.step == step
    assert len(optimizer._optimizer_step_post_hooks) == 1


def test_a_gradient_scaler_counts_the_steps_that_were_done():
    optimizer = optimizer_of()
    scheduler = ours.StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler("cpu")
    param = optimizer.param_groups[0]["params"][0]
    scaler.scale(param.sum() * float("inf")).backward()
    scaler.step(optimizer)  # skipped
    scaler.update()
    with pytest.warns(LaminaWarning, match=ORDER):  # as in torch
        scheduler.step()
    again = optimizer_of()
    other = ours.StepLR(again, 1)
    scaler.scale(again.param_groups[0]["params"][0].sum()).backward()
    scaler.step(again)
    other.step()


def test_a_copied_optimizer_is_not_accused():
    scheduler = ours.StepLR(optimizer_of(), 1)
    scheduler.optimizer.step()
    copied = copy.deepcopy(scheduler)
    copied.step()
    assert len(copied.optimizer._optimizer_step_post_hooks) == 1


def test_schedulers_of_both_libraries_share_one_note_of_the_steps():
    for first, second in ((ours, theirs), (theirs, ours)):
        optimizer = optimizer_of()
        schedulers = [first.StepLR(optimizer, 1), second.ExponentialLR(optimizer, 0.9)]
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()  # a warning would be an error
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.009)


def test_accelerates_wrapper_of_an_optimizer():
    accelerate = pytest.importorskip("accelerate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerator = accelerate.Accelerator(cpu=True)
        for cls in (torch.optim.SGD, optim.SGD):
            inner = optimizer_of(cls)
            wrapped = accelerator.prepare(inner)
    scheduler = ours.CosineAnnealingWarmRestarts(wrapped, 4)
    beside = ours.LinearLR(inner, 0.1, 1.0, 10)  # the inner one has the same groups
    wrapped.step()
    scheduler.step()
    beside.step()
    assert inner.param_groups[0]["lr"] == pytest.approx(0.1 * (2 + 2**0.5) / 4 * 0.19)


# --- step(epoch) ----------------------------------------------------------------------------------


def test_an_epoch_is_announced_as_deprecated_where_torch_does():
    for module in (theirs, ours):
        optimizer = optimizer_of()
        plateau, steps = module.ReduceLROnPlateau(optimizer), module.StepLR(optimizer, 2)
        optimizer.step()
        for act in (lambda s=steps: s.step(5), lambda p=plateau: p.step(1.0, 3)):
            with pytest.warns(UserWarning, match="The epoch parameter in `scheduler.step") as told:
                act()
            assert len(told) == 1
            assert told[0].filename == __file__ or module is theirs
        module.CosineAnnealingWarmRestarts(optimizer, 3).step(1.5)  # there it is the way to do it
        assert plateau.last_epoch == 3
