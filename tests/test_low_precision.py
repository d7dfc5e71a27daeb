"""16-bit weights that really train: optimizers, plans, saved state, and what they refuse."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch

import lamina as lm
from lamina import optim
from lamina.algorithms.base import HALF
from processes import join_group, leave_group, run_processes

HOWS = ("stochastic", "kahan", "master")
hows = pytest.mark.parametrize("how", HOWS)
NAMES = ("SGD", "RMSprop", "Adam", "AdamW", "LAMB", "LARS", "LayerAdaptiveAdam", "Muon")
ENTRY = {"stochastic": None, "kahan": "compensation", "master": "master"}


def net(dtype: torch.dtype = torch.bfloat16) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).to(
        dtype
    )


def take(model, optimizer, steps: int, first: int = 0) -> None:
    """Steps on gradients that depend on the weights, so that an error shows in the next one."""
    for t in range(first, first + steps):
        generator = torch.Generator().manual_seed(t)
        optimizer.zero_grad()
        x = torch.randn(8, 6, generator=generator).to(next(model.parameters()).dtype)
        model(x).square().mean().backward()
        optimizer.step()


def weights(model) -> list[torch.Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def bowl(dtype: torch.dtype, name: str, lr: float, steps: int = 200, **settings):
    """The start, the weight and the state after noisy steps towards a target, from a bf16 start."""
    torch.manual_seed(0)
    start = torch.randn(64, 64).mul(0.05).bfloat16()
    target, noise = torch.randn(64, 64) * 0.05, torch.Generator().manual_seed(1)
    param = torch.nn.Parameter(start.to(dtype))
    optimizer = getattr(optim, name)([("w", param)], lr=lr, **settings)
    for _ in range(steps):
        grad = param.detach().float() - target + 0.1 * torch.randn(64, 64, generator=noise)
        param.grad = grad.to(dtype)
        optimizer.step()
    return start.float(), param.detach(), optimizer.state[param]


# --- what each of them is for ------------------------------------------------------------------


@pytest.mark.parametrize(("name", "lr"), [("AdamW", 1e-5), ("SGD", 1e-4), ("RMSprop", 1e-6)])
def test_small_steps_arrive_on_average(name, lr):
    start, wide, _ = bowl(torch.float32, name, lr)
    _, lost, _ = bowl(torch.bfloat16, name, lr)
    _, kept, _ = bowl(torch.bfloat16, name, lr, rounding="stochastic")
    wanted = (wide - start).flatten()
    length = wanted.norm()

    def share(moved):
        """The part of the way of float32 that was gone, and the 5 sigma of its noise."""
        change = (moved.float() - start).flatten()
        along = torch.dot(change, wanted) / length**2
        noise = (change - along * wanted).norm() / len(change) ** 0.5 / length
        return float(along), 5 * float(noise)

    along, noise = share(kept)
    assert abs(along - 1) < noise < 0.2
    assert share(lost)[0] < 0.5


@pytest.mark.parametrize(("name", "lr"), [("AdamW", 1e-4), ("AdamW", 1e-5), ("SGD", 1e-3)])
def test_kahan_is_within_a_thousandth_of_float32(name, lr):
    _, wide, _ = bowl(torch.float32, name, lr)
    given = {"rounding": "kahan", "state_dtype": "float32"}
    _, param, state = bowl(torch.bfloat16, name, lr, **given)
    whole = param.float() + state["compensation"].float()
    assert (whole - wide).norm() < 1e-3 * wide.norm()
    rest = state["compensation"].float() * (127 / 128)  # which may be half of the way exactly
    assert torch.equal((param.float() + rest).bfloat16(), param)
    _, lost, _ = bowl(torch.bfloat16, name, lr)
    assert (lost.float() - wide).norm() > 0.01 * wide.norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_master_weights_are_float32_training(name, dtype, request):
    if dtype is torch.float16:  # which has no compiled loop, as its float32 copy would have
        request.getfixturevalue("without_numba")
    torch.manual_seed(0)
    start = torch.randn(33, 40).to(dtype)
    half, wide = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    optimizers = [
        getattr(optim, name)([("w", half)], rounding="master", **options),
        getattr(optim, name)([("w", wide)], **options),
    ]
    for t in range(20):
        grad = torch.randn(33, 40, generator=torch.Generator().manual_seed(t)).to(dtype)
        half.grad, wide.grad = grad, grad.float()
        for optimizer in optimizers:
            optimizer.step()
    state = optimizers[0].state[half]
    assert {value.dtype for value in state.values()} == {torch.float32}
    if name == "Muon":  # which goes through bfloat16 in the middle, in other orders
        assert (state["master"] - wide).norm() < 1e-3 * wide.norm()
    else:
        # One kernel takes the tensor in other portions, where float32 may round otherwise.
        assert torch.allclose(state["master"], wide.detach(), rtol=1e-6, atol=1e-7)
    assert torch.equal(half, state["master"].to(dtype))
    for key, value in optimizers[1].state[wide].items():
        assert torch.allclose(state[key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rounding", [None, "nearest", "stochastic", "kahan"])
def test_a_running_mean_in_bfloat16_decays(rounding):
    param = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = optim.AdamW([("w", param)], lr=1e-3, rounding=rounding)
    for t in range(300):
        param.grad = torch.full_like(param, 1.0 if t == 0 else 0.0)
        optimizer.step()
    left = optimizer.state[param]["exp_avg_sq"].float() / 1e-3
    if rounding in (None, "nearest"):
        assert (left > 0.99).all()  # as it was: 0.999 of it rounds to it
    else:
        assert abs(left.mean() - 0.999**299) < 0.02


@pytest.mark.parametrize("name", NAMES)
@hows
def test_every_optimizer_draws_on_it_in_a_plan(name, how):
    rules = [lm.Rule("*.bias", optimizer="SGD", lr=0.01, rounding=how)] if name == "Muon" else []
    model = net()
    optimizer = lm.Plan(name, lr=0.01, rounding=how, rules=rules).build(model)
    take(model, optimizer, 2)
    state = optimizer.state[model[0].weight]
    for entry in ("compensation", "master"):
        assert (entry in state) is (entry == ENTRY[how])


# --- freezing, and weights that others change --------------------------------------------------


@hows
def test_frozen_weights_keep_their_bits_and_go_on_exactly(how):
    plan = lm.Plan("AdamW", lr=1e-3, rounding=how, rules=[lm.Rule("0", thaw=[3, 7], freeze=[5])])
    model = net()
    optimizer = plan.build(model, steps=9)
    seen = []
    for t in range(9):
        take(model, optimizer, 1, first=t)
        seen.append(weights(model[0]))
    moves = [not same(a, b) for a, b in zip([weights(net()[0]), *seen], seen, strict=False)]
    assert moves == [False] * 3 + [True] * 2 + [False] * 2 + [True] * 2


@pytest.mark.parametrize("how", ["kahan", "master"])
@pytest.mark.parametrize("kernel", [None, "readable"])
def test_weights_loaded_under_their_state_win_and_it_is_told_once(how, kernel):
    param = torch.nn.Parameter(torch.linspace(0.5, 2, 40, dtype=torch.bfloat16))
    other = torch.linspace(-3, 1e-3, 40).bfloat16()
    optimizer = optim.SGD([("head.w", param)], lr=2**-12, rounding=how)
    if kernel:
        optimizer.param_groups[0]["foreach"] = False
    for t in range(6):
        param.grad = torch.ones_like(param)
        if t == 3:
            with torch.no_grad():
                param.copy_(other)
            with pytest.warns(
                lm.LaminaWarning, match=r"weights of 'head\.w' are not those"
            ) as told:
                optimizer.step()
            assert len(told) == 1
        else:
            optimizer.step()
    state = optimizer.state[param][ENTRY[how]].float()
    whole = state if how == "master" else param.detach().float() + state
    expected = other.float() - 3 * 2**-12
    assert (whole - expected).abs().max() < (1e-6 if how == "master" else 2**-9)


@pytest.mark.parametrize("how", ["kahan", "master"])
def test_weights_that_are_not_a_number_are_left_to_others(how):
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = optim.SGD([("w", param)], lr=0.1, rounding=how)
    param.grad = torch.tensor([1.0, torch.inf, torch.nan, 0.0]).bfloat16()
    for _ in range(2):
        optimizer.step()
    assert param.isnan().tolist() == [False, False, True, False]
    assert param[1] == -torch.inf
    assert param[0] < 1
    assert param[3] == 1


def test_a_model_that_becomes_float32_has_no_master_any_more():
    model = net()
    optimizer = lm.Plan("AdamW", lr=1e-3, rounding="master").build(model)
    take(model, optimizer, 2)
    model.float()
    take(model, optimizer, 2, first=2)
    assert "master" not in optimizer.state[model[0].weight]


def test_another_rounding_set_in_a_group_takes_effect():
    param = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = optim.SGD([("w", param)], lr=2**-12)
    for rounding, entries in ((None, set()), ("kahan", {"compensation"}), ("master", {"master"})):
        optimizer.param_groups[0]["rounding"] = rounding
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert optimizer.state[param].keys() == {"step"} | entries
    optimizer.param_groups[0]["rounding"] = "mastre"
    before = param.detach().clone()
    with pytest.raises(lm.LaminaError, match="Did you mean 'master'"):
        optimizer.step()
    assert torch.equal(param, before)


# --- saved state -------------------------------------------------------------------------------


@hows
@pytest.mark.parametrize("name", ["SGD", "AdamW", "LAMB"])
@pytest.mark.parametrize("state_dtype", [None, "float32"])
def test_a_resume_in_the_middle_is_exact(how, name, state_dtype, tmp_path):
    options = {"momentum": 0.9} if name == "SGD" else {}
    plan = lm.Plan(name, lr=1e-3, rounding=how, state_dtype=state_dtype, clip_norm=1.0, **options)
    model = net()
    optimizer = plan.build(model)
    take(model, optimizer, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x")
    take(model, optimizer, 3, first=3)
    torch.manual_seed(99)
    random = torch.get_rng_state()
    twin = net()
    saved = torch.load(tmp_path / "x", weights_only=True)
    twin.load_state_dict(saved["model"])
    other = plan.build(twin, resume=saved["optimizer"])
    torch.set_rng_state(random)
    take(twin, other, 3, first=3)
    assert torch.equal(torch.get_rng_state(), random)  # no generator is touched
    assert same(weights(twin), weights(model))
    assert other.last_load.rounding == other.last_load.converted == ()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, other.state[two][key])


@hows
def test_a_resume_without_a_plan_is_exact(how):
    model = net()
    optimizer = optim.AdamW(model.named_parameters(), lr=1e-3, rounding=how)
    take(model, optimizer, 3)
    twin = copy.deepcopy(model)
    other = optim.AdamW(twin.named_parameters(), lr=1e-3)  # takes over what was saved
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied = copy.deepcopy(optimizer)
    assert copied.param_groups[0]["rounding"] == other.param_groups[0]["rounding"] == how
    take(model, optimizer, 3, first=3)
    take(twin, other, 3, first=3)
    assert same(weights(twin), weights(model))


@pytest.mark.parametrize("before", [None, *HOWS])
@pytest.mark.parametrize("now", [None, *HOWS])
def test_state_of_another_rounding(before, now):
    model = net()
    optimizer = lm.Plan("AdamW", lr=1e-3, rounding=before).build(model)
    take(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = lm.Plan("AdamW", lr=1e-3, rounding=now).build(model_copy := copy.deepcopy(model))
        other.load_state_dict(saved, strict=True)
        take(model_copy, other, 1, first=2)
    entries = [ENTRY.get(each) or "" for each in (before, now)]
    names = [name for name, _ in model.named_parameters()]
    changed = entries[0] != entries[1]
    assert other.last_load.rounding == (tuple((n, *entries) for n in names) if changed else ())
    assert ("state of another rounding" in str(other.last_load)) is changed
    rows = [row for row in other.last_load.hyperparameters if row.key == "rounding"]
    assert [(row.saved, row.now) for row in rows] == ([(before, now)] if before != now else [])
    state = other.state[model_copy[0].weight]
    assert {"compensation", "master"} & state.keys() == ({entries[1]} - {""})


@pytest.mark.parametrize(("before", "now"), [("master", "kahan"), ("kahan", "stochastic")])
def test_without_a_plan_a_dropped_entry_is_told(before, now):
    model = net()
    optimizer = optim.AdamW(model.named_parameters(), lr=1e-3, rounding=before)
    take(model, optimizer, 2)
    other = optim.AdamW(model.named_parameters(), lr=1e-3, rounding=now, state_dtype="float32")
    with pytest.warns(lm.LaminaWarning, match="which the rounding here does not use") as told:
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(told) == 1
    take(model, other, 1)
    assert ENTRY[before] not in other.state[model[0].weight]


def test_torch_loads_what_it_knows():
    model = net()
    optimizer = lm.Plan("AdamW", lr=1e-3, rounding="master").build(model)
    take(model, optimizer, 2)
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-3)
    theirs.load_state_dict(optimizer.torch_state_dict())
    assert theirs.state[model[0].weight].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_a_damaged_master_is_refused():
    model = net()
    plan = lm.Plan("AdamW", lr=1e-3, rounding="master")
    optimizer = plan.build(model)
    take(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["master"] = torch.zeros(3)
    with pytest.raises(lm.StateError, match=r"saved master of '0\.weight' has shape \(3,\)"):
        plan.build(net(), resume=saved)
    plain = optim.AdamW(model.named_parameters())
    saved = plain.state_dict()
    saved["param_groups"][0]["rounding"] = "__import__('os')"
    with pytest.raises(lm.LaminaError, match="expected None or one of"):
        plain.load_state_dict(saved)


# --- wrappers of the step ----------------------------------------------------------------------


@hows
def test_a_grad_scaler_and_a_clip_factor(how):
    model, twin = net(), net()
    plan = lm.Plan("AdamW", lr=1e-2, rounding=how, clip_norm=0.1)
    optimizer, other = plan.build(model), plan.build(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for t in range(4):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(t)).bfloat16()
        for each, its in ((model, optimizer), (twin, other)):
            its.zero_grad()
            loss = each(x).float().square().mean()
            if each is model:
                scaler.scale(loss).backward()
                if t == 2:
                    each[0].weight.grad[0, 0] = torch.inf
                scaler.step(its)
                scaler.update()
            elif t != 2:
                loss.backward()
                its.step()
    assert optimizer.clock == 3
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert (one - two).abs().max() < 2e-2 * two.abs().max()
        assert optimizer.state[one]["step"] == 3


@hows
def test_a_sparse_gradient_moves_its_rows_alone(how):
    table = torch.nn.Embedding(6, 4, sparse=True).bfloat16()
    optimizer = optim.SGD([("t", table.weight)], lr=0.1, rounding=how)
    before = table.weight.detach().clone()
    table(torch.tensor([1, 4])).sum().backward()
    optimizer.step()
    moved = (table.weight != before).any(dim=1).tolist()
    assert moved == [False, True, False, False, True, False]


def _train_shards(rank: int, folder: str) -> None:
    """Both processes train a sharded and a replicated parameter beside whole ones of their own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    join_group(rank, folder)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    start, grads = torch.randn(6, 5).bfloat16(), torch.randn(3, 6, 5).bfloat16()
    for name in ("AdamW", "LAMB"):
        for how in HOWS:
            params = {
                "sharded": torch.nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)])),
                "copies": torch.nn.Parameter(distribute_tensor(start.clone(), mesh, [Replicate()])),
                "whole": torch.nn.Parameter(start.clone()),
            }
            optimizers = [
                getattr(optim, name)([("w", param)], lr=1e-3, rounding=how)
                for param in params.values()
            ]
            for grad in grads:
                for param, optimizer in zip(params.values(), optimizers, strict=True):
                    is_whole = param is params["whole"]
                    placements = getattr(param, "placements", None)
                    spread = None if is_whole else distribute_tensor(grad, mesh, placements)
                    param.grad = grad.clone() if is_whole else spread
                    optimizer.step()
            whole = params["whole"].detach()
            assert torch.equal(params["copies"].full_tensor(), whole)  # type: ignore[attr-defined]
            found = params["sharded"].full_tensor()  # type: ignore[attr-defined]
            if how == "stochastic":  # the second process begins to count at its own part
                assert torch.equal(found[:3], whole[:3]) or name == "LAMB"
                assert (found - whole).abs().max() < 0.05
            else:
                assert (found - whole).abs().max() <= 2**-7 * whole.abs().max()
            entry = ENTRY[how]
            if entry:
                assert optimizers[0].state[params["sharded"]][entry].shape == start.shape
    Path(folder, f"{rank}.done").touch()
    leave_group()


