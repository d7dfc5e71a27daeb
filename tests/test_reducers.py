"""What DDP reduces is measured; in a process group of one, where all of it can be seen."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import lamina as lm
from lamina.model.reducers import measure
from models import equal, mlp
from processes import end_group

pytestmark = pytest.mark.usefixtures("little_to_search")

WRAPPINGS = {
    "plain": {},
    "static_graph": {"static_graph": True},
    "find_unused": {"find_unused_parameters": True},
    "bucket view": {"gradient_as_bucket_view": True},
    "no buckets": {"bucket_cap_mb": 0.00001},
}
LATE = lm.Plan(lm.SGD, lr=0.1, momentum=0.9, rules=[lm.Rule("body", thaw=2)])
NEVER = lm.Plan(lm.SGD, lr=0.1, momentum=0.9, rules=[lm.Rule("body", frozen=True)])
BODY = ["body.weight", "body.bias"]


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    end_group()


def held(model, of=None):
    """The names of the parameters of a model that a reducer holds."""
    named = dict((of or model).named_parameters())
    found = measure(model, named.values())
    return [name for name, param in named.items() if id(param) in found.held - found.missed]


def loss_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return model(torch.randn(4, 3, generator=generator, dtype=torch.float64)).square().mean()


def flags(model):
    return {name for name, param in model.named_parameters() if param.requires_grad}


def steps(model, optimizer, count, clip=None, micro=1):
    """Some steps, each of some batches; the norms that a trainer's clipping sees."""
    norms = []
    for step in range(count):
        for part in range(micro):
            if isinstance(model, DDP) and part + 1 < micro:
                with model.no_sync():
                    (loss_of(model, step * micro + part) / micro).backward()
            else:
                (loss_of(model, step * micro + part) / micro).backward()
        if clip:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


# ------------------------------------------------------------------------------------- measuring


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_exactly_what_required_a_gradient_at_wrapping_is_held(group, wrapping):
    model = mlp()
    model.body.weight.requires_grad_(False)
    ddp = DDP(model, **WRAPPINGS[wrapping])
    rest = ["body.bias", "head.weight", "head.bias"]
    assert held(model) == rest
    loss = loss_of(ddp)  # its graph keeps the same nodes
    assert held(model) == rest
    loss.backward()
    assert held(model) == rest
    model.body.weight.requires_grad_(True)  # which comes too late for the reducer
    loss = loss_of(ddp)
    assert held(model) == rest
    assert held(ddp, model) == rest
    assert flags(model) == {"body.weight", *rest}
    del loss


def test_the_flag_of_what_is_held_may_be_off_since(group):
    model = mlp()
    ddp = DDP(model)
    model.head.requires_grad_(False)
    assert len(held(ddp, model)) == 4
    assert flags(model) == {"body.weight", "body.bias"}


def test_without_a_process_group_or_a_wrapper_nothing_is_held(group, tmp_path):
    model = mlp()
    assert held(model) == []
    loss = loss_of(model)
    model.body.weight.register_post_accumulate_grad_hook(lambda param: None)
    model.body.bias.register_hook(lambda grad: None)
    other = DDP(mlp())
    assert held(model) == []
    end_group()
    assert held(other, other.module) == []
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/again", rank=0, world_size=1
    )
    del loss


def test_a_wrapper_that_was_let_go_holds_nothing(group):
    model = mlp()
    ddp = DDP(model)
    ddp.cycle = ddp  # collected, not freed by counting
    assert len(held(model)) == 4
    del ddp
    model.body.requires_grad_(False)
    ddp = DDP(model)
    assert held(model) == ["head.weight", "head.bias"]
    assert held(ddp, model) == ["head.weight", "head.bias"]


def test_a_tied_parameter_is_held_once(group):
    model = mlp()
    model.twin = nn.Linear(3, 4).double()
    model.twin.weight = model.body.weight
    model.twin.bias.requires_grad_(False)
    ddp = DDP(model)
    assert held(ddp, model) == ["body.weight", "body.bias", "head.weight", "head.bias"]


