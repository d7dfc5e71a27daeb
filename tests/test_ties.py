"""Ties: made, listed, undone; trained as torch trains them; kept through save, copy and compile."""

import copy
import logging

import pytest
import torch
from torch import nn

import lamina as lm
from lamina.errors import PlanError
from lamina.model.ties import tie, ties, untie
from models import Tied, Wrapper, same, weights


class LanguageModel(nn.Module):
    """Embedding, a layer, output weights: to be tied."""

    def __init__(self, tokens=7, width=4):
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.layer = nn.Linear(width, width)
        self.out = nn.Linear(width, tokens, bias=False)

    def forward(self, tokens):
        return self.out(torch.tanh(self.layer(self.embed(tokens))))


class Translator(nn.Module):
    """Source embedding, target embedding and output weights."""

    def __init__(self, tokens=6, width=4):
        super().__init__()
        self.source = nn.Embedding(tokens, width)
        self.target = nn.Embedding(tokens, width)
        self.body = nn.Transformer(width, 2, 1, 1, 8, dropout=0.0, batch_first=True)
        self.generator = nn.Linear(width, tokens, bias=False)

    def forward(self, tokens):
        return self.generator(self.body(self.source(tokens), self.target(tokens.flip(0))))


class TwoTasks(nn.Module):
    """One base module in two heads."""

    def __init__(self, width=3):
        super().__init__()
        base = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.first = nn.Sequential(base, nn.Linear(width, 2))
        self.second = nn.Sequential(base, nn.Linear(width, 1))

    def forward(self, x):
        return self.first(x).square().sum() + self.second(x).sum()


def built(cls, pairs=None, seed=0):
    torch.manual_seed(seed)
    model = cls().double()
    if pairs:
        tie(model, pairs)
    return model


LM = {"out.weight": "embed.weight"}
THREE = {"target.weight": "source.weight", "generator.weight": "source.weight"}
CASES = {
    "language model": (LanguageModel, LM),
    "three-way": (Translator, THREE),
    "two tasks": (TwoTasks, None),
    "tied in the class": (Tied, None),
}


def data(cls, step):
    generator = torch.Generator().manual_seed(step)
    if cls in (LanguageModel, Translator):
        return torch.randint(6, (3, 5), generator=generator)
    return torch.randn(4, 3, generator=generator, dtype=torch.float64)


def step_of(model, optimizer, step):
    optimizer.zero_grad()
    model(data(type(getattr(model, "_orig_mod", model)), step)).square().mean().backward()
    optimizer.step()


# --------------------------------------------------------------------------------- the functions


def test_tie_makes_one_parameter():
    model = built(LanguageModel, LM)
    assert model.out.weight is model.embed.weight
    assert ties(model) == (("embed.weight", "out.weight"),)
    assert ties(model)[0].kind == "parameter"


def test_a_chain_ends_at_one_parameter():
    model = built(
        Translator, {"generator.weight": "target.weight", "target.weight": "source.weight"}
    )
    assert model.generator.weight is model.source.weight
    assert ties(model) == (("source.weight", "target.weight", "generator.weight"),)


def test_what_is_tied_moves_along():
    model = built(Translator, {"generator.weight": "target.weight"})
    tie(model, {"generator.weight": "source.weight"})
    assert model.target.weight is model.source.weight is model.generator.weight


def test_tying_what_is_tied_changes_nothing():
    model = built(LanguageModel, LM)
    before = model.embed.weight
    tie(model, {"out.weight": "embed.weight", "embed.weight": "embed.weight"})
    assert model.out.weight is before