@pytest.mark.slow
def test_sharded_parameters(tmp_path):
    run_processes(_train_shards, tmp_path)
    assert {path.name for path in tmp_path.glob("*.done")} == {"0.done", "1.done"}


# --- what is refused, and how it is written ----------------------------------------------------


@pytest.mark.parametrize("wrong", ["Kahan", "stochastik", 1, True, torch.float32])
def test_a_bad_value_names_the_choices(wrong):
    choices = r"expected None or one of 'nearest', 'stochastic', 'kahan', 'master'"
    param = torch.nn.Parameter(torch.ones(2))
    for make in (
        lambda: lm.Plan("AdamW", lr=1e-3, rounding=wrong),
        lambda: lm.Rule("head", rounding=wrong),
        lambda: optim.AdamW([param], rounding=wrong),
        lambda: optim.AdamW([{"params": [param], "rounding": wrong}]),
    ):
        with pytest.raises(lm.LaminaError, match=choices):
            make()


def test_who_has_no_rounding_says_so():
    model = net()
    for optimizer in ("LBFGS", torch.optim.Adagrad):
        with pytest.raises(lm.LaminaError, match="has no hyperparameter 'rounding': LBFGS and"):
            lm.Plan(optimizer, lr=1e-3, rounding="kahan").build(model)
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(lm.LaminaError, match="LBFGS moves all parameters along one vector"):
        optim.LBFGS([{"params": [param], "rounding": "master"}])
    with pytest.raises(lm.LaminaError, match="differentiable=True records the update"):
        optim.SGD([param], differentiable=True, rounding="stochastic")
    with pytest.raises(lm.LaminaError, match="rounding"):
        lm.Plan("AdamW", lr=1e-3).build(model).override(rounding=1.0)


