"""FSDP on two processes (gloo): parameters exchanged after the build, parts of FSDP1, refusals.

Every comparison is with one process on the whole batch, in float64.
"""

from __future__ import annotations

import gc
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lamina as lm
from models import encoder
from processes import join_group, leave_group, run_processes

#: torch says so of what is meant here
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

STEPS = 6
LAYERS = (0, 1)
PLAN = lm.Plan(
    lm.AdamW,
    lr=0.05,
    clip_norm=0.1,
    schedule=lm.cosine(to=0.1),
    rules=[
        lm.Rule("encoder.layer.0.*", thaw=3),
        lm.Rule("embeddings", frozen=True),
        lm.Rule("classifier", optimizer=lm.SGD, lr=0.1, momentum=0.9, clip_norm=0.05),
    ],
)
#: under FSDP2, each over shards, equals itself on one process
SHARDED = {
    "Muon": lm.Plan(
        lm.AdamW, lr=0.01, rules=[lm.Rule("*.dense.weight", optimizer=lm.Muon, lr=0.02)]
    ),
    "LayerAdaptiveAdam": lm.Plan(lm.LayerAdaptiveAdam, lr=0.05, weight_decay=0.1),
    "LAMB": lm.Plan(lm.LAMB, lr=0.05, weight_decay=0.1),
    "LARS": lm.Plan(lm.LARS, lr=0.5, momentum=0.9, weight_decay=0.1),
}
#: under FSDP1, each over parts, equals itself on one process
PARTS = {
    "norms": PLAN,
    "each norm": lm.Plan(
        lm.SGD,
        lr=0.1,
        gradients=[lm.clip_param_norm(0.05), lm.scale_gradients(0.5), lm.clip_norm(0.02)],
    ),
    "largest": lm.Plan(
        lm.SGD,
        lr=0.1,
        momentum=0.9,
        gradients=[lm.clip_value(0.05), lm.clip_norm(0.01, p=math.inf)],
    ),
    "by dimensions": lm.Plan(
        lm.Adam, lr=0.01, weight_decay=0.5, rules=[lm.Rule("ndim<2", weight_decay=0)]
    ),
    "guest": lm.Plan(torch.optim.NAdam, lr=0.01, clip_norm=0.1),
}
#: what FSDP1 refuses, and a word of the reason
REFUSED = {
    "LAMB": (lm.Plan(lm.LAMB, lr=0.01), "LAMB needs whole tensors"),
    "LARS": (lm.Plan(lm.LARS, lr=0.01), "LARS needs whole tensors"),
    "LayerAdaptiveAdam": (lm.Plan(lm.LayerAdaptiveAdam, lr=0.01), "needs whole tensors"),
    "Muon": (
        lm.Plan(lm.AdamW, lr=0.01, rules=[lm.Rule("*.dense.weight", optimizer=lm.Muon, lr=0.1)]),
        "Muon needs whole tensors",
    ),
    "LBFGS": (lm.Plan(lm.LBFGS, lr=1.0), "LBFGS needs whole tensors"),
    "agc": (lm.Plan(lm.SGD, lr=0.1, gradients=[lm.agc(0.01)]), "agc"),
    "function": (lm.Plan(lm.SGD, lr=0.1, gradients=[lambda grads, infos: grads]), "<lambda>"),
    "guest": (lm.Plan(torch.optim.Adafactor, lr=0.01), "Adafactor updates a tensor in parts"),
}


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, generator=generator, dtype=torch.float64)


