"""States that go through a folder of torch.distributed.checkpoint on one process, and come back."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch

import lamina as lm
from models import Tied, backward, equal, mlp, train

#: torch says so of what is meant here
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

BODY = lm.Rule("body", thaw=[1, 6], freeze=4, rewarm=lm.warmup(2))
PLANS = {
    "AdamW": lm.Plan(lm.AdamW, lr=0.01, rules=[BODY]),
    "SGD": lm.Plan(lm.SGD, lr=0.01, momentum=0.9, schedule=lm.linear(to=0.1), rules=[BODY]),
    "dropped": lm.Plan(lm.RMSprop, lr=0.01, rules=[BODY], frozen_state="drop"),
    "later": lm.Plan(lm.LAMB, lr=0.01, rules=[lm.Rule("body", thaw=7)]),
    "guest": lm.Plan(torch.optim.NAdam, lr=0.01, rules=[BODY]),
    "guest, later": lm.Plan(torch.optim.NAdam, lr=0.01, rules=[lm.Rule("body", thaw=7)]),
    "reactions": lm.Plan(
        lm.Adam,
        lr=0.01,
        feedback=lm.plateau("loss", patience=0),
        stop=lm.early_stop("loss", patience=9),
        rules=[lm.Rule("body", thaw=lm.on_plateau("loss", patience=0))],
    ),
}


def save(model, optimizer, folder):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    checkpoint.save(state, checkpoint_id=folder)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("steps", [0, 5])
def test_a_state_comes_back_as_it_was(tmp_path, name, steps):
    model = mlp()
    optimizer = PLANS[name].build(model, steps=9)
    train(model, optimizer, steps)
    if name == "reactions":
        for loss in (1.0, 2.0, 3.0):
            optimizer.report(loss=loss)
    optimizer.override(lr=0.5, rule="default")
    optimizer.override(lr=None)
    save(model, optimizer, tmp_path)
    twin = copy.deepcopy(model)
    other = PLANS[name].build(twin, steps=9)
    report = lm.load_distributed(other, tmp_path)
    assert report is other.last_load
    assert equal(other.state_dict(), optimizer.state_dict())
    train(model, optimizer, 4, first=steps)
    train(twin, other, 4, first=steps)
    assert equal(dict(twin.named_parameters()), dict(model.named_parameters()))


def test_a_tied_parameter_is_found_by_any_of_its_names(tmp_path):
    model = Tied().double()
    optimizer = lm.Plan(lm.AdamW, lr=0.1).build(model)
    train(model, optimizer, 2)
    save(model, optimizer, tmp_path)
    other = lm.Plan(lm.AdamW, lr=0.1).build(copy.deepcopy(model))
    lm.load_distributed(other, tmp_path)
    assert equal(other.state_dict(), optimizer.state_dict())


def test_lbfgs_comes_back_too(tmp_path):
    model = mlp()
    plan = lm.Plan(lm.LBFGS, lr=0.5, max_iter=3)
    optimizer = plan.build(model)

    def stepped(net, chosen, step):
        def closure():
            chosen.zero_grad()
            return backward(net, step)

        chosen.step(closure)

    for step in range(3):
        stepped(model, optimizer, step)
    save(model, optimizer, tmp_path)
    twin = copy.deepcopy(model)
    other = plan.build(twin)
    lm.load_distributed(other, tmp_path)
    stepped(model, optimizer, 3)
    stepped(twin, other, 3)
    assert equal(dict(twin.named_parameters()), dict(model.named_parameters()))


def test_a_state_of_another_shape_changes_nothing(tmp_path):
    model = mlp()
    optimizer = PLANS["AdamW"].build(model, steps=9)
    train(model, optimizer, 3)
    save(model, optimizer, tmp_path)
    wider = mlp()
    wider.head = torch.nn.Linear(4, 3).double()
    other = PLANS["AdamW"].build(wider, steps=9)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(lm.StateError, match=r"head.weight.* \(2, 4\).*\(3, 4\)"):
        lm.load_distributed(other, tmp_path)
    assert equal(other.state_dict(), before)


def saved_raw(folder):
    """A trained optimizer whose `state_dict()` was saved as it is, and one that was just built."""
    from torch.distributed import checkpoint

    model = mlp()
    optimizer = PLANS["AdamW"].build(model, steps=9)
    train(model, optimizer, 3)
    checkpoint.save({"optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    return optimizer, PLANS["AdamW"].build(copy.deepcopy(model), steps=9)


def test_what_torch_reads_into_a_new_optimizer_is_refused(tmp_path):
    from torch.distributed import checkpoint

    _, other = saved_raw(tmp_path)
    hollow = {"optimizer": other.state_dict()}
    checkpoint.load(hollow, checkpoint_id=tmp_path)
    with pytest.raises(
        lm.StateError, match=r"counts 2 updates but has no exp_avg.*load_distributed"
    ):
        other.load_state_dict(hollow["optimizer"])
    assert other.clock == 0


GUEST = lm.Rule("head", optimizer=torch.optim.NAdam, lr=0.1, thaw=1, freeze=3, frozen_state="drop")


@pytest.mark.parametrize("steps", [2, 4])
def test_a_guest_whose_state_was_dropped(tmp_path, steps):
    plan = lm.Plan(lm.AdamW, lr=0.01, rules=[GUEST])
    model = mlp()
    optimizer = plan.build(model, steps=9)
    train(model, optimizer, steps)
    save(model, optimizer, tmp_path)
    other = plan.build(copy.deepcopy(model), steps=9)
    report = lm.load_distributed(other, tmp_path, strict=True)
    assert set(report.kept) == dict(model.named_parameters()).keys()
    assert equal(other.state_dict(), optimizer.state_dict())


def saved_run(folder, plan=PLANS["SGD"], steps=5):
    model = mlp()
    optimizer = plan.build(model, steps=9)
    train(model, optimizer, steps)
    save(model, optimizer, folder)
    return model, optimizer


def test_parts_that_have_another_name_now(tmp_path):
    model, optimizer = saved_run(tmp_path)
    other = lm.Plan(lm.SGD, momentum=0.9, lr=0.01).build(torch.nn.ModuleDict({"new": model.head}))
    renamed = {"head": "new", "body": None}
    report = lm.load_distributed(other, tmp_path, renamed=renamed)
    assert report.renamed == (("head.weight", "new.weight"), ("head.bias", "new.bias"))
    for param in model.head.parameters():
        assert equal(other.state[param], optimizer.state[param])
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(lm.StateError, match=r"strict=True.*body\.weight"):
        lm.load_distributed(other, tmp_path, strict=True, renamed={"head": "new"})
    with pytest.raises(lm.StateError, match="expected a dict from saved"):
        lm.load_distributed(other, tmp_path, renamed=["head"])
    with pytest.raises(lm.StateError, match="no parameter or module 'heads'"):
        lm.load_distributed(other, tmp_path, renamed={"heads": "new"})
    assert equal(other.state_dict(), before)


@pytest.mark.parametrize("extend", ["hold", "stretch"])
def test_a_run_goes_on_from_a_folder_with_another_length(tmp_path, extend):
    plan = lm.Plan(lm.AdamW, lr=0.01, schedule=lm.cosine(to=0.1))
    model, optimizer = saved_run(tmp_path, plan)
    twin = copy.deepcopy(model)
    state = lm.read_distributed(twin, tmp_path)
    assert equal(state, optimizer.state_dict())
    with pytest.raises(lm.StateError, match="extend='hold'"):
        plan.build(twin, steps=20, resume=state)
    preview = plan.preview(twin, steps=20, resume=state, extend=extend)
    other = plan.build(twin, steps=20, resume=state, extend=extend)
    alike = plan.build(model, steps=20, resume=optimizer.state_dict(), extend=extend)
    assert other.clock == preview.resumed.clock == 5
    assert equal(other.state_dict(), alike.state_dict())


def test_a_raw_state_dict_can_be_read_too(tmp_path):
    optimizer, other = saved_raw(tmp_path)
    lm.load_distributed(other, tmp_path, strict=True)
    assert equal(other.state_dict(), optimizer.state_dict())


def damage(folder, what):
    """Spoil a folder in one way."""
    shards, metadata = list(folder.glob("*.distcp")), folder / ".metadata"
    assert shards
    if what == "no shard":
        for shard in shards:
            shard.unlink()
    elif what == "short shard":
        shards[0].write_bytes(shards[0].read_bytes()[:100])
    else:
        metadata.write_bytes({"junk": b"junk", "empty": b"", "other": pickle.dumps([1])}[what])


@pytest.mark.parametrize("what", ["no shard", "short shard", "junk", "empty", "other"])
def test_a_damaged_folder_is_told(tmp_path, what):
    model, optimizer = saved_run(tmp_path)
    damage(tmp_path, what)
    before = copy.deepcopy(optimizer.state_dict())
    words = f"^{re.escape(str(tmp_path))}: cannot be read .*; use another checkpoint"
    with pytest.raises(lm.StateError, match=words):
        lm.load_distributed(optimizer, tmp_path)
    with pytest.raises(lm.StateError, match=words):
        lm.read_distributed(model, tmp_path)
    assert equal(optimizer.state_dict(), before)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": {"a": torch.ones(2)}}, "no optimizer state under 'optimizer', only model"),
        ({"optimizer": torch.ones(2)}, "no optimizer state under 'optimizer', only optimizer"),
        ({"optimizer": {"state": torch.ones(2), "param_groups": 3}}, "cannot be read"),
        ({"optimizer": {"param_groups": [{"lr": 1.0}]}}, "cannot be read"),
        ({"optimizer": {"param_groups": {"params": [torch.ones(1)]}}}, "cannot be read"),
    ],
)
def test_a_folder_of_something_else_is_told(tmp_path, content, words):
    from torch.distributed import checkpoint

    checkpoint.save(content, checkpoint_id=tmp_path)
    optimizer = PLANS["SGD"].build(mlp(), steps=9)
    with pytest.raises(lm.StateError, match=words):
        lm.load_distributed(optimizer, tmp_path)


def test_canary_torchs_exception_for_a_damaged_folder_is_no_exception(tmp_path):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    saved_run(tmp_path)
    damage(tmp_path, "no shard")
    with pytest.raises(CheckpointException) as caught:
        checkpoint.load({"optimizer": {"param_groups": []}}, checkpoint_id=tmp_path)
    assert not isinstance(caught.value, Exception)


def test_what_is_no_optimizer_of_a_plan_is_refused(tmp_path):
    with pytest.raises(lm.StateError, match=r"a AdamW; it needs an optimizer that plan\.build"):
        lm.load_distributed(lm.AdamW(mlp().parameters()), tmp_path)