def test_plans_write_and_read_it():
    rules = [lm.Rule("2", rounding="kahan"), lm.Rule("2.bias", rounding=None)]
    plan = lm.Plan("AdamW", lr=1e-3, rounding="stochastic", rules=rules)
    assert lm.Plan.from_toml(plan.to_toml()) == plan
    assert "rounding='stochastic'" in repr(plan)
    optimizer = plan.build(net())
    found = {
        name: group["rounding"] for group in optimizer.param_groups for name in group["param_names"]
    }
    assert found == {
        "0.weight": "stochastic",
        "0.bias": "stochastic",
        "2.weight": "kahan",
        "2.bias": None,
    }


def test_a_plan_read_from_an_optimizer_has_it():
    model = net()
    plain = optim.AdamW(model.named_parameters(), lr=1e-3, rounding="kahan")
    assert "rounding='kahan'" in repr(lm.Plan.from_optimizer(model, plain))


# --- findings ----------------------------------------------------------------------------------


def found_in(plan, model) -> list[str]:
    return [each.message for each in plan.preview(model).findings if "round" in each.code]


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_plan_whose_steps_round_to_nothing_is_found(name, dtype):
    [message] = found_in(lm.Plan(name, lr=1e-6), net(dtype))
    assert "0.weight" in message
    assert "lr is at most 1e-06" in message
    for other in (
        (lm.Plan(name, lr=1e-6), net(torch.float32)),
        (lm.Plan(name, lr=1e-2), net(dtype)),
        (lm.Plan(name, lr=1e-6, rounding="kahan"), net(dtype)),
        (lm.Plan(name, lr=1e-6, frozen=True, rules=[lm.Rule("2", frozen=False, lr=1e-2)]), net()),
        (lm.Plan("SGD", lr=1e-6), net(dtype)),
    ):
        assert found_in(*other) == []


def test_the_largest_lr_of_a_schedule_counts():
    model = net()
    plan = lm.Plan("AdamW", lr=1e-2, schedule=lm.warmup(10))
    assert not [each for each in plan.preview(model, steps=20).findings if "round" in each.code]


def test_the_fix_of_the_finding_moves_what_did_not_move():
    model = net()
    before = weights(model)
    with pytest.warns(lm.LaminaWarning, match="steps-round-to-nothing"):
        optimizer = lm.Plan("AdamW", lr=1e-6, weight_decay=0.0).build(model)
    take(model, optimizer, 1)
    still = sum(int((a == b).sum()) for a, b in zip(before, weights(model), strict=True))
    assert still > 0.9 * sum(each.numel() for each in before)
