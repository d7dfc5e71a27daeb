"""A saved state meets a model: by name, in the right dtype, and never in silence."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import lamina as lm
from lamina import optim

PLAN = lm.Plan(lm.AdamW, lr=0.01)


def model_of(names="ab", dtype=torch.float32):
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(3, 3, bias=False, dtype=dtype) for name in names})


def backward(model, step):
    for name, param in model.named_parameters():
        generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def advance(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        backward(model, step)
        optimizer.step()


def state_by_name(optimizer):
    return {
        name: optimizer.state[param]
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    }


# --------------------------------------------------------------------------------- dtype of state

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def saved_by_torch(dtype, steps=3):
    model = model_of(dtype=dtype)
    theirs = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    advance(model, theirs, steps)
    return model, theirs.state_dict()


@pytest.mark.parametrize("wanted", [None, "float32", "bfloat16", "float64"])
@pytest.mark.parametrize(("old", "new"), list(itertools.product(DTYPES, DTYPES)))
def test_a_plan_gives_state_its_own_dtype_or_loses_no_digits(old, new, wanted):
    _, saved = saved_by_torch(old)
    before = copy.deepcopy(saved)
    plan = lm.Plan(lm.AdamW, lr=0.01, state_dtype=wanted)
    by_load = plan.build(model_of(dtype=new))
    by_load.load_state_dict(saved)
    by_resume = plan.build(model_of(dtype=new), resume=saved)
    kind = torch.promote_types(old, new) if wanted is None else getattr(torch, wanted)
    for optimizer in (by_load, by_resume):
        for place, entry in enumerate(state_by_name(optimizer).values()):
            for key in ("exp_avg", "exp_avg_sq"):
                assert entry[key].dtype is kind
                assert torch.equal(entry[key], before["state"][place][key].to(kind))
        converted = optimizer.last_load.converted
        names = [str(each).removeprefix("torch.") for each in (old, kind)]
        assert converted == (() if old is kind else tuple((f"{n}.weight", *names) for n in "ab"))
        assert (f"{names[0]} -> {names[1]} (2 parameters)" in str(optimizer.last_load)) == bool(
            converted
        )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize(("wanted", "now"), [("float32", "float32"), (None, "bfloat16")])
def test_a_distributed_checkpoint_is_converted_too(tmp_path, wanted, now):
    model = model_of(dtype=torch.bfloat16)
    optimizer = PLAN.build(model)
    advance(model, optimizer, 3)
    checkpoint.save(
        {"optimizer": get_optimizer_state_dict(model, optimizer)},
        storage_writer=checkpoint.FileSystemWriter(tmp_path),
        no_dist=True,
    )
    twin = model_of(dtype=torch.bfloat16)
    other = lm.Plan(lm.AdamW, lr=0.01, state_dtype=wanted).build(twin)
    report = lm.load_distributed(other, tmp_path, strict=True)
    for name, entry in state_by_name(other).items():
        saved = state_by_name(optimizer)[name]["exp_avg_sq"]
        assert str(entry["exp_avg_sq"].dtype) == f"torch.{now}"
        assert torch.equal(entry["exp_avg_sq"], saved.to(entry["exp_avg_sq"].dtype))
    assert len(report.converted) == (2 if wanted else 0)


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "LAMB", "AdamW"])
def test_any_rule_converts_and_the_kernels_go_on(name):
    options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    models = [model_of(dtype=torch.bfloat16) for _ in range(2)]
    first = lm.Plan(name, lr=0.01, **options).build(models[0])
    advance(models[0], first, 2)
    wide = lm.Plan(name, lr=0.01, state_dtype="float32", **options)
    second = wide.build(models[1], resume=copy.deepcopy(first.state_dict()))
    advance(models[1], second, 2, first=2)
    for entry in state_by_name(second).values():
        assert {value.dtype for value in entry.values()} == {torch.float32}
        assert entry["step"] == 4


@pytest.mark.parametrize(
    ("kind", "state_dtype"),
    [(torch.bfloat16, None), (torch.bfloat16, "float32"), (torch.float32, "bfloat16")],
)
@pytest.mark.parametrize("change", [None, torch.bfloat16])
def test_a_resume_in_the_middle_equals_the_run_without_it(kind, state_dtype, change):
    """Also where the model changed its dtype under a state that kept its own."""
    plan = lm.Plan(lm.AdamW, lr=0.01, state_dtype=state_dtype)
    model = model_of(dtype=kind)
    optimizer = plan.build(model)
    advance(model, optimizer, 3)
    if change is not None:
        model.to(change)
    advance(model, optimizer, 2, first=3)
    twin = copy.deepcopy(model)
    other = plan.build(twin, resume=copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (twin, other)):
        advance(each, its, 3, first=5)
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    assert other.last_load.converted == ()


@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(DTYPES, 2)))
def test_the_drop_in_tier_converts_as_torch_does_and_says_what_is_lost(old, new):
    _, saved = saved_by_torch(old)
    theirs = torch.optim.AdamW(model_of(dtype=new).named_parameters(), lr=0.01)
    theirs.load_state_dict(copy.deepcopy(saved))
    mine = optim.AdamW(model_of(dtype=new).named_parameters(), lr=0.01)
    lossy = torch.promote_types(old, new) is not new
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        mine.load_state_dict(copy.deepcopy(saved))
    assert len(told) == lossy
    assert all("state_dtype=" in str(each.message) for each in told)
    for one, two in zip(mine.state.values(), theirs.state.values(), strict=True):
        assert one["exp_avg_sq"].dtype is two["exp_avg_sq"].dtype is new
        assert torch.equal(one["exp_avg_sq"], two["exp_avg_sq"])


def test_a_state_dtype_given_to_the_drop_in_tier_is_not_lost_in_a_load():
    model, saved = saved_by_torch(torch.bfloat16)
    mine = optim.AdamW(model_of(dtype=torch.bfloat16).named_parameters(), state_dtype="float32")
    mine.load_state_dict(saved)
    assert all(entry["exp_avg"].dtype is torch.float32 for entry in mine.state.values())
    again = optim.AdamW(model.named_parameters())
    again.load_state_dict(mine.state_dict())  # and goes on where none is given
    assert all(entry["exp_avg"].dtype is torch.float32 for entry in again.state.values())


@pytest.mark.parametrize("build", [lambda m: PLAN.build(m), lambda m: optim.AdamW(m.parameters())])
def test_real_state_of_a_complex_parameter_is_refused(build):
    model = nn.ParameterDict({"a": torch.ones(3, dtype=torch.complex64)})
    optimizer = build(model)
    model["a"].grad = torch.ones(3, dtype=torch.complex64)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg_sq"] = torch.ones(3)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(lm.StateError, match=r"exp_avg_sq of .* is of type"):
        optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()) == str(before)


# ------------------------------------------------------------------------ nothing, or not all, fits


def flags(model):
    return [(param.requires_grad, param._version) for param in model.parameters()]


@pytest.mark.parametrize("strict", [False, True])
def test_a_state_of_another_model_is_refused_and_nothing_moves(strict):
    other = model_of("xy")
    theirs = PLAN.build(other)
    advance(other, theirs, 5)
    for state in (theirs.state_dict(), saved_by_torch(torch.float32)[1]):
        model = model_of("pq")
        plan = lm.Plan(lm.AdamW, lr=0.01, rules=[lm.Rule("p", thaw=3)])
        optimizer = plan.build(model, steps=20)
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(lm.StateError, match=r"none of the 2 saved parameters .*'p.weight'"):
            optimizer.load_state_dict(state, strict=strict)
        assert (optimizer.clock, optimizer.last_load) == (0, None)
        assert str(optimizer.state_dict()) == str(before)
        fresh = model_of("pq")
        known = flags(fresh), [module.training for module in fresh.modules()], vars(fresh).keys()
        with pytest.raises(lm.StateError, match="none of the 2 saved parameters"):
            plan.build(fresh, steps=20, resume=state, strict=strict)
        with pytest.raises(lm.StateError, match="none of the 2 saved parameters"):
            plan.preview(fresh, steps=20, resume=state)
        assert known == (flags(fresh), [m.training for m in fresh.modules()], vars(fresh).keys())


@pytest.mark.parametrize("inner_was_saved", [True, False])
def test_the_proposal_for_a_prefix_works(inner_was_saved):
    inner, outer = model_of(), nn.ModuleDict({"net": nn.ModuleDict({"core": model_of()})})
    old, new = (inner, outer) if inner_was_saved else (outer, inner)
    optimizer = PLAN.build(old)
    advance(old, optimizer, 2)
    state = optimizer.state_dict()
    with pytest.raises(lm.StateError, match="load with renamed=") as raised:
        PLAN.build(new, resume=state)
    proposal = str(raised.value).partition("renamed=")[2].rstrip(".")
    other = PLAN.build(new, resume=state, renamed=eval(proposal), strict=True)
    assert len(other.last_load.kept) == 2


def test_leaving_everything_out_as_asked_is_no_error():
    optimizer = PLAN.build(model_of())
    advance(model_of(), optimizer, 1)
    other = PLAN.build(model_of(), resume=optimizer.state_dict(), renamed={"a": None, "b": None})
    assert other.last_load.kept == ()


@pytest.mark.parametrize("by", ["load", "resume"])
def test_one_warning_says_what_is_new_and_what_is_dropped(by):
    model = model_of("abc")
    optimizer = PLAN.build(model)
    advance(model, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    target = model_of("bcd")

    def load(strict=False):
        if by == "resume":
            return PLAN.build(target, resume=state, strict=strict)
        other = PLAN.build(target)
        other.load_state_dict(state, strict=strict)
        return other

    with pytest.warns(lm.LaminaWarning, match=r"not in the state: d.weight; .*: a.weight") as told:
        other = load()
    assert len(told) == 1
    assert told[0].filename == __file__
    assert (other.clock, other.last_load.kept) == (3, ("b.weight", "c.weight"))
    with pytest.raises(lm.StateError, match="strict=True"):
        load(strict=True)


def test_where_warnings_are_errors_nothing_was_loaded():
    optimizer = PLAN.build(model_of("ab"))
    advance(model_of("ab"), optimizer, 1)
    other = PLAN.build(model_of("bc"))
    before = str(other.state_dict())
    with pytest.raises(lm.LaminaWarning):
        other.load_state_dict(optimizer.state_dict())
    assert str(other.state_dict()) == before
    assert other.last_load is None


def test_strict_needs_a_state():
    with pytest.raises(lm.PlanError, match="resume=state"):
        PLAN.build(model_of(), strict=True)


@pytest.mark.parametrize("key", ["optimizer", "optimizer_states"])
def test_a_whole_checkpoint_is_told_where_its_optimizer_is(key):
    model, state = saved_by_torch(torch.float32)
    inside = [state] if key == "optimizer_states" else state
    words = rf"pass state\['{key}'\]"
    for optimizer in (PLAN.build(model), optim.AdamW(model.parameters())):
        with pytest.raises(lm.StateError, match=words):
            optimizer.load_state_dict({"epoch": 3, key: inside})


# -------------------------------------------------------------------------- without a plan, by name


def trained(names="abc", **hyper):
    model = model_of(names)
    optimizer = optim.AdamW(model.named_parameters(), lr=0.01, **hyper)
    advance(model, optimizer, 2)
    return model, optimizer


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
@pytest.mark.parametrize("kind", [optim.AdamW, torch.optim.AdamW])
def test_the_same_names_in_any_order_are_matched_by_name(order, kind):
    model = model_of("abc")
    saved = kind(model.named_parameters(), lr=0.01)
    advance(model, saved, 2)
    second = model_of(order)
    second.load_state_dict(model.state_dict())
    other = optim.AdamW(second.named_parameters(), lr=0.5)
    other.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert other.param_groups[0]["lr"] == 0.01
    assert other.param_groups[0]["param_names"] == [f"{name}.weight" for name in order]
    advance(model, saved, 2, first=2)
    advance(second, other, 2, first=2)
    for name in "abc":
        torch.testing.assert_close(second[name].weight, model[name].weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_wrappers_add_to_names_makes_no_difference(prefix):
    _, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    group = saved["param_groups"][0]
    group["param_names"] = [prefix + name for name in reversed(group["param_names"])]
    group["params"].reverse()
    other = optim.AdamW(model_of("abc").named_parameters(), lr=0.01)
    other.load_state_dict(saved)
    for name, entry in state_by_name(other).items():
        assert torch.equal(entry["exp_avg"], state_by_name(optimizer)[name]["exp_avg"])


def test_groups_of_equal_size_in_another_order_keep_their_own_lr():
    def build(model, order):
        groups = [
            {"params": [(f"{name}.weight", model[name].weight)], "lr": lr} for name, lr in order
        ]
        return optim.SGD(groups, momentum=0.9)

    first, second = model_of(), model_of()
    saved = build(first, [("a", 0.1), ("b", 0.2)])
    advance(first, saved, 2)
    other = build(second, [("b", 0.0), ("a", 0.0)])
    other.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert [group["lr"] for group in other.param_groups] == [0.2, 0.1]
    assert [group["param_names"] for group in other.param_groups] == [["b.weight"], ["a.weight"]]
    for name, entry in state_by_name(other).items():
        buffer = state_by_name(saved)[name]["momentum_buffer"]
        assert torch.equal(entry["momentum_buffer"], buffer)
    joined = optim.SGD(second.named_parameters(), momentum=0.9)
    with pytest.raises(lm.StateError, match="whose lr differ"):
        joined.load_state_dict(saved.state_dict())
    assert not joined.state


def test_other_names_are_matched_by_position_with_one_warning():
    _, optimizer = trained("abc")
    other = optim.AdamW(model_of("abd").named_parameters(), lr=0.01)
    with pytest.warns(lm.LaminaWarning, match=r"by position.*'c.weight'.*'d.weight'") as told:
        other.load_state_dict(optimizer.state_dict())
    assert len(told) == 1
    theirs = torch.optim.AdamW(model_of("abd").named_parameters(), lr=0.01)
    theirs.load_state_dict(optimizer.state_dict())
    pairs = zip(other.state.values(), theirs.state.values(), strict=True)
    assert all(torch.equal(one["exp_avg"], two["exp_avg"]) for one, two in pairs)
    assert other.param_groups[0]["param_names"][2] == "d.weight"  # the names do not lie


def test_without_names_on_both_sides_it_is_torchs_load_in_silence():
    _, optimizer = trained("abc")
    nameless = optim.AdamW(model_of("abc").parameters())
    nameless.load_state_dict(optimizer.state_dict())
    back = optim.AdamW(model_of("abc").named_parameters())
    without = copy.deepcopy(optimizer.state_dict())
    del without["param_groups"][0]["param_names"]
    back.load_state_dict(without)
    assert back.param_groups[0]["param_names"] == ["a.weight", "b.weight", "c.weight"]
    for each in (nameless, back):
        pairs = zip(each.state.values(), optimizer.state.values(), strict=True)
        assert all(torch.equal(one["exp_avg"], two["exp_avg"]) for one, two in pairs)


def test_other_numbers_of_parameters_are_refused_with_the_names():
    _, optimizer = trained("abc")
    other = optim.AdamW(model_of("ab").named_parameters())
    with pytest.raises(lm.StateError, match=r"sizes \[3\].*Only in the state: 'c.weight'"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


def test_lbfgs_refuses_its_memory_in_another_order():
    def build(names):
        model = model_of(names)
        optimizer = optim.LBFGS(model.named_parameters(), max_iter=2)

        def closure():
            optimizer.zero_grad()
            loss = sum(p.square().sum() for p in model.parameters())
            loss.backward()
            return loss

        return optimizer, closure

    first, closure = build("ab")
    first.step(closure)
    other, _ = build("ba")
    with pytest.raises(lm.StateError, match=r"in the order 'a.weight', 'b.weight'"):
        other.load_state_dict(first.state_dict())
    same, _ = build("ab")
    same.load_state_dict(first.state_dict())


def test_strict_without_a_state_says_what_it_is_for():
    with pytest.raises(lm.PlanError, match="is for a saved state"):
        lm.Plan("SGD", lr=0.1).build(torch.nn.Linear(2, 1), strict=True)
