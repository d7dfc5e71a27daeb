"""FSDP2 on two processes (gloo): the plan means what it means on one, and its state survives.

Every comparison is with the same plan on one process and the same global batch; the numbers are
float64, so that 1e-6 (relative to the largest weight) leaves room for nothing but rounding.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import lamina as lm
from lamina import kernels
from lamina.gradients.norms import total_norm
from models import Tied, encoder
from processes import join_group, leave_group, run_processes

#: torch says so of what is meant here
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

STEPS, SAVED = 9, 5
LAYERS = (0, 1, 2)
PLAN = lm.Plan(
    lm.AdamW,
    lr=0.05,
    clip_norm=0.5,
    nonfinite="skip",
    feedback=lm.plateau("loss", factor=0.5, patience=0),
    rules=[
        lm.Rule(
            "encoder.layer.{depth}.*",
            lr=lm.by_depth(0.5),
            thaw=lm.top_down(2),
            rewarm=lm.warmup(2, start=0.5),
        ),
        lm.Rule("embeddings", frozen=True),
        lm.Rule("*.norm.*", clip_norm=0.1),
        # one norm over parameters of two meshes
        lm.Rule("classifier | *.2.dense.*", clip_norm=0.3),
        lm.Rule(
            "*.1.dense.bias",
            thaw=[1, 4],
            freeze=[3, 7],
            frozen_state="drop",
            optimizer=lm.SGD,
            lr=0.1,
            momentum=0.9,
        ),
    ],
)


#: groups that hold parameters of two meshes
OTHERS = {
    "RMSprop": lm.Plan(lm.RMSprop, lr=0.01, momentum=0.5, clip_norm=0.1),
    "Adam": lm.Plan(lm.Adam, lr=0.01, amsgrad=True, clip_norm=0.1),
    "LAMB": lm.Plan(lm.LAMB, lr=0.01, gradients=[lm.clip_value(0.05)]),
    "LARS": lm.Plan(lm.LARS, lr=0.1, gradients=[lm.clip_param_norm(0.05)]),
    "SGD": lm.Plan(
        lm.SGD, lr=0.1, gradients=[lm.agc(0.01), lm.scale_gradients(2.0), lm.clip_norm(0.1)]
    ),
    "largest": lm.Plan(
        lm.SGD,
        lr=0.1,
        gradients=[lm.clip_param_norm(0.05, p=math.inf), lm.clip_norm(0.03, p=math.inf)],
    ),
    "guest": lm.Plan(torch.optim.NAdam, lr=0.01, clip_norm=0.1),
}


def sharded(seed: int = 0) -> nn.Module:
    """The encoder with a shard group for each block; the classifier on a mesh of two dimensions."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    line = init_device_mesh("cpu", (2,))
    grid = init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "parts"))
    model = encoder(LAYERS, seed)
    for block in model.encoder.layer.values():
        fully_shard(block, mesh=line)
    fully_shard(model.classifier, mesh=grid)
    fully_shard(model, mesh=line)
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def forward_backward(model: nn.Module, step: int, part: slice = slice(None)) -> None:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    model(x[part]).square().mean().backward()