def train(model: nn.Module, optimizer: lm.Optimizer, steps: range, part: slice = slice(None)):
    """Train; the norms of every step."""
    seen = []
    for step in steps:
        model(batch(step)[part]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append({name: float(norm) for name, norm in optimizer.norms.items()})
    return seen


def shard(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.encoder.layer["0"])
    return fully_shard(model)


def wrap(model: nn.Module, orig: bool = True, nested: bool = True) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(model.encoder.layer["0"])}) if nested else None
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(
        model, device_id=cpu, use_orig_params=orig, auto_wrap_policy=policy
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def numbers(model: nn.Module) -> dict[str, list]:
    return {name: whole(param.detach()).tolist() for name, param in model.named_parameters()}


def unwrapped(model: nn.Module) -> dict[str, list]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(model):
        return {
            name.replace("_fsdp_wrapped_module.", ""): param.detach().tolist()
            for name, param in model.named_parameters()
        }


def state_of(model: nn.Module, optimizer: lm.Optimizer) -> dict[str, dict[str, list]]:
    return {
        name: {key: whole(value).tolist() for key, value in optimizer.state[param].items()}
        for name, param in model.named_parameters()
    }


def error_of(call: Callable[[], object], kind: type[Exception] = lm.PlanError) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    return "no error"


# ------------------------------------------------------------------------- what the processes do


def exchanged_after_some_steps(part: slice) -> dict[str, object]:
    """fully_shard in the middle of a run: the state goes along."""
    model = encoder(LAYERS)
    optimizer = PLAN.build(model, steps=STEPS)
    for step in range(2):  # the same on both processes: nothing averages the gradients yet
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    shard(model)
    seen = train(model, optimizer, range(2, STEPS), part)
    return {
        "weights": numbers(model),
        "state": state_of(model, optimizer),
        "norms": seen,
        "findings": [finding.code for finding in optimizer.check(model, after=1)],
        "entries": len(optimizer.state),
    }


def resumed_then_sharded(part: slice, saved: dict[str, object]) -> dict[str, object]:
    """A state is loaded, then the model is sharded, then saved: nothing was stepped."""
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model = encoder(LAYERS)
    model.load_state_dict(saved["model"])
    optimizer = PLAN.build(model, steps=STEPS, resume=saved["optimizer"])
    shard(model)
    state = get_optimizer_state_dict(model, optimizer)
    other = shard(encoder(LAYERS, seed=1))
    second = PLAN.build(other, steps=STEPS)
    with second.receiving():
        set_optimizer_state_dict(other, second, state)
    train(model, optimizer, range(3, STEPS), part)
    return {
        "weights": numbers(model),
        "got": sorted(state["state"]),
        "own": len(optimizer.state_dict()["state"]),
        "set": sum(len(entry) > 1 for entry in second.state.values()),
        "clock": second.clock,
    }


def built_in_between(part: slice) -> dict[str, list]:
    """The plan is built while FSDP2 shows gathered copies, after a forward."""
    model = shard(encoder(LAYERS))
    with torch.no_grad():
        model(batch(0)[part])
    optimizer = PLAN.build(model, steps=STEPS)
    train(model, optimizer, range(STEPS), part)
    return numbers(model)


def accumulated(part: slice) -> dict[str, list]:
    """Two backward passes for a step, of which the first sends nothing."""
    model = shard(encoder(LAYERS))
    optimizer = PLAN.build(model, steps=STEPS)
    for step in range(STEPS):
        for half, last in ((0, False), (1, True)):
            model.set_requires_gradient_sync(last)
            (model(batch(step + 10 * half)[part]).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return numbers(model)


def with_policies(part: slice) -> dict[str, object]:
    """bfloat16 in forward and backward, parameters kept on the CPU."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    found: dict[str, object] = {}
    policies = {
        "bfloat16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    }
    for name, more in policies.items():
        model = encoder(LAYERS).float()
        optimizer = PLAN.build(model, steps=STEPS)
        fully_shard(model, **more)
        for step in range(STEPS):
            model(batch(step)[part].float()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        weight = model.encoder.layer["1"].dense.weight
        entry = optimizer.state[weight]
        found[name] = [str(weight.dtype), str(entry["exp_avg"].dtype), float(entry["step"])]
        found[f"{name}, finite"] = all(
            bool(torch.isfinite(whole(param)).all()) for param in model.parameters()
        )
    return found


def refused_by_fsdp2() -> dict[str, str]:
    plan = lm.Plan(lm.LBFGS, lr=1.0)
    model = encoder(LAYERS)
    before = plan.build(model, steps=STEPS)
    shard(model)

    def closure() -> torch.Tensor:
        before.zero_grad()
        loss = model(batch(0)).square().mean()
        loss.backward()
        return loss

    return {
        "after": error_of(lambda: plan.build(model, steps=STEPS)),
        "before": error_of(lambda: before.step(closure)),
        "drop-in": error_of(lambda: lm.optim.LBFGS(model.parameters())),
    }


def parts(part: slice, names: list[str], kinds: list[bool]) -> dict[str, object]:
    """Each plan over the parts of FSDP1, with a wrapper in each layer or only one."""
    found: dict[str, object] = {}
    for name in names:
        plan = PARTS[name]
        for nested in kinds:
            model = wrap(encoder(LAYERS), nested=nested)
            optimizer = plan.build(model, steps=STEPS)
            seen = train(model, optimizer, range(STEPS), part)
            found[f"{name}, {nested}"] = {"norms": seen, "weights": unwrapped(model)}
    return found


def parts_inside(part: slice, names: list[str], kinds: list[bool]) -> dict[str, object]:
    """Each plan built on the model inside the wrapper, or before there was one."""
    found: dict[str, object] = {}
    for name in names:
        for nested in kinds:
            inner = encoder(LAYERS)
            before = PARTS[name].build(inner, steps=STEPS)
            wrapper = wrap(inner, nested=nested)
            seen = train(wrapper, before, range(STEPS), part)
            found[f"{name}, {nested}, before"] = {"norms": seen, "weights": unwrapped(wrapper)}
            wrapper = wrap(encoder(LAYERS), nested=nested)
            inside = PARTS[name].build(wrapper.module, steps=STEPS)
            seen = train(wrapper, inside, range(STEPS), part)
            found[f"{name}, {nested}, inner"] = {"norms": seen, "weights": unwrapped(wrapper)}
    return found


def refused_by_fsdp1() -> dict[str, str]:
    model = wrap(encoder(LAYERS))
    found = {name: error_of(lambda p=plan: p.build(model)) for name, (plan, _) in REFUSED.items()}
    inner = wrap(encoder(LAYERS), nested=False).module
    gc.collect()  # nothing in this process has the wrapper any more
    found["inner"] = error_of(lambda: PLAN.build(inner, steps=STEPS))
    bare = encoder(LAYERS)
    lost = lm.Plan(lm.SGD, lr=0.1).build(bare)
    flat = wrap(bare, orig=False)
    flat(batch(0)).square().mean().backward()
    found["lost"] = error_of(lost.step)
    each = lm.Plan(lm.SGD, lr=0.1, gradients=[lm.clip_param_norm(1.0)])
    found["flat"] = error_of(lambda: each.build(wrap(encoder(LAYERS), orig=False)))
    model(batch(0)).square().mean().backward()
    found["by hand"] = error_of(lambda: lm.clip_grad_norm_(model, 1.0))
    found["drop-in"] = error_of(lambda: lm.optim.LAMB(model.parameters()))
    return found


def bad_on_one(rank: int) -> dict[str, object]:
    """A gradient is bad in the part of one process only."""
    logging.disable(logging.WARNING)
    found: dict[str, object] = {}
    settings = {"norms": {"clip_norm": 1.0}, "all": {}}
    for check, more in settings.items():
        model = wrap(encoder(LAYERS), nested=False)
        plan = lm.Plan("SGD", lr=0.1, nonfinite="skip", nonfinite_check=check, **more)
        optimizer = plan.build(model)
        model(batch(0)).square().mean().backward()
        if rank == 1:
            last = [param for param in model.parameters() if param.grad is not None][-1]
            last.grad[-1] = float("nan")
        optimizer.step()
        found[check] = [optimizer.skipped, optimizer.clock]
        raising = lm.Plan("SGD", lr=0.1, nonfinite_check=check, **more).build(model)
        found[f"{check} says"] = error_of(raising.step, lm.NonFiniteError)
    logging.disable(logging.NOTSET)
    return found


def state_of_parts(part: slice) -> dict[str, object]:
    """Under FSDP1, a process' own state goes on; so does what torch puts together of all."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = wrap(encoder(LAYERS))
    optimizer = PLAN.build(model, steps=STEPS)
    train(model, optimizer, range(3), part)
    state = optimizer.state_dict()
    other = wrap(encoder(LAYERS))
    with FullyShardedDataParallel.summon_full_params(model):
        weights = {k: v.clone() for k, v in model.state_dict().items()}
    other.load_state_dict(weights)
    second = PLAN.build(other, steps=STEPS, resume=state)
    clock = second.clock
    train(other, second, range(3, STEPS), part)
    return {"weights": unwrapped(other), "new": second.last_load.new, "clock": clock}


def torchs_way_of_parts(part: slice) -> dict[str, object]:
    """What torch puts together of all parts, with frozen parts that have no state yet."""
    from torch.distributed.checkpoint import state_dict as torchs

    plan = lm.Plan(
        lm.AdamW,
        lr=0.05,
        clip_norm=0.1,
        rules=[lm.Rule("encoder.layer.0.*", thaw=3), lm.Rule("embeddings", frozen=True)],
    )
    model = wrap(encoder(LAYERS))
    optimizer = plan.build(model, steps=STEPS)
    train(model, optimizer, range(3), part)
    weights = torchs.get_model_state_dict(model)
    state = torchs.get_optimizer_state_dict(model, optimizer)
    other = wrap(encoder(LAYERS, seed=1))
    second = plan.build(other, steps=STEPS)
    torchs.set_model_state_dict(other, weights)
    torchs.set_optimizer_state_dict(other, second, state)
    train(model, optimizer, range(3, STEPS), part)
    train(other, second, range(3, STEPS), part)
    return {"went on": unwrapped(model), "loaded": unwrapped(other)}


def work(rank: int, folder: str) -> None:
    """One process: what it saw goes to a file."""
    join_group(rank, folder)
    part = slice(rank, None, 2)
    saved = torch.load(Path(folder, "saved.pt"), weights_only=True)
    record = {
        "exchanged": exchanged_after_some_steps(part),
        "resumed": resumed_then_sharded(part, saved),
        "in between": built_in_between(part),
        "refused by FSDP2": refused_by_fsdp2(),
        "parts": parts(part, ["norms"], [False]),
        "inside": parts_inside(part, ["norms"], [False]),
        "refused by FSDP1": refused_by_fsdp1(),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(record))
    leave_group()


def more_work(rank: int, folder: str) -> None:
    """What takes longer."""
    join_group(rank, folder)
    part = slice(rank, None, 2)
    record = {
        "accumulated": accumulated(part),
        "policies": with_policies(part),
        "sharded": {name: sharded(plan, part) for name, plan in SHARDED.items()},
        "parts": parts(part, [*PARTS], [True, False]),
        "inside": parts_inside(part, ["each norm", "by dimensions", "guest"], [True, False]),
        "bad": bad_on_one(rank),
        "state of parts": state_of_parts(part),
        "torch's way of parts": torchs_way_of_parts(part),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(record))
    leave_group()


def sharded(plan: lm.Plan, part: slice) -> dict[str, list]:
    model = encoder(LAYERS)
    optimizer = plan.build(model, steps=STEPS)
    shard(model)
    train(model, optimizer, range(1 if "Muon" in str(plan) else STEPS), part)
    return numbers(model)


# ---------------------------------------------------------------------------------- the comparisons


def alone(plan: lm.Plan = PLAN, steps: int = STEPS):
    model = encoder(LAYERS)
    optimizer = plan.build(model, steps=STEPS)
    return model, optimizer, train(model, optimizer, range(steps))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The records of two processes."""
    folder = tmp_path_factory.mktemp("fsdp")
    model, optimizer, _ = alone(steps=3)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, folder / "saved.pt")
    run_processes(work, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    """The records of what takes longer."""
    folder = tmp_path_factory.mktemp("fsdp")
    run_processes(more_work, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def assert_near(mine: dict[str, list], theirs: dict[str, list], tolerance: float = 1e-9) -> None:
    assert mine.keys() == theirs.keys()
    for name, values in mine.items():
        one, other = (torch.tensor(each, dtype=torch.float64) for each in (values, theirs[name]))
        assert one.shape == other.shape, name
        assert float((one - other).abs().max()) <= tolerance, name


def test_the_processes_agree(both):
    one, other = both
    # a process can name only a parameter of which it has a part
    by_hand = [record["refused by FSDP1"].pop("by hand") for record in both]
    assert all("model.clip_grad_norm_(max_norm)" in message for message in by_hand)
    for what in one:
        assert one[what] == other[what], what


def test_the_norm_of_a_plan_is_that_of_all_parts_of_fsdp1(both):
    model, _, seen = alone()
    for record in both:
        found = record["parts"]["norms, False"]
        assert_near(found["weights"], numbers(model))
        for mine, theirs in zip(found["norms"], seen, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-9)


def test_state_follows_to_the_parameters_that_fully_shard_makes(both):
    model, optimizer, seen = alone()
    exchanged = both[0]["exchanged"]
    assert_near(exchanged["weights"], numbers(model))
    expected = json.loads(json.dumps(state_of(model, optimizer)))
    for name, entry in exchanged["state"].items():
        assert_near(entry, expected[name])
    for mine, theirs in zip(exchanged["norms"], seen[2:], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9)
    assert exchanged["findings"] == []
    assert exchanged["entries"] == len(expected)


def test_a_loaded_state_is_sharded_with_the_model_and_saved_by_torch(both):
    resumed = both[0]["resumed"]
    assert_near(resumed["weights"], numbers(alone()[0]))
    names = sorted(name for name, _ in encoder(LAYERS).named_parameters())
    assert resumed["got"] == names
    assert resumed["own"] == len(names)
    trained = [name for name in names if name.startswith(("encoder.layer.1", "classifier"))]
    assert (resumed["set"], resumed["clock"]) == (len(trained), 3)


def test_a_plan_built_while_copies_are_gathered_trains_the_shards(both):
    assert_near(both[0]["in between"], numbers(alone()[0]))


@pytest.mark.slow
def test_accumulation_without_sending_is_one_step(more):
    model = encoder(LAYERS)
    optimizer = PLAN.build(model, steps=STEPS)
    for step in range(STEPS):
        for half in range(2):
            (model(batch(step + 10 * half)).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_near(more[0]["accumulated"], numbers(model))


@pytest.mark.slow
def test_policies_of_fsdp2_keep_weights_and_state_in_full_precision(more):
    policies = more[0]["policies"]
    for name in ("bfloat16", "offload"):
        assert policies[name] == ["torch.float32", "torch.float32", float(STEPS)]
        assert policies[f"{name}, finite"]


@pytest.mark.parametrize("when", ["after", "before", "drop-in"])
def test_lbfgs_over_shards_is_refused(both, when):
    message = both[0]["refused by FSDP2"][when]
    assert "is sharded over processes (DTensor, as by fully_shard)" in message
    assert "use DDP, or another optimizer" in message


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_what_needs_whole_tensors_has_them_under_fsdp2(more, name):
    # Muon rounds sums to bfloat16, whose order is another one over shards; a small singular value
    # multiplies that with every step, so that one step is compared.
    steps, tolerance = (1, 1e-3) if name == "Muon" else (STEPS, 1e-9)
    model, _, _ = alone(SHARDED[name], steps)
    assert_near(more[0]["sharded"][name], numbers(model), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("name", PARTS)
def test_fsdp1_does_what_one_process_does(more, name, nested):
    model, _, seen = alone(PARTS[name])
    found = more[0]["parts"][f"{name}, {nested}"]
    assert_near(found["weights"], numbers(model))
    for mine, theirs in zip(found["norms"], seen, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("built", ["before", "inner"])
def test_a_plan_on_the_model_inside_one_wrapper_finds_it(both, built):
    model, _, seen = alone(PARTS["norms"])
    for record in both:
        found = record["inside"][f"norms, False, {built}"]
        assert_near(found["weights"], numbers(model))
        for mine, theirs in zip(found["norms"], seen, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("built", ["before", "inner"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("name", ["each norm", "by dimensions", "guest"])
def test_a_plan_on_the_model_inside_wrappers_finds_them(more, name, nested, built):
    model, _, seen = alone(PARTS[name])
    found = more[0]["inside"][f"{name}, {nested}, {built}"]
    assert_near(found["weights"], numbers(model))
    for mine, theirs in zip(found["norms"], seen, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("name", REFUSED)
def test_fsdp1_refuses_what_needs_whole_tensors(both, name):
    message = both[0]["refused by FSDP1"][name]
    assert REFUSED[name][1] in message
    assert "FSDP1 (FullyShardedDataParallel)" in message


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("inner", ["Build the plan on the wrapper"]),
        ("lost", ["is no parameter any more", "use_orig_params=True"]),
        ("flat", ["clip_param_norm(1.0)", "_flat_param"]),
        ("drop-in", ["LAMB needs whole tensors"]),
    ],
)
def test_parts_that_nothing_can_put_together_are_refused(both, what, words):
    message = both[0]["refused by FSDP1"][what]
    assert all(word in message for word in words), message


@pytest.mark.slow
def test_a_bad_number_in_one_part_is_met_alike_on_all_processes(more):
    for record in more:
        assert record["bad"]["norms"] == record["bad"]["all"] == [1, 0]
        assert "the gradient of 'classifier.bias' is NaN" in record["bad"]["norms says"]
        assert "the gradient of 'classifier.bias' is NaN" in record["bad"]["all says"]


@pytest.mark.slow
def test_a_state_of_parts_goes_on(more):
    found = more[0]["state of parts"]
    assert_near(found["weights"], numbers(alone()[0]))
    assert (found["new"], found["clock"]) == ([], 3)


@pytest.mark.slow
def test_torchs_state_of_all_parts_goes_on(more):
    found = more[0]["torch's way of parts"]
    assert_near(found["loaded"], found["went on"], 0.0)