def test_recurrent_layers_use_the_tied_weights():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.LSTM(3, 3, bias=False), nn.LSTM(3, 3, bias=False)])
    tie(model, {"1.weight_ih_l0": "0.weight_ih_l0", "1.weight_hh_l0": "0.weight_hh_l0"})
    x = torch.randn(2, 1, 3)
    assert torch.equal(model[0](x)[0], model[1](x)[0])


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"out.wieght": "embed.weight"}, r"no parameter 'out.wieght'.*mean 'out.weight'"),
        ({"out.weight": "embedd.weight"}, r"no parameter 'embedd.weight'.*'embed.weight'"),
        ({"out": "embed.weight"}, r"'out' is a module; name its parameters, such as 'out.weight'"),
        ({"out.weight": "layer.weight"}, r"'out.weight' has shape \(7, 4\), but.*\(4, 4\)"),
        ({"layer.bias": "layer.weight"}, r"'layer.bias' has shape \(4,\)"),
        ({"out.weight": "embed.weight", "embed.weight": "out.weight"}, "circle"),
        (LM | {"layer.bias": "nothing"}, "no parameter 'nothing'"),
    ],
)
def test_bad_pairs_name_themselves_and_change_nothing(pairs, message):
    model = built(LanguageModel)
    before = dict(model.named_parameters())
    with pytest.raises(PlanError, match=message):
        tie(model, pairs)
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)


def test_two_ends_for_one_parameter_are_refused():
    model = built(Translator, {"generator.weight": "target.weight"})
    model.extra = nn.Embedding(6, 4).double()
    with pytest.raises(PlanError, match=r"is to become both 'extra.weight' and 'source.weight'"):
        tie(model, {"generator.weight": "source.weight", "target.weight": "extra.weight"})
    assert model.generator.weight is not model.source.weight


def test_other_dtypes_and_devices_are_refused():
    model = built(LanguageModel)
    model.out.half()
    with pytest.raises(
        PlanError, match=r"dtype torch.float16, but 'embed.weight' has torch.float64"
    ):
        tie(model, LM)
    model.out.double().to("meta")
    with pytest.raises(PlanError, match=r"device meta, but 'embed.weight' has cpu"):
        tie(model, LM)


def test_a_transposed_pair_says_what_to_do():
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False))
    with pytest.raises(PlanError, match=r"transposed.*`0\.weight\.T`"):
        tie(model, {"1.weight": "0.weight"})


def test_a_wrapped_model_is_refused():
    class DistributedDataParallel(Wrapper):
        pass

    model = DistributedDataParallel(built(LanguageModel))
    with pytest.raises(PlanError, match="already wrapped in DistributedDataParallel"):
        tie(model, LM)
    with pytest.raises(PlanError, match="before"):
        untie(model, "out.weight")


def test_untie_gives_a_copy_of_its_own():
    model = built(Translator, THREE)
    model(data(Translator, 0)).sum().backward()
    untie(model, "generator.weight")
    assert ties(model) == (("source.weight", "target.weight"),)
    assert torch.equal(model.generator.weight, model.source.weight)
    assert model.generator.weight.grad is None
    assert isinstance(model.generator.weight, nn.Parameter)
    with pytest.raises(PlanError, match=r"'generator.weight' is not tied.*source.weight = target"):
        untie(model, "generator.weight")
    with pytest.raises(PlanError, match="is a module"):
        untie(model, "generator")


def test_a_shared_module_is_listed_and_cannot_be_untied():
    model = built(TwoTasks)
    assert ties(model)[0] == ("first.0.0.weight", "second.0.0.weight")
    assert {item.kind for item in ties(model)} == {"module"}
    assert repr(ties(model)[1]) == "<module: first.0.0.bias = second.0.0.bias>"
    with pytest.raises(PlanError, match=r"one module used in several places.*copy.deepcopy"):
        untie(model, "second.0.0.weight")


# ----------------------------------------------------------------------------- views, transposed


def test_views_and_transposed_are_listed_and_refused_with_a_fix():
    model = built(LanguageModel)
    model.out.weight = nn.Parameter(model.embed.weight.detach())
    model.turned = nn.Linear(7, 4, bias=False)
    model.turned.weight = nn.Parameter(model.layer.weight.detach().T)
    assert [(tuple(item), item.kind) for item in ties(model)] == [
        (("embed.weight", "out.weight"), "view"),
        (("layer.weight", "turned.weight"), "transposed"),
    ]
    with pytest.raises(PlanError, match=r"lamina.tie\(model, \{'out.weight': 'embed.weight'\}\)"):
        lm.resolve_plan(lm.Plan("SGD", lr=0.1), model)
    tie(model, {"out.weight": "embed.weight"})
    assert ties(model)[0].kind == "parameter"