def go(model: nn.Module, optimizer: lm.Optimizer, steps: range, part: slice = slice(None)):
    """Train; the norms, learning rates and flags of every step."""
    seen = []
    for step in steps:
        forward_backward(model, step, part)
        flags = {name: param.requires_grad for name, param in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        optimizer.report(loss=[3.0, 2.0, 1.0, 1.5, 0.9, 0.5, 0.6, 0.2, 0.1][step])
        norms = {name: float(norm) for name, norm in optimizer.norms.items()}
        lrs = {name: hyper["lr"] for name, hyper in optimizer.applied.items()}
        seen.append({"norms": norms, "lr": lrs, "flags": flags})
    return seen


def single(steps: int = STEPS):
    """The same on one process, without sharding."""
    model = encoder(LAYERS)
    optimizer = PLAN.build(model, steps=STEPS)
    return model, optimizer, go(model, optimizer, range(steps))


def numbers(model: nn.Module) -> dict[str, list]:
    return {name: whole(param.detach()).tolist() for name, param in model.named_parameters()}


def assert_near(one: dict[str, list], other: dict[str, list]) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        mine, theirs = (torch.tensor(each, dtype=torch.float64) for each in (values, other[name]))
        assert float((mine - theirs).abs().max()) <= 1e-6 * float(theirs.abs().max()), name


def state_of(model: nn.Module, optimizer: lm.Optimizer) -> dict[str, dict[str, list]]:
    return {
        name: {key: whole(value).tolist() for key, value in optimizer.state[param].items()}
        for name, param in model.named_parameters()
    }


# ------------------------------------------------------------------------- what the processes do


def train_and_save(part: slice, folder: str) -> dict[str, object]:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    model = sharded()
    frozen = local(model.embeddings.weight.detach()).clone()
    optimizer = PLAN.build(model, steps=STEPS, audit=True)
    steps = [0]
    optimizer.register_step_post_hook(lambda *_: steps.__setitem__(0, steps[0] + 1))
    seen = go(model, optimizer, range(SAVED), part)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    checkpoint.save(state, checkpoint_id=f"{folder}/by-two")
    taken = steps[0]
    chosen = {
        kept.batch.algorithm.name: kernels.choose(kept.batch)[1]
        for kept in optimizer._kept_batches.values()
    }
    seen += go(model, optimizer, range(SAVED, STEPS), part)
    return {
        "seen": seen,
        "weights": numbers(model),
        "state": state_of(model, optimizer),
        "steps before and after saving": [SAVED, taken],
        "embeddings": torch.equal(local(model.embeddings.weight.detach()), frozen),
        "kernels": chosen,
        "findings": [finding.code for finding in optimizer.check(model, after=1)],
    }


def resume(part: slice, folder: str) -> dict[str, object]:
    """Go on from a checkpoint of any number of processes."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    model = sharded(seed=1)
    weights = {"model": get_model_state_dict(model)}
    checkpoint.load(weights, checkpoint_id=folder)
    optimizer = PLAN.build(model, steps=STEPS, audit=False)
    optimizer.register_step_post_hook(lambda *_: pytest.fail("loading took a step"))
    report = lm.load_distributed(optimizer, folder)
    optimizer._optimizer_step_post_hooks.clear()
    clock = optimizer.clock
    go(model, optimizer, range(SAVED, STEPS), part)
    return {
        "clock": clock,
        "new": report.new,
        "weights": numbers(model),
        "state": state_of(model, optimizer),
        "feedback": optimizer.param_groups[0]["feedback"],
    }


def torchs_own_way(folder: str) -> dict[str, str]:
    """What torch's own way back loses is not lost silently."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    said = {}
    model = sharded()
    optimizer = PLAN.build(model, steps=STEPS)
    template = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    checkpoint.load(template, checkpoint_id=f"{folder}/by-one")
    trained = sharded()
    other = PLAN.build(trained, steps=STEPS)
    go(trained, other, range(SAVED))
    state = get_optimizer_state_dict(trained, other)
    for name, given in (("folder", template["optimizer"]), ("memory", state)):
        try:
            set_optimizer_state_dict(model, optimizer, given)
        except lm.StateError as error:
            said[name] = str(error)
    with optimizer.receiving():
        set_optimizer_state_dict(model, optimizer, state)
    said["receiving"] = json.dumps(state_of(model, optimizer) == state_of(trained, other))
    optimizer = PLAN.build(model, steps=STEPS)
    optimizer.load_state_dict(state)
    said["direct"] = json.dumps(state_of(model, optimizer) == state_of(trained, other))
    return said


def skip_alike(rank: int) -> dict[str, object]:
    """A gradient is bad in the shard of one process only."""
    logging.disable(logging.WARNING)
    found: dict[str, object] = {}
    settings = {"norms": {"clip_norm": 1.0}, "all": {}}
    for check, more in settings.items():
        model = sharded()
        optimizer = lm.Plan("SGD", lr=0.1, nonfinite="skip", nonfinite_check=check, **more).build(
            model
        )
        before = numbers(model)
        forward_backward(model, 0)
        if rank == 1:
            local(model.encoder.layer["1"].dense.weight.grad)[0, 0] = float("nan")
        optimizer.step()
        found[check] = [optimizer.skipped, optimizer.clock, numbers(model) == before]
        raising = lm.Plan("SGD", lr=0.1, nonfinite_check=check, **more).build(model)
        try:
            raising.step()
        except lm.NonFiniteError as error:
            found[f"{check} says"] = str(error)
    logging.disable(logging.NOTSET)
    return found


def briefly(model: nn.Module, plan: lm.Plan, part: slice = slice(None)) -> dict[str, list]:
    optimizer = plan.build(model)
    for step in range(3):
        forward_backward(model, step, part)
        optimizer.step()
        optimizer.zero_grad()
    return numbers(model)


def split_tie() -> dict[str, object]:
    from torch.distributed.fsdp import fully_shard

    found: dict[str, object] = {}
    for how in ("split", "together"):
        model = Tied().double()
        if how == "split":
            fully_shard(model.decoder)
        fully_shard(model)
        plan = lm.Plan("SGD", lr=0.1)
        optimizer = plan.build(model)
        found[how] = [str(finding) for finding in optimizer.findings]
        found[f"{how}, check"] = [finding.code for finding in optimizer.check(model)]
        try:
            model(torch.ones(2, 3, dtype=torch.float64))
        except ValueError as error:
            found[f"{how}, torch"] = str(error)
    return found


def some_norms() -> dict[str, list[float]]:
    """Norms of a tensor whose second shard is empty, and of one that float16 could not hold."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    line = init_device_mesh("cpu", (2,))
    one, large = torch.tensor([[3.0, -4.0]]), torch.full((4, 2500), 1000.0, dtype=torch.float16)
    cases = {
        "empty shard": [distribute_tensor(one, line, [Shard(0)])],
        "columns": [distribute_tensor(one, line, [Shard(1)])],
        "copies": [distribute_tensor(one, line, [Replicate()])],
        "float16": [distribute_tensor(large, line, [Shard(0)])],
    }
    return {
        name: [float(total_norm(tensors, p)) for p in (1.0, 2.0, math.inf)]
        for name, tensors in cases.items()
    }


def work(rank: int, folder: str) -> None:
    """One process: what it saw goes to a file."""
    join_group(rank, folder)
    part = slice(rank, None, 2)
    record = {
        "trained": train_and_save(part, folder),
        "same count": resume(part, f"{folder}/by-two"),
        "from one": resume(part, f"{folder}/by-one"),
        "torch": torchs_own_way(folder),
        "skip": skip_alike(rank),
        "tie": split_tie(),
        "norms": some_norms(),
        "others": {name: briefly(sharded(), plan, part) for name, plan in OTHERS.items()},
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(record))
    leave_group()


# --------------------------------------------------------------------------- what is checked of it


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The records of two processes, and their folder; a checkpoint of one process lies in it."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    folder = tmp_path_factory.mktemp("sharded")
    model, optimizer, _ = single(SAVED)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    checkpoint.save(state, checkpoint_id=folder / "by-one", no_dist=True)
    run_processes(work, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)], folder


@pytest.fixture(scope="module")
def alone():
    """The same run on one process."""
    model, optimizer, seen = single()
    return numbers(model), json.loads(json.dumps(state_of(model, optimizer))), seen


def test_the_processes_agree(both):
    (one, other), _ = both
    for what in one:
        assert one[what] == other[what], what


def test_two_processes_do_what_one_does(both, alone):
    trained = both[0][0]["trained"]
    weights, state, seen = alone
    assert_near(trained["weights"], weights)
    for mine, theirs in zip(trained["seen"], seen, strict=True):
        assert mine["flags"] == theirs["flags"]
        assert mine["lr"] == theirs["lr"]
        assert mine["norms"] == pytest.approx(theirs["norms"], rel=1e-6)
    assert state.keys() == trained["state"].keys()
    for name, entry in state.items():
        assert_near(trained["state"][name], entry)


@pytest.mark.parametrize("name", OTHERS)
def test_every_kind_of_rule_works_over_shards_of_two_meshes(both, name):
    assert_near(both[0][0]["others"][name], briefly(encoder(LAYERS), OTHERS[name]))


def test_norms_are_those_of_the_whole_whatever_the_shards(both):
    for record in both[0]:
        for name in ("empty shard", "columns", "copies"):
            assert record["norms"][name] == [7.0, 5.0, 4.0], name
        assert record["norms"]["float16"] == pytest.approx([1e7, 1e5, 1e3], rel=1e-6)


def test_windows_toggle_the_flag_and_frozen_shards_do_not_move(both):
    trained = both[0][0]["trained"]
    flags = [each["flags"] for each in trained["seen"]]
    assert [f["encoder.layer.2.dense.weight"] for f in flags] == [False] * 2 + [True] * 7
    assert [f["encoder.layer.1.dense.bias"] for f in flags] == [
        step in (1, 2, 4, 5, 6) for step in range(STEPS)
    ]
    assert not any(f["embeddings.weight"] for f in flags)
    assert trained["embeddings"]
    assert trained["findings"] == []
    assert trained["steps before and after saving"] == [SAVED, SAVED]
    assert trained["kernels"]["AdamW"].startswith("fused: torch's fused operator, one pass")
    assert "is a DTensor, for which torch's fused SGD is not made" in trained["kernels"]["SGD"]


@pytest.mark.parametrize("way", ["same count", "from one"])
def test_a_run_resumes_on_two_processes(both, alone, way):
    resumed = both[0][0][way]
    assert (resumed["clock"], resumed["new"]) == (SAVED, [])
    assert_near(resumed["weights"], alone[0])
    for name, entry in alone[1].items():
        assert_near(resumed["state"][name], entry)


def test_a_run_of_two_processes_resumes_on_one(both, alone):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    model = encoder(LAYERS, seed=1)
    weights = {"model": get_model_state_dict(model)}
    checkpoint.load(weights, checkpoint_id=both[1] / "by-two", no_dist=True)
    optimizer = PLAN.build(model, steps=STEPS)
    report = lm.load_distributed(optimizer, both[1] / "by-two")
    assert (optimizer.clock, report.new, report.dropped) == (SAVED, (), ())
    seen = optimizer.param_groups[0]["feedback"]["plateau of plan (loss, min)"]
    assert seen["changes"] == [[4, 0.5]]
    go(model, optimizer, range(SAVED, STEPS))
    assert_near(numbers(model), alone[0])


def test_what_torchs_own_way_loses_is_an_error(both):
    said = both[0][0]["torch"]
    assert "the state of encoder.layer.1" in said["memory"]
    assert "load_distributed" in said["folder"]
    assert said["direct"] == said["receiving"] == "true"


def test_a_bad_gradient_on_one_process_skips_the_step_on_all(both):
    for record in both[0]:
        skip = record["skip"]
        assert skip["norms"] == skip["all"] == [1, 0, True]
        assert "'encoder.layer.1.dense.weight'" in skip["norms says"]
        assert "'encoder.layer.1.dense.weight'" in skip["all says"]


def test_a_tie_across_shard_groups_is_found_before_torch_refuses_it(both):
    tie = both[0][0]["tie"]
    (finding,) = tie["split"]
    assert finding.startswith("tie-across-shards: encoder.weight and decoder.weight were one")
    assert "tie-across-shards" in tie["split, check"]
    assert "same FSDP group" in tie["split, torch"]
    assert (tie["together"], tie["together, check"]) == ([], [])
    assert "together, torch" not in tie


def test_canary_a_wrong_number_is_found(alone):
    wrong = dict(alone[0])
    wrong["classifier.bias"] = [value * (1 + 1e-5) for value in wrong["classifier.bias"]]
    with pytest.raises(AssertionError):
        assert_near(wrong, alone[0])


@pytest.mark.parametrize(
    ("folder", "key", "words"),
    [
        ("nowhere", "optimizer", ["nowhere", "no checkpoint"]),
        ("by-one", "optim", ["'optim'", "model, optimizer", "key="]),
    ],
)
def test_a_folder_without_the_state_is_an_error(both, folder, key, words):
    optimizer = PLAN.build(encoder(LAYERS), steps=STEPS)
    with pytest.raises(lm.StateError) as caught:
        lm.load_distributed(optimizer, both[1] / folder, key=key)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert optimizer.clock == 0
