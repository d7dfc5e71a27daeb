"""Which modules rest in eval mode, through whatever asks them to train, and what comes back."""

import copy
import pickle
import types
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import lamina as lm


def net():
    """A body with BatchNorm and dropout, in a module of its own, and a head."""
    torch.manual_seed(0)
    norm = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    body = nn.Sequential(nn.Linear(3, 3), norm)
    return nn.Sequential(body, nn.Linear(3, 2))


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def resting(model):
    return {name for name, trains in modes(model).items() if not trains}


BODY = {"0", "0.0", "0.1", "0.1.0", "0.1.1"}


def plan(**rule):
    return lm.Plan("SGD", lr=0.1, rules=[lm.Rule("0.*", **rule)] if rule else [])


def steps(model, optimizer, number=1):
    for _ in range(number):
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def disabled(self, mode=True):
    """What Stable Diffusion and others put in the place of `train`."""
    return self


# ------------------------------------------------------------------------------- the next build


def by_hand(model):
    lm.freeze(model, "0")
    return model


def by_a_plan(model):
    plan(thaw=50).build(model, steps=100)
    return model


@pytest.mark.parametrize(
    ("before", "then"),
    [
        (by_hand, {"frozen": False}),
        (by_hand, {"frozen": True, "hold": False}),
        (by_a_plan, {}),
        (by_a_plan, {"frozen": True, "hold": False}),
    ],
)
def test_a_build_lets_go_of_what_it_does_not_hold(before, then):
    model, free = before(net()), net()
    assert resting(model) == BODY
    plan(**then).build(model)
    x = torch.randn(8, 3)
    for each in (model.train(), free.train()):
        torch.manual_seed(1)
        each(x)
    assert resting(model) == set()
    for mine, theirs in zip(model.buffers(), free.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_build_holds_what_is_still_frozen_by_hand():
    model = by_hand(net())
    with pytest.warns(lm.LaminaWarning) as told:
        plan(lr=0.2).build(model)
    codes = [str(each.message).partition(":")[0] for each in told]
    assert codes == ["lr-never-trains", "frozen-by-model"]
    assert resting(model.train()) == BODY


def test_a_later_build_holds_what_it_freezes_itself():
    model = by_a_plan(net())
    lm.Plan("SGD", lr=0.1, rules=[lm.Rule("0.1.*", frozen=True)]).build(model)
    assert resting(model.train()) == {"0.1", "0.1.0", "0.1.1"}


def test_what_is_frozen_by_hand_in_a_run_rests_through_windows_elsewhere():
    model = net()
    rules = [lm.Rule("1.*", freeze=2), lm.Rule("0.0", freeze=3)]
    optimizer = lm.Plan("SGD", lr=0.1, rules=rules).build(model, steps=9)
    steps(model, optimizer)
    lm.freeze(model, "0.1")
    steps(model, optimizer, 1)
    assert resting(model.train()) == {"0.1", "0.1.0", "0.1.1", "1"}


def test_a_plan_thaws_what_was_frozen_by_hand_meanwhile():
    model = net()
    optimizer = plan(thaw=2).build(model, steps=9)
    lm.freeze(model, "0")
    steps(model, optimizer, 2)
    assert resting(model.train()) == set()


# ------------------------------------------------------------------------------- what comes back


def thawed_by_the_plan(model, optimizer):
    steps(model, optimizer, 3)


def released(model, optimizer):
    optimizer.release()


def thawed_by_hand(model, optimizer):
    lm.thaw(model, "0")


@pytest.mark.parametrize("end", [thawed_by_the_plan, released, thawed_by_hand])
@pytest.mark.parametrize("when", ["before", "while held"])
def test_the_modes_a_user_set_come_back(end, when):
    model = net()
    if when == "before":
        model[0][1][0].eval()
    optimizer = plan(thaw=3).build(model, steps=9)
    if when == "while held":  # every epoch of a loop that keeps BatchNorm in eval mode
        model.eval()
        model.train()
        model[0][1][0].eval()
    assert resting(model) == BODY
    end(model, optimizer)
    assert resting(model) == {"0.1.0"}


def validate(model):
    """As Lightning does: eval mode, and then for each module the flag it had, by assignment."""
    flags = modes(model)
    model.eval()
    for name, module in model.named_modules():
        module.training = flags[name]


@pytest.mark.parametrize("end", [thawed_by_the_plan, released, thawed_by_hand])
@pytest.mark.parametrize("own", [set(), {"0.1.0"}])
def test_a_validation_that_assigns_the_flags_does_not_leave_eval_mode_behind(end, own):
    model = net()
    for name in own:
        model.get_submodule(name).eval()
    optimizer = plan(thaw=3).build(model, steps=9)
    for _ in range(2):
        validate(model)
        assert resting(model) == BODY
        assert model.training
    model, optimizer = copy.deepcopy((model, optimizer))
    end(model, optimizer)
    assert resting(model) == own


def test_eval_mode_of_the_whole_model_stays_where_it_does_not_train_again():
    model = net()
    optimizer = plan(thaw=3).build(model, steps=9)
    validate(model)
    model.eval()
    optimizer.release()
    assert resting(model) == {"", *BODY, "1"}


def test_eval_while_held_is_remembered():
    model = net()
    optimizer = plan(thaw=3).build(model, steps=9)
    model[0].eval()
    optimizer.release()
    assert resting(model) == BODY


def test_release_keeps_what_was_held_by_hand():
    model = by_hand(net())
    for then in ({}, {"frozen": False}, {"thaw": 2}, {"frozen": True, "hold": False}):
        told = nullcontext() if then else pytest.warns(lm.LaminaWarning, match="frozen-by-model")
        with told:
            optimizer = plan(**then).build(model, steps=9)
        model, optimizer = copy.deepcopy((model, optimizer))
        optimizer.release()
        assert resting(model.train()) == BODY
        assert [param.requires_grad for param in model[0].parameters()] == [False] * 4
    lm.thaw(model)
    assert resting(model) == set()


def test_release_does_not_hold_what_an_earlier_plan_held():
    model = by_a_plan(net())
    plan(thaw=2).build(model, steps=9).release()
    assert resting(model.train()) == set()


@pytest.mark.parametrize("end", [released, thawed_by_hand])
@pytest.mark.parametrize("place", [(0,), (0, 1)])
def test_a_train_of_the_instances_own_survives(end, place):
    def patched(model):
        return model[0] if place == (0,) else model[0][1]

    model = net()
    patched(model).eval()
    patched(model).train = types.MethodType(disabled, patched(model))
    before = resting(model)
    optimizer = plan(frozen=True).build(model)
    model.train()
    model, optimizer = copy.deepcopy((model, optimizer))
    assert resting(model) == BODY
    end(model, optimizer)
    model.train()
    assert resting(model) == before
    assert patched(model).train.__func__ is disabled
    assert patched(model).train.__self__ is patched(model)


class NormEval(nn.Module):
    """Keeps its BatchNorm in eval mode by its own `train`, and counts the calls."""

    def __init__(self):
        super().__init__()
        self.dense, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.calls, self.fails = [], False

    def train(self, mode=True):
        super().train(mode)
        self.calls.append(mode)
        if self.fails:
            raise RuntimeError("by the user's train")
        if mode:
            self.norm.eval()
        return self

    def forward(self, x):
        return self.norm(self.dense(x))


def test_a_train_method_of_the_class_does_what_it_means():
    model = nn.Sequential(NormEval(), nn.Linear(3, 2))
    free = copy.deepcopy(model)
    optimizer = plan(thaw=2).build(model, steps=9)
    for mode in (False, True):
        assert model.train(mode) is model
        free.train(mode)
        assert not any(part.training for part in model[0].modules())
    assert model[0].calls == free[0].calls == [False, True]
    steps(model, optimizer, 2)
    assert modes(model) == modes(free)
    assert resting(model) == {"0.norm"}


def test_an_error_in_a_users_train_leaves_it_held():
    model = nn.Sequential(NormEval(), nn.Linear(3, 2))
    optimizer = plan(thaw=2).build(model, steps=9)
    model[0].fails = True
    with pytest.raises(RuntimeError, match="by the user's train"):
        model.eval()
    assert not model[0].training
    model[0].fails = False
    model.train()
    assert resting(model) == {"0", "0.dense", "0.norm"}
    optimizer.release()
    assert resting(model) == {"0.norm"}


def test_a_train_that_calls_itself():
    class Asks(nn.Sequential):
        def train(self, mode=True):
            return super().train(mode) if not mode else self.eval().train(False)

    model = nn.Sequential(Asks(nn.Linear(3, 3)), nn.Linear(3, 2))
    optimizer = plan(thaw=2).build(model, steps=9)
    model.train()
    optimizer.release()
    assert resting(model) == {"0", "0.0"}


def test_what_was_kept_of_the_hold_is_a_plain_train_after_its_end():
    model = net()
    optimizer = plan(frozen=True).build(model)
    kept = model[0].train
    optimizer.release()
    kept(False)
    assert resting(model) == BODY
    model.train()
    assert resting(model) == set()


# -------------------------------------------------------------------------------- which modules


def test_nothing_inside_can_be_put_to_train():
    model = net()
    plan(frozen=True).build(model)
    for module in model.modules():
        module.train()
    model[0][1][0].train()
    assert resting(model) == BODY


class Shares(nn.Module):
    """One dropout behind a frozen layer and behind one that trains."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.body = nn.Sequential(nn.Linear(3, 3), self.drop, nn.Sequential(nn.Dropout(0.5)))
        self.head = nn.Sequential(nn.Linear(3, 2), self.drop)


def test_a_module_that_trains_elsewhere_too_is_not_held():
    model = Shares()
    rules = [lm.Rule("body.*", frozen=True), lm.Rule("head.*", thaw=2)]
    optimizer = lm.Plan("SGD", lr=0.1, rules=rules[:1]).build(model)
    assert resting(model.train()) == {"body", "body.0", "body.2", "body.2.0"}
    optimizer.release()
    assert resting(model) == set()
    lm.freeze(model, "body")
    assert "drop" not in resting(model.train())
    lm.freeze(model, "head")
    assert resting(model.train()) == set(modes(model))
    lm.thaw(model, "head")
    assert resting(model) == {"body", "body.0", "body.2", "body.2.0"}


def test_what_was_frozen_without_hold_is_not_held_by_a_freeze_of_the_rest():
    model = net()
    lm.freeze(model, "0", hold=False)
    lm.freeze(model, "1")
    assert resting(model.train()) == {"", "1"}


def test_a_held_model_can_be_pickled():
    model = net()
    optimizer = plan(thaw=2).build(model, steps=9)
    model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    assert resting(model.train()) == BODY
    model[0][1].eval()
    steps(model, optimizer, 2)
    assert resting(model) == {"0.1", "0.1.0", "0.1.1"}


def test_a_compiled_part_rests_and_comes_back():
    model = net()
    model[0] = torch.compile(model[0], backend="eager")
    optimizer = plan(thaw=1).build(model, steps=9)
    (norm,) = (module for module in model.modules() if isinstance(module, nn.BatchNorm1d))
    model.train()
    steps(model, optimizer)
    assert int(norm.num_batches_tracked) == 0
    assert resting(model) == set()
    steps(model, optimizer)
    assert int(norm.num_batches_tracked) == 1
    optimizer.release()
    optimizer = plan(frozen=True).build(model)
    norm.eval()
    model[0].train()
    model[0].eval()
    assert norm.training is model[0].training is False
    model[0].train()
    assert norm.training is model[0].training is False
    optimizer.release()
    assert norm.training is model[0].training is True
