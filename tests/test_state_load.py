"""What a load makes of a state: names, renames, other optimizers, the diff, strict loading."""

import copy

import pytest
import torch
from torch import nn

import lamina as lm
from models import Encoder, encoder, equal, mlp, same, train, weights
from test_state import PLAN, built, tensors, through_a_file

ADAMW = lm.Plan(lm.AdamW, lr=0.05)


def trained(plan=PLAN, steps=6, model=None):
    model, optimizer = built(plan, model)
    train(model, optimizer, steps)
    return model, optimizer


def moved(optimizer, plan, model=None, **how):
    """Another plan's optimizer with this one's state; the report of the load."""
    twin, other = built(plan, model)
    other.load_state_dict(through_a_file(optimizer.state_dict()), **how)
    return twin, other, other.last_load


# ------------------------------------------------------------------------------------- the format


def test_every_group_holds_what_loading_needs_in_plain_values():
    _, optimizer = built()
    for group in through_a_file(optimizer.state_dict())["param_groups"]:
        assert group["format"] == 1
        assert group["run"] == {"steps": 20, "steps_per_epoch": None}
        assert group["planned"] == group["run"]
        assert (group["overrides"], group["feedback"]) == ("[]", "{}")
        assert group["optimizer"] == "AdamW"
        assert len(group["param_names"]) == len(group["param_shapes"]) == len(group["params"])


def test_a_newer_format_names_both_and_the_fix():
    state = copy.deepcopy(built()[1].state_dict())
    state["param_groups"][0]["format"] = 7
    with pytest.raises(lm.StateError, match=r"format 7, but .* up to 1; upgrade lamina"):
        built()[1].load_state_dict(state)


def test_a_state_from_before_the_own_keys_loads_and_the_keys_stay():
    _, optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for key in ("format", "run", "planned", "optimizer", "param_shapes", "overrides"):
            del group[key]
    _, other = built()
    keys = [set(group) for group in other.param_groups]
    other.load_state_dict(state)
    assert [set(group) for group in other.param_groups] == keys
    assert equal(tensors(other), tensors(optimizer))
    assert other.last_load.saved_run is None
    assert other.clock == 6


# ------------------------------------------------------------------------------- matching by name


def test_modules_in_another_order_keep_their_state():
    torch.manual_seed(0)
    first = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    second = nn.ModuleDict({"b": nn.Linear(3, 3), "a": nn.Linear(3, 3)})
    one, other = ADAMW.build(first), ADAMW.build(second)
    (first["a"](torch.ones(1, 3)).sum() + 9 * first["b"](torch.ones(1, 3)).sum()).backward()
    one.step()
    other.load_state_dict(one.state_dict())
    assert equal(tensors(other), tensors(one))
    assert tensors(other)["a.weight"]["exp_avg"].max() < tensors(other)["b.weight"]["exp_avg"].min()


def test_canary_torch_puts_the_state_on_the_wrong_tensor():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    first = torch.optim.Adam([("a", one.weight), ("b", other.weight)])
    (one.weight.sum() + 9 * other.weight.sum()).backward()
    first.step()
    second = torch.optim.Adam([("b", other.weight), ("a", one.weight)])
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.state[other.weight]["exp_avg"], first.state[one.weight]["exp_avg"])


REGROUPED = [
    lm.Plan(lm.AdamW, lr=0.05),
    lm.Plan(lm.AdamW, lr=0.05, rules=[lm.Rule("*.bias", weight_decay=0)]),
    lm.Plan(lm.AdamW, lr=0.05, rules=[lm.Rule("head", lr=1.0), lm.Rule("body", lr=lm.times(0.1))]),
    lm.Plan(lm.Adam, lr=0.05),
]


@pytest.mark.parametrize("plan", REGROUPED)
def test_new_groups_and_new_rules_keep_every_state(plan):
    _, optimizer = trained()
    _, other, report = moved(optimizer, plan)
    assert equal(tensors(other), tensors(optimizer))
    assert sorted(report.kept) == ["body.bias", "body.weight", "head.bias", "head.weight"]
    assert (report.new, report.restarted, report.dropped) == ((), (), ())