def test_a_view_of_another_shape_says_to_compute_with_it():
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach().T)
    with pytest.raises(PlanError, match=r"shapes \(2, 3\) and \(3, 2\) differ.*`0\.weight\.T`"):
        lm.resolve_plan(lm.Plan("SGD", lr=0.1), model)
    assert ties(model)[0].kind == "transposed"


def test_overlaps_inside_a_large_span_are_all_found():
    whole = torch.randn(30)
    model = nn.ParameterDict({"all": nn.Parameter(whole)})
    model["low"], model["high"] = nn.Parameter(whole[:5]), nn.Parameter(whole[20:])
    assert {tuple(item) for item in ties(model)} == {("all", "low"), ("all", "high")}


class Fused(nn.Module):
    """Three Parameters over the columns of one tensor, or with memory of their own."""

    def __init__(self, apart=False):
        super().__init__()
        whole = torch.randn(4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        parts = whole.chunk(3, dim=1)
        parts = [part.clone() for part in parts] if apart else parts
        self.q, self.k, self.v = map(nn.Parameter, parts)

    def forward(self, x):
        return (x @ self.q) * torch.tanh(x @ self.k) + x @ self.v


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_parameters_on_disjoint_columns_train_as_if_they_were_apart(optimizer):
    model, other = Fused(), Fused(apart=True)
    assert ties(model) == ()
    both = [
        (m, lm.Plan(optimizer, lr=0.1, weight_decay=0.1, clip_norm=1.0).build(m))
        for m in (model, other)
    ]
    for step in range(3):
        for each, its in both:
            its.zero_grad()
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step)).double()
            each(x).square().mean().backward()
            its.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-14, atol=1e-14)
    assert both[0][1].check(model) == ()


def two(one, other):
    return nn.ParameterDict({"a": nn.Parameter(one), "b": nn.Parameter(other)})


WHOLE = torch.arange(30.0)
SQUARE = WHOLE[:9].view(3, 3)
LAYOUTS = {
    "transposed": (lambda: two(SQUARE, SQUARE.T), "transposed", "One is the other transposed"),
    "shifted": (lambda: two(WHOLE[:5], WHOLE[2:7]), "view", "begin at different elements"),
    "strided": (lambda: two(WHOLE[0:5], WHOLE[0:10:2]), "view", "have other strides"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_views_in_another_layout_are_not_to_be_tied(case):
    make, kind, why = LAYOUTS[case]
    model = make()
    assert [(tuple(item), item.kind) for item in ties(model)] == [(("a", "b"), kind)]
    with pytest.raises(PlanError, match=f"{why}.*keep one over all of it") as told:
        lm.resolve_plan(lm.Plan("SGD", lr=0.1), model)
    assert "lamina.tie" not in str(told.value)
    before = dict(model.items())
    for pairs in ({"b": "a"}, {"a": "b"}):
        with pytest.raises(PlanError, match=f"in different ways.*nothing was tied. {why}|{why}"):
            tie(model, pairs)
    assert all(model[name] is param for name, param in before.items())


@pytest.mark.parametrize("pairs", ["0.weight", ["a", "b"], None, 3])
def test_tie_wants_a_dict_of_names(pairs):
    with pytest.raises(PlanError, match=r"tie was given .*expected a dict of names"):
        tie(two(WHOLE[:2], WHOLE[5:7]), pairs)


def test_names_are_texts():
    model = two(WHOLE[:2], WHOLE[5:7])
    for call in (
        lambda: untie(model, 3),
        lambda: tie(model, {3: "a"}),
        lambda: tie(model, {"a": 3}),
    ):
        with pytest.raises(PlanError, match="3 was given for the name of a parameter"):
            call()


# --------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_tie_trains_as_in_torch_once_a_step(case, optimizer):
    cls, pairs = CASES[case]
    ours, theirs = built(cls, pairs), built(cls, pairs)
    settings = {"lr": 0.05, "weight_decay": 0.1}
    # A large eps, because gradients that are zero but for rounding must not become whole updates.
    settings |= {"momentum": 0.9} if optimizer == "SGD" else {"eps": 1e-3}
    a = lm.Plan(optimizer, **settings).build(ours)
    b = getattr(torch.optim, optimizer)(theirs.parameters(), **settings)
    for step in range(5):
        step_of(ours, a, step)
        step_of(theirs, b, step)
    for (name, one), (_, other) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=name)
    assert all(float(a.state[p]["step"]) == 5 for p in ours.parameters())
    assert len(ties(ours)) == len(ties(theirs)) > 0
    assert a.check(ours, after=1) == ()


@pytest.mark.parametrize("case", CASES)
def test_saved_and_loaded_it_is_still_tied_and_goes_on_alike(case, tmp_path):
    cls, pairs = CASES[case]
    plan = lm.Plan("AdamW", lr=0.01)
    model = built(cls, pairs)
    optimizer = plan.build(model)
    for step in range(3):
        step_of(model, optimizer, step)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "all.pt")
    again = built(cls, pairs, seed=1)
    resumed = plan.build(again)
    states = torch.load(tmp_path / "all.pt", weights_only=True)
    again.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    assert ties(again) == ties(model)
    for step in range(3, 6):
        step_of(model, optimizer, step)
        step_of(again, resumed, step)
    assert same(weights(model), weights(again))
    assert resumed.check(again, after=1) == ()