# ------------------------------------------------------------------------- frozen under a wrapper


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("on", ["wrapper", "inner"])
@pytest.mark.parametrize("plan", [LATE, NEVER], ids=["late", "never"])
def test_what_is_held_keeps_its_flag_and_has_zero_gradients(group, wrapping, on, plan):
    model, alone = mlp(), mlp()
    ddp = DDP(model, **WRAPPINGS[wrapping])
    optimizer = plan.build(ddp if on == "wrapper" else model, steps=5)
    assert len(flags(model)) == 4
    torch.distributed.barrier()
    frozen = copy.deepcopy(model.body.state_dict())
    loss_of(ddp).backward()
    assert all(not grad.any() for grad in (model.body.weight.grad, model.body.bias.grad))
    optimizer.zero_grad()
    norms = steps(ddp, optimizer, 2, clip=0.1)
    assert equal(model.body.state_dict(), frozen)
    assert not any("momentum_buffer" in optimizer.state[p] for p in model.body.parameters())
    norms += steps(ddp, optimizer, 3, clip=0.1)
    with_group = plan.build(alone, steps=5)
    assert steps(alone, with_group, 2, clip=0.1) + steps(alone, with_group, 3, clip=0.1) == norms
    assert equal(model.state_dict(), alone.state_dict())
    assert len(flags(model)) == 4


