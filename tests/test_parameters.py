"""The walk over a model: names without wrappers, ties, and memory that is shared twice."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lamina as lm
from lamina.model.parameters import clean_names, walk
from models import Tied, Wrapper, encoder, mlp


def names(model):
    return [item.info.name for item in walk(model)]


PLAIN = ["body.weight", "body.bias", "head.weight", "head.bias"]


def compiled(model):
    return torch.compile(model, backend="eager")


def checkpointed(model):
    model.body = checkpoint_wrapper(model.body)
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        Wrapper,
        compiled,
        checkpointed,
        lambda model: Wrapper(compiled(model)),
        lambda model: compiled(Wrapper(model)),
        lambda model: Wrapper(Wrapper(checkpointed(model))),
    ],
    ids=["plain", "ddp", "compile", "checkpoint", "ddp(compile)", "compile(ddp)", "all"],
)
def test_wrapper_prefixes_are_removed(wrap):
    model = wrap(mlp())
    assert names(model) == PLAIN
    optimizer = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("head.*", lr=1.0)]).build(model)
    assert [group["param_names"] for group in optimizer.param_groups] == [PLAIN[:2], PLAIN[2:]]


def test_a_module_of_ones_own_named_module_stays():
    model = nn.ModuleDict({"module": nn.Linear(1, 1), "other": nn.Linear(1, 1)})
    assert names(model)[0] == "module.weight"
    assert list(clean_names(["module.a", "b"]).values()) == ["module.a", "b"]


def test_names_stay_whole_when_cleaning_would_merge_two():
    given = ["a._orig_mod.w", "a.w"]
    assert clean_names(given) == {name: name for name in given}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lm.SGD, ["type type", "torch.nn.Module"]),
        ([nn.Parameter(torch.ones(1))], ["list", "torch.nn.Module"]),
        (nn.Tanh(), ["Tanh", "no parameters"]),
    ],
)
def test_what_is_not_a_model(given, words):
    with pytest.raises(lm.PlanError) as caught:
        lm.Plan("SGD", lr=0.1).build(given)
    assert all(word in str(caught.value) for word in words), str(caught.value)


# --------------------------------------------------------------------------------------- ties


def test_one_parameter_under_two_names_is_one_and_stepped_once():
    model = Tied().double()
    (tied, *_) = walk(model)
    assert tied.info.names == ("encoder.weight", "decoder.weight")
    assert names(model) == ["encoder.weight", "middle.weight", "middle.bias"]
    optimizer = lm.Plan("SGD", lr=0.5, rules=[lm.Rule("decoder", lr=0.25)]).build(model)
    before = model.encoder.weight.detach().clone()
    model.encoder.weight.grad = torch.ones_like(before)
    optimizer.step()
    assert torch.equal(model.encoder.weight, before - 0.25)


def test_each_rule_applies_once_to_a_tied_parameter():
    rule = lm.Rule("encoder | decoder", lr=lm.times(0.5))
    optimizer = lm.Plan("SGD", lr=1.0, rules=[rule]).build(Tied())
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1.0]


def test_a_layer_used_twice_is_tied_as_a_whole():
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"first": layer, "second": layer})
    assert [item.info.names for item in walk(model)] == [
        ("first.weight", "second.weight"),
        ("first.bias", "second.bias"),
    ]


def test_two_depths_of_one_parameter_are_an_error():
    model = encoder((0, 1))
    blocks = model.encoder.layer
    blocks["1"].dense.weight = blocks["0"].dense.weight
    plan = lm.Plan("SGD", lr=1.0, rules=[lm.Rule("encoder.layer.{depth}", lr=lm.by_depth(0.9))])
    with pytest.raises(lm.PatternError) as caught:
        plan.build(model)
    message = str(caught.value)
    assert "encoder.layer.0.dense.weight = encoder.layer.1.dense.weight" in message
    assert "0, 1" in message


def overlapping():
    model = mlp()
    whole = torch.zeros(4, 4, dtype=torch.float64)
    model.body.weight = nn.Parameter(whole[:, :3])
    model.head.weight = nn.Parameter(whole[2:])
    return model


def doubled():
    model = mlp()
    model.head.weight = nn.Parameter(model.body.weight.data)
    return model


@pytest.mark.parametrize("make", [overlapping, doubled])
def test_two_parameters_over_the_same_memory_are_refused_by_name(make):
    with pytest.raises(lm.PlanError) as caught:
        lm.Plan("SGD", lr=0.1).build(make())
    words = ["'body.weight'", "'head.weight'", "same memory"]
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_neighbours_in_one_storage_are_no_tie():
    model = mlp()
    flat = torch.zeros(20, dtype=torch.float64)
    model.body.weight = nn.Parameter(flat[:12].view(4, 3))
    model.head.weight = nn.Parameter(flat[12:].view(2, 4))
    assert names(model) == PLAIN


def test_meta_tensors_have_no_memory_to_share():
    with torch.device("meta"):
        model = mlp()
    assert names(model) == PLAIN
    groups = lm.Plan("SGD", lr=0.1).preview(model).resolved.cells
    assert len(groups) == 1


def test_what_a_parameter_says_of_itself():
    info = next(item.info for item in walk(encoder((0,))) if item.info.name.endswith("norm.bias"))
    assert (info.shape, info.ndim, info.numel, info.dtype) == ((3,), 1, 3, "float64")
    assert {"LayerNorm", "Module"} <= info.types
    assert (info.depth, info.rank, info.requires_grad) == (None, None, True)


def test_functions_of_a_parameter_see_what_the_rule_captured():
    seen = {}

    def by_rank(info):
        seen[info.name] = info.depth, info.rank
        return 0.1 * (info.rank + 1)

    rule = lm.Rule("encoder.layer.{depth}.dense.bias", lr=by_rank)
    lm.Plan("SGD", lr=1.0, rules=[rule]).build(encoder((2, 10)))
    assert seen == {
        "encoder.layer.2.dense.bias": (2, 0),
        "encoder.layer.10.dense.bias": (10, 1),
    }


# -------------------------------------------------------------------------------------- marks


def test_a_second_build_does_not_mistake_the_first_ones_freezing():
    model = mlp()
    lm.Plan("SGD", lr=0.1, rules=[lm.Rule("body", frozen=True)]).build(model)
    assert not model.body.weight.requires_grad
    again = lm.Plan("SGD", lr=0.1).build(model)
    assert model.body.weight.requires_grad
    assert again.param_groups[0]["lr"] == 0.1
    assert len(again.param_groups) == 1


def test_what_the_user_froze_is_a_first_rule():
    model = mlp()
    model.body.weight.requires_grad_(False)
    plan = lm.Plan("SGD", lr=0.1)
    for _ in range(2):  # a rebuild sees the same
        with pytest.warns(lm.LaminaWarning, match="frozen-by-model"):
            optimizer = plan.build(model)
        assert [finding.code for finding in optimizer.findings] == ["frozen-by-model"]
        assert not model.body.weight.requires_grad
    lm.Plan("SGD", lr=0.1, rules=[lm.Rule("body", frozen=False)]).build(model)
    assert model.body.weight.requires_grad


@pytest.mark.parametrize("users", [True, False])
def test_release_restores_requires_grad(users):
    model = mlp()
    model.head.bias.requires_grad_(users)
    rules = [lm.Rule("body", frozen=True), lm.Rule("head.bias", thaw=1)]
    before = {name: param.requires_grad for name, param in model.named_parameters()}
    optimizer = lm.Plan("SGD", lr=0.1, rules=rules).build(model)
    assert not model.body.weight.requires_grad
    optimizer.release()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert lm.Plan("SGD", lr=0.1).build(model).findings == () if users else True
