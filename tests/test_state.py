"""State: saved in torch's shape, loaded by name, and a resumed run is the run itself."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn

import lamina as lm
from models import Wrapper, backward, equal, mlp, same, train, weights

RULES = [lm.Rule("body", thaw=4, lr=lm.times(0.5)), lm.Rule("head.bias", weight_decay=0)]
PLAN = lm.Plan(
    lm.AdamW,
    lr=0.05,
    schedule=lm.warmup(3) >> lm.cosine(to=0.1),
    clip_norm=1.0,
    rules=RULES,
)


def built(plan=PLAN, model=None, steps=20):
    model = mlp() if model is None else model
    return model, plan.build(model, steps=steps)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def tensors(optimizer):
    """The state of every parameter by name."""
    return {
        name: {key: torch.as_tensor(value).clone() for key, value in optimizer.state[param].items()}
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    }


def test_state_has_torchs_shape_and_plain_values():
    model, optimizer = built()
    train(model, optimizer, 6)
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert sorted(state["state"]) == [0, 1, 2, 3]
    assert [group["params"] for group in state["param_groups"]] == [[0, 1], [2], [3]]
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(group["clock"] == 6 for group in state["param_groups"])


def test_every_parameter_has_a_step_from_the_beginning():
    _, optimizer = built()
    assert all(set(entry) == {"step"} for entry in optimizer.state.values())
    assert len(optimizer.state) == 4


@pytest.mark.parametrize("at", [0, 1, 3, 4, 9])
def test_a_resumed_run_is_the_run_itself(at):
    model, optimizer = built()
    train(model, optimizer, at)
    saved, kept = through_a_file(optimizer.state_dict()), weights(model)
    losses = train(model, optimizer, 12 - at, first=at)
    twin, other = built()
    twin.load_state_dict(kept)
    other.load_state_dict(saved)
    assert other.clock == at
    assert train(twin, other, 12 - at, first=at) == losses
    assert same(weights(model), weights(twin))
    assert equal(tensors(other), tensors(optimizer))


def test_loading_its_own_state_changes_and_prints_nothing(capsys, recwarn, caplog):
    model, optimizer = built()
    train(model, optimizer, 5)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    assert equal(optimizer.state_dict(), before)
    assert capsys.readouterr() == ("", "")
    assert list(recwarn) == []
    assert caplog.text == ""
    assert optimizer.last_load.new == optimizer.last_load.dropped == ()


class Reordered(nn.Module):
    """The same parts as `mlp`, listed the other way round."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(4, 2), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


@pytest.mark.parametrize(
    "wrap", [lambda model: model, Wrapper, lambda model: torch.compile(model, backend="eager")]
)
def test_state_is_matched_by_name_in_any_order_and_wrapper(wrap):
    model, optimizer = built()
    train(model, optimizer, 6)
    other = PLAN.build(wrap(Reordered().double()), steps=20)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert equal(tensors(other), tensors(optimizer))
    assert other.last_load.new == ()


def test_groups_in_another_order_keep_their_values():
    rules = [lm.Rule("body", lr=0.1), lm.Rule("head", lr=0.9)]
    model, optimizer = built(lm.Plan("Adam", lr=1.0, rules=rules))
    train(model, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"].reverse()
    optimizer.load_state_dict(state)
    found = {tuple(group["param_names"]): group["lr"] for group in optimizer.param_groups}
    assert found == {("body.weight", "body.bias"): 0.1, ("head.weight", "head.bias"): 0.9}
    assert optimizer.clock == 3


def test_loading_keeps_the_values_of_the_plan():
    model, optimizer = built()
    train(model, optimizer, 5)
    plan = lm.Plan(lm.AdamW, lr=0.5, weight_decay=0.25, betas=(0.5, 0.6))
    twin, other = built(plan)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    (group,) = other.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.5, 0.25, (0.5, 0.6))
    assert other.clock == 5
    train(twin, other, 1, first=5)
    assert other.applied["default"]["lr"] == 0.5


def test_a_group_key_that_an_older_state_lacks_stays():
    model, optimizer = built()
    train(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for key in ("name", "weight_decay", "overrides", "feedback"):
            del group[key]
    optimizer.load_state_dict(state)
    assert all({"name", "weight_decay", "overrides"} <= set(g) for g in optimizer.param_groups)
    train(model, optimizer, 1, first=2)
    assert optimizer.clock == 3


def test_what_is_missing_and_what_is_dropped_is_told():
    model, optimizer = built()
    train(model, optimizer, 6)
    state = optimizer.state_dict()
    larger = nn.ModuleDict({"body": nn.Linear(3, 4), "new": nn.Linear(1, 1)}).double()
    other = lm.Plan(lm.AdamW, lr=0.1).build(larger)
    with pytest.warns(lm.LaminaWarning, match="new.weight, new.bias; .* head.weight, head.bias"):
        other.load_state_dict(state)
    report = other.last_load
    assert report.kept == ("body.weight", "body.bias")
    assert report.new == ("new.weight", "new.bias")
    assert report.dropped == ("head.weight", "head.bias")
    for word in ["2 parameters", "new.weight", "head.bias"]:
        assert word in str(report)


@pytest.mark.parametrize(("optimizer", "name"), [("SGD", "default"), ("AdamW", "head")])
def test_an_override_that_no_longer_fits_is_dropped_and_told(optimizer, name):
    _, before = built(lm.Plan(lm.AdamW, lr=0.1, rules=[lm.Rule("head", lr=1.0)]))
    before.override(eps=1e-3, rule=name)
    twin, other = built(lm.Plan(optimizer, lr=0.1))
    other.load_state_dict(through_a_file(before.state_dict()))
    assert other.last_load.dropped == (f"override of {name!r}",)
    train(twin, other, 1)
    assert other.clock == 1


KINDS = [(lm.SGD, {"momentum": 0.9}), (lm.AdamW, {}), (lm.RMSprop, {"momentum": 0.5})]


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(KINDS, 2)))
def test_the_state_of_another_optimizer_does_no_harm(first, second):
    model, optimizer = built(lm.Plan(first[0], lr=0.01, **first[1]))
    train(model, optimizer, 3)
    twin, other = built(lm.Plan(second[0], lr=0.01, **second[1]))
    with pytest.warns(lm.LaminaWarning, match="of another optimizer: body.weight"):
        other.load_state_dict(through_a_file(optimizer.state_dict()))
    train(twin, other, 3, first=3)
    assert other.clock == 6
    assert all(torch.isfinite(weight).all() for weight in weights(twin).values())