@pytest.mark.parametrize("wrapping", ["plain", "bucket view", "find_unused"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_zero_through_accumulation(group, wrapping, set_to_none, monkeypatch):
    model, alone = mlp(), mlp()
    ddp = DDP(model, **WRAPPINGS[wrapping])
    plan = lm.Plan(lm.SGD, lr=0.1, rules=[lm.Rule("body", thaw=[0, 3], freeze=1)])
    optimizer, other = plan.build(ddp, steps=5), plan.build(alone, steps=5)
    for each in (optimizer, other):
        zero = each.zero_grad
        monkeypatch.setattr(each, "zero_grad", lambda zero=zero: zero(set_to_none=set_to_none))
    assert steps(ddp, optimizer, 5, clip=0.1, micro=3) == pytest.approx(
        steps(alone, other, 5, clip=0.1, micro=3), rel=1e-12
    )
    assert all(map(torch.allclose, model.state_dict().values(), alone.state_dict().values()))


def test_gradients_are_zero_under_a_scaler(group):
    model = mlp(dtype=torch.float32)
    ddp = DDP(model)
    optimizer = LATE.build(ddp, steps=5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    batch = torch.ones(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ddp(batch).float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    alone = nn.utils.get_total_norm([param.grad for param in model.head.parameters()])
    assert alone > 0.1
    assert nn.utils.clip_grad_norm_(model.parameters(), 0.1) == alone
    scaler.step(optimizer)
    assert optimizer.clock == 1


def test_a_bad_gradient_of_a_frozen_part_counts_nowhere(group):
    model = mlp()
    ddp = DDP(model)
    LATE.build(ddp, steps=5)
    model.act.register_full_backward_hook(lambda module, grads, _: (grads[0] * torch.nan,))
    loss_of(ddp).backward()
    assert not model.body.weight.grad.any()
    assert torch.isfinite(nn.utils.clip_grad_norm_(model.parameters(), 0.1))


# -------------------------------------------------------------------------- built before wrapping


def test_only_what_trains_later_keeps_its_flag_for_a_wrapper_to_come(group):
    model, alone = mlp(), mlp()
    plan = lm.Plan(
        lm.SGD, lr=0.1, rules=[lm.Rule("body.weight", thaw=2), lm.Rule("body.bias", frozen=True)]
    )
    optimizer, other = plan.build(model, steps=5), plan.build(alone, steps=5)
    assert flags(model) == flags(alone) == {"body.weight", "head.weight", "head.bias"}
    ddp = DDP(model)
    assert steps(ddp, optimizer, 5, clip=0.1) == steps(alone, other, 5, clip=0.1)
    assert equal(model.state_dict(), alone.state_dict())


def test_after_the_first_step_without_a_wrapper_flags_follow_the_windows(group):
    model = mlp()
    optimizer = lm.Plan(lm.SGD, lr=0.1, rules=[lm.Rule("body", thaw=[2], freeze=[4])]).build(
        model, steps=9
    )
    loss = None
    seen = []
    for step in range(5):
        loss = loss_of(model, step)  # its graph stays alive until the next one
        loss.backward()
        seen.append(model.body.weight.grad is None or not model.body.weight.grad.any())
        optimizer.step()
        optimizer.zero_grad()
        seen.append(model.body.weight.requires_grad)
    assert seen == [True, False, True, True, False, True, False, False, True, False]


def test_what_was_frozen_by_hand_and_thaws_is_held_if_the_plan_is_built_first(group):
    model, alone = mlp(), mlp()
    for each in (model, alone):
        each.body.requires_grad_(False)
    optimizer, other = LATE.build(model, steps=5), LATE.build(alone, steps=5)
    ddp = DDP(model)
    assert steps(ddp, optimizer, 5, clip=0.1) == steps(alone, other, 5, clip=0.1)
    assert equal(model.state_dict(), alone.state_dict())
    optimizer.release()
    assert flags(model) == {"head.weight", "head.bias"}


def test_a_plan_older_than_the_process_group_is_refused_in_its_first_step(tmp_path):
    model = mlp()
    optimizer = LATE.build(model, steps=5)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        ddp = DDP(model)
        loss = loss_of(ddp)
        loss.backward()
        for _ in range(2):
            with pytest.raises(lm.PlanError, match="plan after torch"):
                optimizer.step()
        assert equal((model.state_dict(), optimizer.state_dict()), before)
        del ddp, loss
        optimizer.release()
        optimizer = LATE.build(model, steps=5)  # as the message says
        ddp = DDP(model)
        steps(ddp, optimizer, 3)
        assert not equal(model.body.state_dict(), mlp().body.state_dict())
    finally:
        end_group()


# ------------------------------------------------------------------------------- what is refused


def test_what_the_reducer_does_not_hold_cannot_thaw(group):
    model = mlp()
    model.body.requires_grad_(False)
    ddp = DDP(model)
    for on in (ddp, model):
        with pytest.raises(lm.PlanError, match=r"body\.weight, body\.bias at some step"):
            LATE.build(on, steps=5)
        (finding,) = LATE.preview(on, steps=5).findings
        assert finding.code == "not-reduced"
    assert flags(model) == {"head.weight", "head.bias"}
    assert not model.body.weight._backward_hooks
    NEVER.build(ddp, steps=5)


def test_the_fix_for_what_is_not_held_works(group):
    model = mlp()
    model.body.requires_grad_(False)
    model = DDP(model)
    with pytest.raises(lm.PlanError) as caught:
        LATE.build(model, steps=5)
    model = model.module
    call = str(caught.value).split("lamina.thaw")[1].split(")")[0]
    eval(f"lm.thaw{call})")
    model = DDP(model)
    optimizer = LATE.build(model, steps=5)
    steps(model, optimizer, 5)
    assert not equal(model.module.body.state_dict(), mlp().body.state_dict())


def test_a_second_phase_needs_a_wrapper_that_holds_it(group):
    model = mlp()
    first = NEVER.build(model, steps=2)
    ddp = DDP(model)
    steps(ddp, first, 2)
    first.release()
    second = lm.Plan(lm.SGD, lr=0.1)
    loss = loss_of(ddp)  # of a validation, with everything on
    with pytest.raises(lm.PlanError, match="requires_grad was off when"):
        second.build(ddp, steps=2)
    del loss
    ddp = DDP(ddp.module)
    steps(ddp, second.build(ddp, steps=2), 2)
    assert not equal(model.body.state_dict(), mlp().body.state_dict())


def test_two_wrappers_that_disagree_are_told_apart_by_the_one_given(group):
    model = mlp()
    model.body.requires_grad_(False)
    old = DDP(model)
    model.body.requires_grad_(True)
    new = DDP(model)
    with pytest.raises(lm.PlanError, match=r"two .* wrappers are around body\.weight"):
        LATE.build(model, steps=5)
    LATE.build(new, steps=5).release()
    with pytest.raises(lm.PlanError, match="requires_grad was off"):
        LATE.build(old, steps=5)
    del old
    LATE.build(model, steps=5)


def test_a_part_outside_of_every_wrapper_is_named(group):
    model = mlp()
    model.body = DDP(model.body)
    with pytest.raises(lm.PlanError, match=r"head\.weight, head\.bias, which no Distributed"):
        lm.Plan(lm.SGD, lr=0.1).build(model, steps=5)
    lm.Plan(lm.SGD, lr=0.1, rules=[lm.Rule("head", frozen=True)]).build(model, steps=5)


def test_what_a_wrapper_was_told_to_leave_alone_follows_its_windows(group):
    model = mlp()
    DDP._set_params_and_buffers_to_ignore_for_model(model, BODY)
    ddp = DDP(model)
    LATE.build(ddp, steps=5)
    assert flags(model) == {"head.weight", "head.bias"}
    lm.Plan(lm.SGD, lr=0.1).build(ddp, steps=5)


@pytest.mark.parametrize("on", ["wrapper", "inner"])
def test_what_is_turned_off_after_wrapping_is_named(group, on):
    model = mlp()
    ddp = DDP(model)
    model.body.requires_grad_(False)
    plan = lm.Plan(lm.SGD, lr=0.1)
    with pytest.raises(lm.PlanError, match=r"body\.weight, body\.bias was turned off after"):
        plan.build(ddp if on == "wrapper" else model, steps=5)
    loss_of(ddp).backward()
    with pytest.raises(RuntimeError, match="Expected to have finished reduction"):  # torch's own
        loss_of(ddp)


@pytest.mark.parametrize("wrapping", ["static_graph", "find_unused"])
def test_what_is_turned_off_after_wrapping_rests_where_torch_allows_it(group, wrapping):
    model, alone = mlp(), mlp()
    ddp = DDP(model, **WRAPPINGS[wrapping])
    for each in (model, alone):
        each.body.requires_grad_(False)
    plan = lm.Plan(lm.SGD, lr=0.1)
    with pytest.warns(lm.LaminaWarning, match="frozen-by-model"):
        optimizer, other = plan.build(ddp, steps=5), plan.build(alone, steps=5)
    assert steps(ddp, optimizer, 5, clip=0.1) == steps(alone, other, 5, clip=0.1)
    assert equal(model.state_dict(), alone.state_dict())
    assert flags(model) == {"head.weight", "head.bias"}


def test_what_an_earlier_plan_left_behind_does_not_stop_a_later_one(group):
    model, alone = mlp(), mlp()
    ddp = DDP(model)
    NEVER.build(ddp, steps=5)  # and never released
    plan = lm.Plan(lm.SGD, lr=0.1)
    steps(ddp, plan.build(ddp, steps=5), 3)
    steps(alone, plan.build(alone, steps=5), 3)
    assert equal(model.state_dict(), alone.state_dict())


def test_thawing_by_hand_frees_what_a_plan_left_behind(group):
    model = mlp()
    ddp = DDP(model)
    NEVER.build(ddp, steps=5)
    rows = {row.name: (row.trainable, row.why) for row in lm.trainable(model)}
    assert rows["body.weight"] == (False, "frozen by a plan")
    assert rows["head.weight"] == (True, "")
    assert lm.thaw(model, "body") == tuple(BODY)
    loss_of(model).backward()
    assert model.body.weight.grad.any()


# --------------------------------------------------------------------------- release, copies, words


def test_release_takes_the_hooks_away(group):
    model = mlp()
    ddp = DDP(model)
    optimizer = LATE.build(ddp, steps=5)
    assert model.body.weight._backward_hooks
    optimizer.release()
    assert not model.body.weight._backward_hooks
    loss_of(ddp).backward()
    assert model.body.weight.grad.any()


def test_copies_are_free_of_hooks(group):
    model = mlp()
    ddp = DDP(model)
    optimizer = LATE.build(ddp, steps=5)
    twin = copy.deepcopy(model)
    loss_of(twin).backward()
    assert twin.body.weight.grad.any()
    pair = pickle.loads(pickle.dumps((model, copy.deepcopy(optimizer))))
    assert len(pair[1].param_groups) == len(optimizer.param_groups)
    both, other = copy.deepcopy((model, optimizer))  # a copy that goes on by itself
    alone = mlp()
    steps(both, other, 5, clip=0.1)
    steps(alone, LATE.build(alone, steps=5), 5, clip=0.1)
    assert equal(both.state_dict(), alone.state_dict())


def test_the_preview_says_which_flags_stay_on_and_why(group):
    model = mlp()
    text = " ".join(str(LATE.preview(model, steps=5)).split())
    assert "may wrap the model yet, so body.weight, body.bias" in text
    ddp = DDP(model)
    text = " ".join(str(LATE.preview(ddp, steps=5)).split())
    assert "DistributedDataParallel reduces body.weight, body.bias" in text
    assert not model.body.weight._backward_hooks


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_state_loads_in_a_wrapped_run(group, where):
    model, alone = mlp(), mlp()
    other = LATE.build(alone, steps=5)
    steps(alone, other, 3)
    saved = copy.deepcopy((alone.state_dict(), other.state_dict()))
    if where == "before":
        optimizer = LATE.build(model, steps=5)
        ddp = DDP(model)
    else:
        ddp = DDP(model)
        optimizer = LATE.build(ddp, steps=5)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    steps(ddp, optimizer, 2, clip=0.1)
    steps(alone, other, 2, clip=0.1)
    assert equal(model.state_dict(), alone.state_dict())