def test_copy_and_compile_keep_the_tie():
    model = built(LanguageModel, LM)
    twin = copy.deepcopy(model)
    assert ties(twin) == ties(model)
    compiled = torch.compile(twin, backend="eager")
    plan = lm.Plan("SGD", lr=0.1, momentum=0.9)
    a, b = plan.build(model), plan.build(compiled)
    for step in range(3):
        step_of(model, a, step)
        step_of(compiled, b, step)
    assert same(weights(model), weights(twin))
    assert ties(compiled) == (("embed.weight", "out.weight"),)
    assert b.check(compiled, after=1) == ()


# ------------------------------------------------------------------------ M13, M14, torch's traps


def test_a_tensor_given_twice_is_updated_once():
    model = built(Tied)
    optimizer = lm.Plan("SGD", lr=0.1).build(model)
    (group,) = optimizer.param_groups
    assert len({id(p) for p in group["params"]}) == len(group["params"]) == 3
    before = model.encoder.weight.detach().clone()
    model(data(Tied, 0)).sum().backward()
    # torch's optimizer over the one tensor, with the same gradient, is the twin: a fused operator
    # rounds once where `before - 0.1 * gradient` rounds twice, so written-out arithmetic differs
    # in the last bit on processors with FMA.
    twin = before.clone().requires_grad_(True)
    twin.grad = model.encoder.weight.grad.clone()
    torch.optim.SGD([twin], lr=0.1, fused=True).step()
    optimizer.step()
    torch.testing.assert_close(model.encoder.weight, twin, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(model.encoder.weight, before - 0.2 * twin.grad)  # not twice


def test_a_tie_over_two_rules_lies_in_one_group():
    model = built(Tied)
    rules = [lm.Rule("encoder.*", lr=0.1), lm.Rule("decoder.*", weight_decay=0.5)]
    optimizer = lm.Plan("SGD", lr=1.0, rules=rules).build(model)
    holding = [
        g for g in optimizer.param_groups if any(p is model.encoder.weight for p in g["params"])
    ]
    assert len(holding) == 1
    assert (holding[0]["lr"], holding[0]["weight_decay"]) == (0.1, 0.5)


def test_a_tie_that_broke_is_told_at_load(caplog):
    model = built(LanguageModel, LM)
    optimizer = lm.Plan("SGD", lr=0.1).build(model)
    saved = optimizer.state_dict()
    model.out = copy.deepcopy(model.out)
    with caplog.at_level(logging.WARNING, logger="lamina"):
        optimizer.load_state_dict(saved)
    assert "embed.weight = out.weight is broken" in caplog.text
    assert "lamina.tie(model, {'out.weight': 'embed.weight'})" in caplog.text


def test_an_intact_tie_says_nothing_at_load(caplog):
    model = built(LanguageModel, LM)
    optimizer = lm.Plan("SGD", lr=0.1).build(model)
    with caplog.at_level(logging.WARNING, logger="lamina"):
        optimizer.load_state_dict(optimizer.state_dict())
    assert caplog.text == ""