def broken(change):
    model, optimizer = built()
    train(model, optimizer, 6)
    state = copy.deepcopy(optimizer.state_dict())
    return change(state) or state


def another_shape(state):
    state["state"][0]["exp_avg"] = torch.zeros(7, 7)


def without_names(state):
    for group in state["param_groups"]:
        del group["param_names"]
    state["param_groups"].reverse()


BROKEN = [
    (another_shape, ["exp_avg", "'body.weight'", "(7, 7)", "(4, 3)"]),
    (without_names, ["no parameter names", "number 0", "'body.weight'", "named_parameters"]),
    (lambda state: {"model": {}}, ["'state' and 'param_groups'"]),
    (lambda state: {**state, "param_groups": []}, ["no parameter groups"]),
    (lambda state: state["param_groups"][0].update(clock=-1), ["clock is -1"]),
    (lambda state: state["param_groups"][0].update(clock="5"), ["clock is '5'"]),
    (lambda state: state["param_groups"][0].update(clock=True), ["clock is True"]),
    (lambda state: state["state"].update({0: "x"}), ["'body.weight' is 'x'"]),
    (lambda state: state["state"][0].update(step="x"), ["step of 'body.weight' is 'x'"]),
    (lambda state: [1], ["not an optimizer state"]),
]


@pytest.mark.parametrize(("change", "words"), BROKEN)
def test_a_state_that_does_not_fit_changes_nothing(change, words):
    state = broken(change)
    model, optimizer = built()
    train(model, optimizer, 5)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(lm.StateError) as caught:
        optimizer.load_state_dict(state)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert equal(optimizer.state_dict(), before)
    train(model, optimizer, 1, first=5)
    assert optimizer.clock == 6


def test_loading_moves_windows_too():
    model, optimizer = built()
    train(model, optimizer, 6)
    saved = optimizer.state_dict()
    twin, other = built()
    assert not twin.body.weight.requires_grad
    other.load_state_dict(saved)
    assert twin.body.weight.requires_grad
    early, first = built()
    first.load_state_dict(built()[1].state_dict())
    assert not early.body.weight.requires_grad


def test_loaded_state_is_a_copy():
    model, optimizer = built()
    train(model, optimizer, 5)
    saved = optimizer.state_dict()
    twin, other = built()
    other.load_state_dict(saved)
    before = copy.deepcopy(saved)
    train(twin, other, 3, first=5)
    assert equal(saved, before)


def test_float32_state_of_bfloat16_parameters_survives():
    model, optimizer = built(model=mlp(dtype=torch.bfloat16))
    train(model, optimizer, 6)
    twin, other = built(model=mlp(dtype=torch.bfloat16))
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    kinds = {key: value.dtype for key, value in optimizer.state[model.head.weight].items()}
    assert {key: v.dtype for key, v in other.state[twin.head.weight].items()} == kinds
    assert kinds["step"] == torch.float32


def test_load_hooks_run():
    _, optimizer = built()
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: seen.append("pre"))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("post"))
    optimizer.register_state_dict_post_hook(lambda opt, state: seen.append("saved"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["saved", "pre", "post"]


def test_every_algorithm_resumes_exactly():
    kinds = [(lm.SGD, {"momentum": 0.9}), (lm.Adam, {"amsgrad": True}), (lm.RMSprop, {})]
    for (kind, hyper), at in itertools.product(kinds, (1, 4)):
        plan = lm.Plan(kind, lr=0.01, rules=[lm.Rule("body", thaw=2)], **hyper)
        model, optimizer = built(plan)
        train(model, optimizer, at)
        saved, kept = through_a_file(optimizer.state_dict()), weights(model)
        train(model, optimizer, 3, first=at)
        twin, other = built(plan)
        twin.load_state_dict(kept)
        other.load_state_dict(saved)
        train(twin, other, 3, first=at)
        assert same(weights(model), weights(twin)), (kind, at)


def test_adamw_under_a_plan_continues_from_torchs_named_state():
    model, twin = mlp(), mlp()
    torchs = torch.optim.AdamW(model.named_parameters(), lr=0.05)
    for step in range(3):
        torchs.zero_grad()
        backward(model, step)
        torchs.step()
    optimizer = lm.Plan(lm.AdamW, lr=0.05).build(twin)
    twin.load_state_dict(model.state_dict())
    optimizer.load_state_dict(torchs.state_dict())
    torchs.zero_grad()
    backward(model, 3)
    torchs.step()
    train(twin, optimizer, 1, first=3)
    torch.testing.assert_close(weights(twin), weights(model), rtol=1e-12, atol=1e-15)