def test_another_optimizer_for_a_part_drops_its_state_and_restarts_it():
    _, optimizer = trained(lm.Plan(lm.SGD, lr=0.1, momentum=0.9))
    plan = lm.Plan(
        lm.SGD, lr=0.1, momentum=0.9, rules=[lm.Rule("head", optimizer=lm.AdamW, lr=0.01)]
    )
    with pytest.warns(lm.LaminaWarning, match="of another optimizer: head.weight, head.bias"):
        twin, other, report = moved(optimizer, plan)
    assert report.restarted == ("head.weight", "head.bias")
    assert report.kept == ("body.weight", "body.bias")
    assert set(other.state[twin.head.weight]) == {"step"}
    assert float(other.state[twin.head.weight]["step"]) == 0
    train(twin, other, 1, first=6)
    assert set(other.state[twin.head.weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert float(other.state[twin.head.weight]["step"]) == 1
    assert float(other.state[twin.body.weight]["step"]) == 7


@pytest.mark.parametrize("kind", [lm.LARS, lm.Muon, lm.RMSprop])
def test_a_momentum_of_another_rule_is_not_taken_for_ones_own(kind):
    model = nn.Sequential(nn.Linear(3, 3, bias=False)).double()
    _, optimizer = built(lm.Plan(lm.SGD, lr=0.1, momentum=0.9), model)
    train(model, optimizer, 2)
    twin = nn.Sequential(nn.Linear(3, 3, bias=False)).double()
    with pytest.warns(lm.LaminaWarning, match="of another optimizer: 0.weight"):
        _, other, report = moved(optimizer, lm.Plan(kind, lr=0.1), twin)
    assert report.restarted == ("0.weight",)
    assert set(other.state[twin[0].weight]) == {"step"}


def test_state_that_another_setting_wants_begins_and_the_rest_stays():
    _, optimizer = trained()
    twin, other, report = moved(optimizer, lm.Plan(lm.AdamW, lr=0.1, amsgrad=True))
    assert report.restarted == ()
    train(twin, other, 1, first=6)
    assert float(other.state[twin.head.weight]["step"]) == 7
    assert "max_exp_avg_sq" in other.state[twin.head.weight]
    back, third, _ = moved(other, PLAN)
    train(back, third, 1, first=7)
    assert float(third.state[back.head.weight]["step"]) == 8


def test_frozen_parts_without_state_are_not_new():
    torchs = encoder()
    trains = [(name, p) for name, p in torchs.named_parameters() if "embeddings" not in name]
    saved = torch.optim.AdamW(trains, lr=0.1)
    plan = lm.Plan(lm.AdamW, lr=0.1, rules=[lm.Rule("embeddings", frozen=True)])
    optimizer = plan.build(encoder())
    optimizer.load_state_dict(saved.state_dict())
    assert "embeddings.weight" not in optimizer.last_load.new
    optimizer = lm.Plan(lm.AdamW, lr=0.1).build(encoder())
    with pytest.warns(lm.LaminaWarning, match="not in the state: embeddings.weight"):
        optimizer.load_state_dict(saved.state_dict())
    assert "embeddings.weight" in optimizer.last_load.new


# -------------------------------------------------------------------------------------- renaming


class Renamed(nn.Module):
    """The parts of `mlp` under other names."""

    def __init__(self, classes=2):
        super().__init__()
        self.backbone = nn.ModuleDict({"first": nn.Linear(3, 4)})
        self.out = nn.Linear(4, classes)

    def forward(self, x):
        return self.out(torch.tanh(self.backbone["first"](x)))


@pytest.mark.parametrize(
    "renamed",
    [
        {"body": "backbone.first", "head": "out"},
        {
            "body.weight": "backbone.first.weight",
            "body.bias": "backbone.first.bias",
            "head": "out",
        },
        {  # the longest name wins
            "body": None,
            "body.weight": "backbone.first.weight",
            "body.bias": "backbone.first.bias",
            "head": "out",
        },
    ],
)
def test_renamed_parts_keep_their_state(renamed):
    _, optimizer = trained(ADAMW)
    _, other, report = moved(optimizer, ADAMW, Renamed().double(), renamed=renamed, strict=True)
    names = {"body": "backbone.first", "head": "out"}
    expected = {}
    for name, entry in tensors(optimizer).items():
        module, _, kind = name.partition(".")
        expected[f"{names[module]}.{kind}"] = entry
    assert equal(tensors(other), expected)
    assert ("head.bias", "out.bias") in report.renamed
    assert report.dropped == report.new == ()
    assert "renamed: body.weight -> backbone.first.weight" in str(report)


def test_a_resized_head_is_an_error_that_names_the_way_around():
    _, optimizer = trained(ADAMW)
    larger = mlp()
    larger.head = nn.Linear(4, 9).double()
    other = ADAMW.build(larger)
    state = through_a_file(optimizer.state_dict())
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(lm.StateError, match=r"\{'head.weight': None\}"):
        other.load_state_dict(state)
    assert equal(other.state_dict(), before)
    other.load_state_dict(state, renamed={"head": None}, strict=True)
    assert other.last_load.kept == ("body.weight", "body.bias")
    assert other.last_load.new == other.last_load.dropped == ("head.weight", "head.bias")


@pytest.mark.parametrize(
    ("renamed", "words"),
    [
        ({"hed": "head"}, "no parameter or module 'hed'. Did you mean 'head'"),
        ({"head": "bodi"}, "no parameter or module 'bodi' that fits 'head'. Did you mean 'body'"),
        ({"head": "body"}, "'body.weight' and 'head.weight' .* are both 'body.weight'"),
        ({"head": 3}, "expected a dict"),
        ("head", "expected a dict"),
    ],
)
def test_renames_that_fit_nothing_are_errors(renamed, words):
    _, optimizer = trained(ADAMW)
    _, other = built(ADAMW)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(lm.StateError, match=words):
        other.load_state_dict(optimizer.state_dict(), renamed=renamed)
    assert equal(other.state_dict(), before)


# --------------------------------------------------------------------------------- diff and strict


def test_the_diff_prints_short_grouped_and_compares_equal():
    _, optimizer = trained()
    state = optimizer.state_dict()
    twins = [built(lm.Plan(lm.AdamW, lr=0.5, betas=(0.8, 0.9)))[1] for _ in range(2)]
    for other in twins:
        other.load_state_dict(state)
    assert twins[0].last_load == twins[1].last_load
    assert hash(twins[0].last_load) == hash(twins[1].last_load)
    rows = {(row.group, row.key, row.now) for row in twins[0].last_load.hyperparameters}
    assert rows == {
        ("default", "betas", (0.8, 0.9)),
        ("default", "lr", 0.5),
        ("default", "weight_decay", 0.01),
    }
    text = str(twins[0].last_load)
    assert text.splitlines()[0] == "4 parameters kept their state, at step 6"
    assert "betas of 'default': (0.9, 0.999) -> (0.8, 0.9)" in text
    counts = [(r.key, r.parameters) for r in twins[0].last_load.hyperparameters if r.key != "lr"]
    assert counts == [("betas", 4), ("weight_decay", 1)]


def test_long_lists_are_cut_with_a_count():
    small, large = Encoder(layers=(0,)), Encoder(layers=range(9))
    other = ADAMW.build(large)
    with pytest.warns(lm.LaminaWarning, match="and 29 more"):
        other.load_state_dict(ADAMW.build(small).state_dict())
    assert len(other.last_load.new) == 32
    assert "new: encoder.layer.1.dense.weight, " in str(other.last_load)
    assert "and 29 more" in str(other.last_load)
    assert max(map(len, str(other.last_load).splitlines())) < 200


def test_strict_refuses_every_unexpected_row_about_state():
    _, optimizer = trained(ADAMW)
    state = optimizer.state_dict()
    another = nn.ModuleDict({"body": nn.Linear(3, 4), "new": nn.Linear(1, 1)}).double()
    for plan, model, words in [
        (ADAMW, another, "new.weight, new.bias.*head.weight, head.bias"),
        (lm.Plan(lm.SGD, lr=0.1), mlp(), "another optimizer: body.weight"),
    ]:
        other = plan.build(model)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(lm.StateError, match=words):
            other.load_state_dict(state, strict=True)
        assert equal(other.state_dict(), before)
        assert other.last_load is None
        with pytest.warns(lm.LaminaWarning, match=words):
            other.load_state_dict(state)
    _, same_parts = built(lm.Plan(lm.AdamW, lr=0.3))
    same_parts.load_state_dict(state, strict=True)  # hyperparameters are the plan's
    assert [row.key for row in same_parts.last_load.hyperparameters] == ["lr"]


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize(
    "plan",
    [PLAN, *(lm.Plan(each, lr=0.1) for each in (lm.SGD, torch.optim.Adagrad, torch.optim.NAdam))],
)
def test_its_own_state_is_expected_in_every_row(plan, steps):
    _, optimizer = trained(plan, steps)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict(), strict=True)
    report = optimizer.last_load
    assert equal(optimizer.state_dict(), before)
    assert (report.new, report.dropped, report.hyperparameters, report.jumps) == ((), (), (), ())
    assert str(report) == f"4 parameters kept their state, at step {steps}"


# ----------------------------------------------------------------------------- L-BFGS and guests


def closure_for(model, optimizer, step):
    def closure():
        optimizer.zero_grad()
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        loss = (model(x) - x[:, :2].sin()).square().mean()
        loss.backward()
        return loss

    return closure


def test_lbfgs_resumes_exactly_and_forgets_a_memory_of_another_order():
    plan = lm.Plan(lm.LBFGS, lr=0.5, max_iter=3, rules=[lm.Rule("head", lr=0.25)])
    model, optimizer = built(plan)
    for step in range(3):
        optimizer.step(closure_for(model, optimizer, step))
    twin, other, report = moved(optimizer, plan)
    twin.load_state_dict(model.state_dict())
    assert len(report.kept) == 4
    for each, its in ((model, optimizer), (twin, other)):
        its.step(closure_for(each, its, 3))
    assert same(weights(model), weights(twin))
    regrouped = lm.Plan(lm.LBFGS, lr=0.5, max_iter=3, rules=[lm.Rule("*.bias", lr=0.25)])
    with pytest.warns(lm.LaminaWarning, match="of another optimizer"):
        twin, third, report = moved(optimizer, regrouped)
    assert len(report.restarted) == 4
    third.step(closure_for(twin, third, 4))
    assert third.clock == 5


GUESTS = [
    (torch.optim.Adagrad, 0.1),
    (torch.optim.NAdam, 0.01),
    (torch.optim.ASGD, 0.01),
    ("prodigyopt.Prodigy", 1.0),
    ("schedulefree.AdamWScheduleFree", 0.01),
    ("lion_pytorch.Lion", 0.001),
]


@pytest.mark.parametrize(("kind", "lr"), GUESTS)
def test_guests_resume_exactly_with_what_they_keep_in_their_groups(kind, lr):
    if isinstance(kind, str):
        package, name = kind.split(".")
        kind = getattr(pytest.importorskip(package), name)
    plan = lm.Plan(kind, lr=lr, rules=[lm.Rule("body", thaw=3)])
    model, optimizer = built(plan)
    optimizer.train()
    train(model, optimizer, 2)
    state, kept = through_a_file(optimizer.state_dict()), weights(model)
    train(model, optimizer, 5, first=2)
    twin, other = built(plan)
    twin.load_state_dict(kept)
    other.load_state_dict(state, strict=True)
    train(twin, other, 5, first=2)
    assert same(weights(model), weights(twin))


def test_a_guest_and_lamina_exchange_the_state_of_the_same_algorithm():
    model, optimizer = trained(lm.Plan(torch.optim.AdamW, lr=0.01))
    twin, other, report = moved(optimizer, lm.Plan(lm.AdamW, lr=0.01))
    assert len(report.kept) == 4
    twin.load_state_dict(model.state_dict())
    for each, its in ((model, optimizer), (twin, other)):
        train(each, its, 2, first=6)
    torch.testing.assert_close(weights(twin), weights(model), rtol=1e-9, atol=1e-12)
    frozen = lm.Plan(torch.optim.AdamW, lr=0.01, rules=[lm.Rule("body", thaw=9)])
    _, fresh = built(lm.Plan(lm.AdamW, lr=0.01, rules=[lm.Rule("body", thaw=9)]))
    twin, guest, _ = moved(fresh, frozen)
    train(twin, guest, 12)
    assert guest.clock == 12


def test_a_guest_of_another_kind_begins_anew():
    _, optimizer = trained(lm.Plan(torch.optim.NAdam, lr=0.01))
    with pytest.warns(lm.LaminaWarning, match="of another optimizer"):
        twin, other, report = moved(optimizer, lm.Plan(torch.optim.Adagrad, lr=0.01))
    assert len(report.restarted) == 4
    train(twin, other, 2, first=6)
    assert other.clock == 8


def test_a_momentum_that_begins_with_an_override_is_not_missed():
    model, optimizer = trained(lm.Plan(lm.SGD, lr=0.1), 2)
    optimizer.override(momentum=0.9)
    optimizer.load_state_dict(optimizer.state_dict(), strict=True)
    later = lm.Plan(lm.SGD, lr=0.1, momentum=lm.linear(0.0, to=0.9))
    model, optimizer = trained(later, 1)
    optimizer.load_state_dict(optimizer.state_dict(), strict=True)
    train(model, optimizer, 2, first=1)
    assert optimizer.clock == 3


@pytest.mark.parametrize("kind", [lm.LARS, lm.SGD, lm.RMSprop])
@pytest.mark.parametrize(("before", "now"), [(0.0, 0.0), (0.0, 0.9), (0.9, 0.0), (0.9, 0.9)])
def test_a_momentum_may_come_and_go_with_the_plan(kind, before, now):
    _, optimizer = trained(lm.Plan(kind, lr=0.01, momentum=before), 2)
    optimizer.load_state_dict(optimizer.state_dict(), strict=True)
    twin, other, report = moved(optimizer, lm.Plan(kind, lr=0.01, momentum=now), strict=True)
    assert len(report.kept) == 4
    train(twin, other, 2, first=2)
    assert all(float(entry["step"]) == 4 for entry in tensors(other).values())


def test_the_declared_buffers_are_those_that_arise():
    """Each algorithm is run with everything on; what it then keeps is what it declares."""
    kinds = {
        lm.SGD: {"momentum": 0.9},
        lm.Adam: {"amsgrad": True},
        lm.AdamW: {"amsgrad": True},
        lm.RMSprop: {"centered": True, "momentum": 0.9},
        lm.LARS: {"momentum": 0.9},
        lm.LAMB: {},
        lm.LayerAdaptiveAdam: {"amsgrad": True},
        lm.Muon: {},
    }
    for kind, hyper in kinds.items():
        model = nn.Sequential(nn.Linear(3, 3, bias=False)).double()
        optimizer = lm.Plan(kind, lr=0.01, **hyper).build(model)
        train(model, optimizer, 2)
        (entry,) = optimizer.state.values()
        assert set(entry) == {"step", *kind.algorithm.buffers}, kind  # type: ignore[attr-defined]
