"""Every fix that a message proposes works: the proposal is taken from the message and applied."""

# ruff: noqa: E501

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lamina as lm
from lamina import optim
from models import Encoder, Tied, encoder, mlp

PACKAGE = Path(lm.__file__).parent


class Wrapped(nn.Module):
    """An encoder under a prefix, as in Transformers, with a BatchNorm and a convolution."""

    def __init__(self):
        super().__init__()
        self.bert = Encoder()
        self.bn = nn.BatchNorm1d(3)
        self.conv = nn.Conv2d(3, 4, 3)


class TwoDepths(nn.Module):
    """Two numbered layers that are one tensor."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
        self.layers[1].weight = self.layers[0].weight


class Complex(nn.Module):
    """A complex matrix beside a bias."""

    def __init__(self):
        super().__init__()
        self.phase = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
        self.bias = nn.Parameter(torch.ones(2))


def build(plan, model=None, **length):
    return plan.build(model or Wrapped(), **(length or {"steps": 10}))


def rules(*given, optimizer="AdamW", model=None):
    return build(lm.Plan(optimizer, lr=0.1, rules=list(given)), model)


def rule(match, optimizer="AdamW", model=None, **settings):
    """A rule that is not at odds with the rest of a plan."""
    return rules(lm.Rule(match, **(settings or {"lr": 0.01})), optimizer=optimizer, model=model)


def plan(optimizer="AdamW", lr=0.1, model=None, length=None, **settings):
    return build(lm.Plan(optimizer, lr=lr, **settings), model, **(length or {"steps": 10}))


def resumed(optimizer, **settings):
    """An optimizer of another plan that goes on from a state."""
    state = optimizer.state_dict()
    return lm.Plan("AdamW", lr=0.1, **settings).build(Wrapped(), steps=10, resume=state)


def parameter():
    return nn.Parameter(torch.ones(2, 2))


#: what the code of the rows may name
NAMES = {
    **{name: getattr(lm, name) for name in lm.__all__},
    "lamina": lm,
    "lm": lm,
    "optim": optim,
    "torch": torch,
    "nn": nn,
    "Wrapped": Wrapped,
    "TwoDepths": TwoDepths,
    "Complex": Complex,
    "Tied": Tied,
    "mlp": mlp,
    "encoder": encoder,
    "build": build,
    "rules": rules,
    "rule": rule,
    "plan": plan,
    "resumed": resumed,
    "parameter": parameter,
    "loader": [1, 2, 3],
    "warmup": lm.warmup,
}

#: a mistake, what its message proposes, and the code with the proposal in the place of {}
PATTERNS = [
    ("rule('encoder.layer.{depth}.*')", "'*.encoder.layer.{depth}.*'", "rule({})"),
    ("rule('classifier')", "'*.classifier.*'", "rule({})"),
    ("rule('encoder.* & ndim==2')", "'*.encoder.* & ndim==2'", "rule({})"),
    ("rule('!embeddings & encoder.*')", "'!*.embeddings.* & *.encoder.*'", "rule({})"),
    ("rule('encoder | type:LayerNormal')", "'encoder | type:LayerNorm'", "rule({})"),
    ("rule('model.bert.encoder.*')", "'bert.encoder.*'", "rule({})"),
    ("rule('Bert.Encoder.*')", "'bert.encoder.*'", "rule({})"),
    ("rule('bert.encodr.layers.*')", "'bert.encoder.layer.*'", "rule({})"),
    ("rule('bias')", "'*.bias'", "rule({})"),
    ("rule('type:Batchnorm1d')", "'type:BatchNorm1d'", "rule({})"),
    ("rule('type:nn.layernorm')", "'type:LayerNorm'", "rule({})"),
    ("rule('type:Conv2D')", "'type:Conv2d'", "rule({})"),
    ("rule('LayerNorm')", "'type:LayerNorm'", "rule({})"),
    ("rule('type: LayerNorm')", "'type:LayerNorm'", "rule({})"),
    (r"rule(r'bert\.encoder\.layer\.\d+\..*')", r"'re:bert\\.encoder\\.layer\\.\\d+\\..*'", "rule({})"),
    (r"rule('^bert.encoder.*$')", "'re:^bert.encoder.*$'", "rule({})"),
    (r"rule('.*(weight|bias)$')", "'re:.*(weight|bias)$'", "rule({})"),
    ("rule('re:encoder')", "'re:.*(?:encoder).*'", "rule({})"),
    ("rule('*.bias, *.weight')", "'*.bias | *.weight'", "rule({})"),
    ("rule('*.bias or bn.*')", "'*.bias | bn.*'", "rule({})"),
    ("rule('not *.bias')", "'!*.bias'", "rule({})"),
    ("rule('~*.bias')", "'!*.bias'", "rule({})"),
    ("rule('ndim=1')", "'ndim==1'", "rule({})"),
    ("rule('dim<2')", "'ndim<2'", "rule({})"),
    ("rule('bert.encoder.layer.{i}.*')", "'bert.encoder.layer.{depth}.*'", "rule({})"),
    ("rule(['*.bias', 'bn.*'])", "'*.bias | bn.*'", "rule({})"),
    ("rule(nn.LayerNorm)", "'type:LayerNorm'", "rule({})"),
    (
        "Rule('bert.encoder.layer.{i}.*', lr=by_depth(0.9))",
        "'bert.encoder.layer.{depth}.*'",
        "rule({}, lr=by_depth(0.9))",
    ),
    ("freeze(Wrapped(), 'encoder.*')", "'*.encoder.*'", "freeze(Wrapped(), {})"),
    ("lm.clip_grad_norm_(Wrapped(), {'head': 1, 'conv2': 1})", "", "None"),
    ("lm.clip_grad_norm_(Wrapped(), {'encoder': 1.0})", "'*.encoder.*'", "lm.clip_grad_norm_(Wrapped(), {{{}: 1.0}})"),
    ("rules(Rule('bert', lr=1)).override(lr=0.5, rule='Bert')", "'bert'", "rules(Rule('bert', lr=1)).override(lr=0.5, rule={})"),
    ("rule('layers.{depth}', lr=by_depth(0.5), model=TwoDepths())", "'& !layers.0.weight'", None),
    ("plan(optimizer='Muon')", "lamina.Rule('ndim<2', optimizer=lamina.AdamW, lr=1e-3)", "rules({}, optimizer='Muon')"),
    (
        "plan(optimizer='Muon', model=Complex())",
        "lamina.Rule('ndim<2 | phase', optimizer=lamina.AdamW, lr=1e-3)",
        "rules({}, optimizer='Muon', model=Complex())",
    ),
    ("plan().explain('bert.classifer.weight')", "bert.classifier.weight", "plan().explain('{}')"),
    ("plan().explain('bert.classifier')", "bert.classifier.weight", "plan().explain('{}')"),
]  # fmt: skip

SETTINGS = [
    ("plan(wd=0.1)", "weight_decay=0.1", "plan({})"),
    ("plan(l2=0.1)", "weight_decay=0.1", "plan({})"),
    ("plan(beta1=0.8)", "betas=(0.8, 0.999)", "plan({})"),
    ("plan(beta_2=0.99)", "betas=(0.9, 0.99)", "plan({})"),
    ("plan(betas1=(0.8, 0.99))", "betas=(0.8, 0.99)", "plan({})"),
    ("plan(momentum=0.8)", "betas=(0.8, 0.999)", "plan({})"),
    ("plan('SGD', betas=(0.8, 0.99))", "momentum=0.8", "plan('SGD', {})"),
    ("plan('SGD', mom=0.8)", "momentum=0.8", "plan('SGD', {})"),
    ("plan(epsilon=1e-6)", "eps=1e-06", "plan({})"),
    ("plan(weigth_decay=0.1)", "'weight_decay'", "plan(**{{{}: 0.1}})"),
    ("build(Plan('AdamW', learning_rate=0.1))", "lr=0.1", "build(Plan('AdamW', {}))"),
    ("plan(max_grad_norm=1.0)", "clip_norm=1.0", "plan({})"),
    ("plan(gradient_clip_val=1.0)", "clip_norm=1.0", "plan({})"),
    ("plan(clip_value=1.0)", "gradients=lamina.clip_value(1.0)", "plan({})"),
    ("plan(scheduler=cosine())", "schedule=lamina.cosine()", "plan({})"),
    (
        "plan(lr_scheduler=warmup(5) >> cosine())",
        "schedule=lamina.warmup(5) >> lamina.cosine()",
        "plan({})",
    ),
    ("plan(warmup=5)", "schedule=lamina.warmup(5)", "plan({})"),
    ("rule('bn', requires_grad=False)", "frozen=True", "rule('bn', {})"),
    ("rule('bn', trainable=True)", "frozen=False", "rule('bn', {})"),
    ("rule('bn', unfreeze=5)", "thaw=5", "rule('bn', {})"),
    ("rule('bn', lr_mult=0.1)", "lr=lamina.times(0.1)", "rule('bn', {})"),
    (
        "rule('bert.encoder.layer.{depth}', layer_decay=0.9)",
        "lr=lamina.by_depth(0.9)",
        "rule('bert.encoder.layer.{{depth}}', {})",
    ),
    (
        "plan(early_stopping=early_stop('x'))",
        "lamina.Plan(..., stop=lamina.early_stop('x'))",
        "plan(stop=lamina.early_stop('x'))",
    ),
    ("rule('bn', stop=early_stop('x'))", "Plan(..., stop=...)", "plan(stop=early_stop('x'))"),
    ("plan(rule=[Rule('bn', lr=1)])", "rules=[lamina.Rule('bn', lr=1)]", "plan({})"),
    ("plan().override(wd=0.1)", "weight_decay=0.1", "plan().override({})"),
    ("plan().override()", "lr=1e-4", "plan().override({})"),
    ("plan('Adam').override(amsgrad=True)", "resume=", "resumed(plan(), amsgrad=True)"),
    (
        "plan('LBFGS', rules=[Rule('bn', lr=0.5)]).override(tolerance_grad=1e-5, rule='bn')",
        "leave out rule=",
        "plan('LBFGS', rules=[Rule('bn', lr=0.5)]).override(tolerance_grad=1e-5)",
    ),
    ("plan().override(lr=0.1, rule='bn')", "", "rules(Rule('bn', lr=1)).override(lr=1, rule='bn')"),
    ("Rule('bn')", "lr=1e-3", "rule('bn', {})"),
    ("Rule('bn', optimizer='SGD')", "lr=", "rule('bn', optimizer='SGD', {}0.1)"),
    ("plan('adamw')", "'AdamW'", "plan({})"),
    ("plan('torch.optim.AdamW')", "'AdamW'", "plan({})"),
    ("plan(lm.AdamW([parameter()]))", "lamina.AdamW", "plan({})"),
    ("plan('Lion')", "can be passed itself", "plan(torch.optim.NAdam)"),
    ("plan(nonfinite='ignore')", "'skip'", "plan(nonfinite={}, clip_norm=1)"),
    ("plan(nonfinite_check='every')", "'all'", "plan(nonfinite_check={})"),
]
RULES = [
    ("plan(rules=Rule('bn', lr=1))", "rules=[Rule('bn', lr=1)]", "plan({})"),
    ("plan(rules=None)", "rules=[]", "plan({})"),
    ("plan(rules={'bn': {'lr': 1}})", "rules=[lamina.Rule('bn', lr=1)]", "plan({})"),
    ("plan(rules=[{'match': 'bn', 'lr': 1}])", "lamina.Rule('bn', lr=1)", "rules({})"),
    ("plan(rules='bn')", "rules=[lamina.Rule('head.*', lr=0.1)]", "plan({}, model=mlp())"),
    ("plan(rules=[[Rule('bn', lr=1)]])", "*rules", "rules(*[Rule('bn', lr=1)])"),
]
VALUES = [
    ("1e-4 * by_depth(0.9)", "lr=by_depth(0.9)", "rule('bert.encoder.layer.{{depth}}', {})"),
    ("times(0.9) * 1e-4", "lr=times(0.9)", "rule('bn', {})"),
    ("1e-3 * cosine()", "lr=0.001 and schedule=cosine()", "plan(lr=0.001, schedule=cosine())"),
    ("cosine() * 0.5", "cosine() * constant(0.5)", "plan(schedule={})"),
    ("warmup(5) >> cosine", "cosine(...)", "plan(schedule=warmup(5) >> cosine())"),
    ("plan(schedule=cosine)", "schedule=lamina.cosine()", "plan({})"),
    ("plan(schedule=warmup)", "schedule=lamina.warmup(500)", "plan({}, length={{'steps': 1000}})"),
    ("plan(lr=linear)", "lr=lamina.linear(1.0, 0.0)", "plan(**dict({}))"),
    ("plan(feedback=plateau)", 'feedback=lamina.plateau("val_loss", factor=0.5, patience=2)', "plan({})"),
    ("plan(gradients=clip_norm)", "gradients=lamina.clip_norm(1.0)", "plan({})"),
    (
        "rule('bert.encoder.layer.{depth}', thaw=top_down)",
        'thaw=lamina.top_down(every="0.4 epochs")',
        "build(Plan('SGD', lr=0.1, rules=[Rule('bert.encoder.layer.{{depth}}', {})]), epochs=9, steps_per_epoch=5)",
    ),
    ("plan(stop=early_stop)", "stop=lamina.early_stop('val_loss')", "plan({})"),
    ("plan(stop=plateau('acc'))", "lamina.early_stop('acc')", "plan(stop={})"),
    ("plan(feedback=early_stop('acc'))", "stop=early_stop('acc')", "plan({})"),
    ("plan(feedback=0.5)", "plateau(...), or None", "plan(feedback=None)"),
    ("plan(schedule=plateau('acc'))", "feedback=", "plan({}plateau('acc'))"),
    ("plan(lr=plateau('acc'))", "feedback=plateau('acc')", "plan({})"),
    ("plan(lr=clip_norm(1.0))", "gradients=clip_norm(1.0)", "plan({})"),
    ("plan(clip_norm=clip_norm(1.0))", "gradients=clip_norm(1.0)", "plan({})"),
    ("plan(gradients=1.0)", "clip_norm=1.0", "plan({})"),
    ("plan(gradients=['none'])", "clip_norm(1.0)", "plan(gradients={})"),
    ("plan(schedule=[warmup(5), cosine()])", "warmup(5) >> cosine()", "plan(schedule={})"),
    ("plan(schedule=0.5)", "constant(0.5)", "plan(schedule={})"),
    ("plan(schedule=linear(0.1, 0))", "lr=linear(0.1, 0)", "plan(**dict({}))"),
    ("plan(schedule=cosine(0.01))", "schedule=cosine(to=0.01)", "plan({})"),
    ("plan(lr=cosine())", "schedule=", "plan(lr=0.1, {}cosine())"),
    ("plan(schedule='cosine')", "cosine()", "plan(schedule={})"),
    ("plan(lr=(1e-3,))", "lr=0.001", "plan(**dict({}))"),
    ("plan(lr={'encoder': 0.1})", "Rule('encoder.*', lr=1e-4)", "rules({}, model=encoder())"),
    ("plan(lr=None)", "lr=1e-3", "plan(**dict({}))"),
    ("plan(lr=torch.tensor(0.1))", "float(tensor)", "plan(lr=float(torch.tensor(0.1)))"),
    ("plan(lr=lambda step: 0.9**step)", "lamina.from_function(f)", "plan(lr=lamina.from_function(lambda t: 0.9**t))"),
    ("rule('bn', thaw=True)", "frozen=False", "rule('bn', {})"),
    ("rule('bn', freeze=True)", "frozen=True", "rule('bn', {})"),
    ("rule('bn', thaw=None)", "thaw=500", "rule('bn', thaw=5)"),
    ("rule('bn', thaw=0.5)", "'50%'", "rule('bn', thaw={})"),
    ("rule('bn', thaw=[])", "leave it out", "rule('bn', lr=1)"),
    ("rule('bn', frozen=True, thaw=3)", "frozen=True", "rule('bn', {})"),
    ("rule('bn', clip_norm=0)", "frozen=True", "rule('bn', {})"),
    ("rule('bn', clip_norm=1, gradients=clip_value(1))", "clip_norm(...) into gradients", "rule('bn', gradients=[clip_norm(1), clip_value(1)])"),
    ("rule('bn', clip_norm=cosine())", "give it a start", "rule('bn', clip_norm=cosine(1.0))"),
    ("rule('bn', clip_norm=times(0.5))", "give a number", "rule('bn', clip_norm=0.5)"),
    ("Rule('bn', thaw=on_plateau('x'), freeze=5)", "leave freeze= out", "rule('bn', thaw=on_plateau('x'))"),
    (
        "Rule('a.{depth}', thaw=top_down(2), freeze=[5, 9])",
        "list of times",
        "rule('bn', thaw=[2, 6], freeze=[5, 9])",
    ),
    ("rule('bn', thaw=[2, on_plateau('x')])", "only thaw=", "rule('bn', thaw=on_plateau('x'))"),
    ("rule('bn', thaw=[2, 5])", "freeze= a time between", "rule('bn', thaw=[2, 5], freeze=3)"),
    ("times(linear(0.1, 0))", "no absolute start", "rule('bn', lr=times(linear(to=0)))"),
    ("by_depth(0)", "above 0", "by_depth(0.5)"),
    ("by_depth(0.5, least=0)", "above 0, at most 1", "by_depth(0.5, least=0.01)"),
    ("plateau('val/loss')", "'val_loss'", "plan(feedback=plateau({}))"),
    ("plateau('x', mode='lower')", "'min'", "plan(feedback=plateau('x', mode={}))"),
    ("plateau('x', factor=10)", "less than 1", "plan(feedback=plateau('x', factor=0.1))"),
    ("plateau('x', cooldown=1.5)", "a whole number", "plan(feedback=plateau('x', cooldown=1))"),
    ("plateau('x', patience=2.5)", "'2.5 epochs'", "plateau('x', patience={})"),
    ("early_stop('x', patience=0)", "1 report or more", "plan(stop=early_stop('x', patience=1))"),
    ("plan(feedback=plateau('x')).report()", "report(val_loss=0.31)", "plan(feedback=plateau('val_loss')).{}"),
    ("plan(feedback=plateau('x')).report(x='a')", "expected a number", "plan(feedback=plateau('x')).report(x=1)"),
    ("plan(feedback=plateau('x')).report(x=float('nan'))", "the first bad loss", "plan(feedback=plateau('x')).report(x=1)"),
    ("plan(feedback=plateau('val_loss')).report(loss=1)", "'val_loss'", "plan(feedback=plateau('val_loss')).report(**{{{}: 1}})"),
    ("plan('Adam', amsgrad=linear(0.1, 0))", "give it one value", "plan('Adam', amsgrad=True)"),
    ("plan('LBFGS', frozen_state='drop')", "remove it", "plan('LBFGS')"),
    ("cosine() >> linear(0.1, 0)", "give all phases a start, or none", "plan(schedule=cosine(length=5) >> linear(to=0))"),
    ("plan(schedule=cosine() >> linear(to=0))", "all but one a length", "plan(schedule=cosine(length=5) >> linear(to=0))"),
    ("cosine().sparkline()", "pass steps=", "cosine().sparkline(steps=10)"),
]  # fmt: skip
LENGTHS = [
    ("build(Plan('SGD', lr=1), epochs=3)", "steps_per_epoch=", "build(Plan('SGD', lr=1), epochs=3, {}len(loader))"),
    ("build(Plan('SGD', lr=1), steps=10.0)", "steps=10", "build(Plan('SGD', lr=1), {})"),
    ("build(Plan('SGD', lr=1), epochs=2, steps_per_epoch=loader)", "steps_per_epoch=len(loader)", "build(Plan('SGD', lr=1), epochs=2, {})"),
    ("build(Plan('SGD', lr=1), epochs=2, steps=3)", "pass one", "build(Plan('SGD', lr=1), steps=3)"),
    ("build(Plan('SGD', lr=1), epochs=1e9, steps_per_epoch=10)", "a smaller epochs=", "build(Plan('SGD', lr=1), epochs=1e3, steps_per_epoch=10)"),
    ("Plan('SGD', lr=1, schedule=cosine()).build(Wrapped())", "steps=", "build(Plan('SGD', lr=1, schedule=cosine()), {}10)"),
    ("Plan('SGD', lr=1, schedule=cosine() >> linear(to=0, length=5)).build(Wrapped())", "steps=", "build(Plan('SGD', lr=1, schedule=cosine() >> linear(to=0, length=5)), {}10)"),
    ("Plan('SGD', lr=1, schedule=warmup('5%')).build(Wrapped())", "steps=", "build(Plan('SGD', lr=1, schedule=warmup('5%')), {}10)"),
    ("Plan('SGD', lr=1, schedule=warmup('1 epochs')).build(Wrapped())", "steps_per_epoch=", "build(Plan('SGD', lr=1, schedule=warmup('1 epochs')), {}10)"),
    ("Plan('SGD', lr=1).build(Wrapped)", "Wrapped(...)", "Plan('SGD', lr=1).build(Wrapped())"),
    ("Plan('SGD', lr=1).build(Wrapped().parameters())", "the model itself", "Plan('SGD', lr=1).build(Wrapped())"),
]  # fmt: skip
DROP_IN = [
    ("optim.SGD([parameter()]).add_param_group([parameter()])", "'params'", "optim.SGD([parameter()]).add_param_group({{{}: [parameter()]}})"),
    ("optim.SGD([parameter() * 2])", "pass the original", "optim.SGD([parameter()])"),
    ("optim.SGD([parameter()]).load_state_dict(optim.SGD([parameter(), parameter()]).state_dict())", "the same groups", "optim.SGD([parameter()]).load_state_dict(optim.SGD([parameter()]).state_dict())"),
    ("plan().add_param_group({'params': [parameter()]})", "thaw=", "rule('bn', thaw=5)"),
    ("freeze(Wrapped(), ['*.bias'])", "plain string", "freeze(Wrapped(), '*.bias')"),
]  # fmt: skip
ROWS = [*PATTERNS, *SETTINGS, *RULES, *VALUES, *LENGTHS, *DROP_IN]


def run(code):
    return eval(code, dict(NAMES))  # the rows are code of this file


@pytest.mark.parametrize(("wrong", "proposal", "right"), ROWS, ids=[row[0] for row in ROWS])
def test_what_a_message_proposes_works(wrong, proposal, right):
    with pytest.raises(lm.LaminaError) as caught:
        run(wrong)
    assert proposal in str(caught.value)
    if right is not None:
        run(right.format(proposal))


# --------------------------------------------------------------- what is shown names what matters


def test_explain_and_preview_name_ties():
    model = Tied()
    preview = lm.Plan("SGD", lr=0.1).preview(model, steps=5)
    assert "tied, each updated once: encoder.weight = decoder.weight" in str(preview)
    for name, other in (("encoder.weight", "decoder.weight"), ("decoder.weight", "encoder.weight")):
        told = preview.explain(name)
        assert told.names == ("encoder.weight", "decoder.weight")
        assert f"tied: one parameter with {other}" in str(told)
    assert "tied" not in str(preview.explain("middle.weight"))
    assert "tied" not in str(lm.Plan("SGD", lr=0.1).preview(mlp(), steps=5))


@pytest.mark.parametrize("length", [{"steps": 6}, {"epochs": 2, "steps_per_epoch": 3}])
def test_explain_beyond_the_end_says_so(length):
    optimizer = lm.Plan("SGD", lr=0.1, schedule=lm.linear(to=0.5)).build(mlp(), **length)
    assert "beyond" not in str(optimizer.explain("body.weight", step=5))
    told = optimizer.explain("body.weight", step=6)
    assert told.end == 6
    assert "beyond the end: the run has 6 steps, the last is 5" in str(told)
    unknown = lm.Plan("SGD", lr=0.1).build(mlp()).explain("body.weight", step=10**6)
    assert unknown.end is None


def test_a_regular_expression_that_would_not_end_is_not_tried():
    with pytest.raises(lm.PatternError, match="matches none"):
        rule("re:(x+x+)+y")


@pytest.mark.parametrize(
    "text",
    ["(" * 5000 + ")$" * 5000, "a, " * 20_000, "(a)+ or " * 9000],
    ids=["nested", "commas", "words"],
)
def test_a_hostile_pattern_is_refused_at_once(text):
    with pytest.raises(lm.PatternError, match=r"cannot read the pattern|a pattern of"):
        lm.Rule(text, lr=1)


def test_a_pattern_may_be_given_by_name():
    assert lm.Rule(match="bn.*", lr=1) == lm.Rule("bn.*", lr=1)


# ----------------------------------------------------------------------------------- findings

#: a plan with a finding, the code, what it proposes, and the plan with that (in the place of {})
FINDINGS = [
    ("plan(frozen=True)", "nothing-trains", "frozen=False", "rule('bn', {})"),
    (
        "rule('bn', lr=1, frozen=True)",
        "lr-never-trains",
        "frozen=False",
        "rules(Rule('bn', lr=1, frozen=True), Rule('bn', {}))",
    ),
    ("rule('bn', thaw=10)", "thaw-after-end", "Thaw earlier", "rule('bn', thaw=9)"),
    ("plan(model=by_hand())", "frozen-by-model", "frozen=True", "rule('bn', model=by_hand(), {})"),
    ("rule('bn', lr=0)", "lr-zero", "frozen=True", "rule('bn', {})"),
    (
        "plan(nonfinite_check='norms')",
        "gradients-unchecked",
        "clip_norm=",
        "plan(nonfinite_check='norms', clip_norm=1.0)",
    ),
    (
        "rules(Rule('bn', lr=1), Rule('*', lr=0.5))",
        "rule-without-effect",
        "move it behind them",
        "rules(Rule('*', lr=0.5), Rule('bn', lr=1))",
    ),
    ("plan(lr=1e3)", "suspicious-value", "lr=0.001", "plan(**dict({}))"),
    ("plan(weight_decay=2)", "suspicious-value", "0 to 0.1", "plan(weight_decay=0.1)"),
    ("plan(betas=(0.999, 0.9))", "suspicious-value", "betas=(0.9, 0.999)", "plan({})"),
    ("plan('SGD', momentum=1.5)", "suspicious-value", "momentum=0.9", "plan('SGD', {})"),
    (
        "plan(model=stray())",
        "module-requires-grad",
        "lamina.freeze(model, 'bn')",
        "rule('bn', frozen=True, model=Wrapped())",
    ),
]
#: findings that other tests provoke, each with the test's file
OTHER_FINDINGS = {
    "tie-across-shards": "test_sharded.py",
    "recompile-limit": "test_live_checks.py",
    "reentrant-behind-frozen": "test_live_checks.py",
    "adapters-merged": "test_peft.py",
    "adapters-removed": "test_peft.py",
    "beyond-the-end": "test_monitor.py",
    "another-length": "test_monitor.py",
    "metric-never-reported": "test_monitor.py",
    "step-without-gradient": "test_monitor.py",
    "clipped-elsewhere": "test_monitor.py",
    "updates-round-away": "test_monitor.py",
    "steps-round-to-nothing": "test_low_precision.py",
    "not-registered": "test_live_checks.py",
    "requires-grad-misspelt": "test_live_checks.py",
    "cannot-train": "test_flags.py",
    "rebuilt": "test_flags.py",
    "requires-grad-off": "test_flags.py",
    "requires-grad-on": "test_flags.py",
    "statistics-drift": "test_flags.py",
}


def by_hand():
    model = Wrapped()
    lm.freeze(model, "bn")
    return model


def stray():
    model = Wrapped()
    model.bn.requires_grad = False
    return model


NAMES |= {"by_hand": by_hand, "stray": stray}


@pytest.mark.parametrize(
    ("wrong", "code", "proposal", "right"), FINDINGS, ids=[r[0] for r in FINDINGS]
)
def test_what_a_finding_proposes_ends_it(wrong, code, proposal, right):
    with pytest.warns(lm.LaminaWarning) as told:
        run(wrong)
    (message,) = (str(each.message) for each in told)
    assert message.startswith(f"{code}: ")
    assert proposal in message
    run(right.format(proposal))  # a warning would be an error


def test_every_finding_is_provoked():
    codes = set()
    makers = {
        "model/finding": "Finding",
        "resolve/findings": "Finding",
        "runtime/monitor": "self._tell",
    }
    for module, maker in makers.items():
        for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == maker:
                codes.add(node.args[0].value)  # type: ignore[attr-defined]
    assert codes == {code for _, code, _, _ in FINDINGS} | OTHER_FINDINGS.keys()
    for code, file in OTHER_FINDINGS.items():
        assert code in (Path(__file__).parent / file).read_text()


# ------------------------------------------------------------------- who writes what the plan owns


def stepped(optimizer, model):
    model.bn(torch.ones(2, 3)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.1, total_steps=10, cycle_momentum=False
        ),
        lambda optimizer: optim.lr_scheduler.StepLR(optimizer, 1),
    ],
)
def test_a_scheduler_over_a_plan_is_told_of_the_view(make):
    model = Wrapped()
    optimizer = build(lm.Plan("AdamW", lr=1e-3), model)

    def trainer():
        scheduler = make(optimizer)
        for _ in range(2):
            stepped(optimizer, model)
            scheduler.step()

    with pytest.raises(lm.OwnershipError, match=r"optimizer\.scheduler_view\(\)"):
        trainer()
    view = build(lm.Plan("AdamW", lr=1e-3), model := Wrapped()).scheduler_view()
    for _ in range(2):
        stepped(view.optimizer, model)
        view.step()
    assert view.get_last_lr() == [1e-3]


def test_a_value_that_is_written_by_hand_is_told_of_the_override():
    model = Wrapped()
    optimizer = build(lm.Plan("AdamW", lr=1e-3, rules=[lm.Rule("bn", lr=0.01)]), model)
    optimizer.param_groups[1]["lr"] = 0.5
    with pytest.raises(lm.OwnershipError) as caught:
        stepped(optimizer, model)
    call = re.search(r"optimizer\.override\(.*?\)", str(caught.value))[0]
    eval(call, {"optimizer": optimizer})
    stepped(optimizer, model)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.5]


# -------------------------------------------------------------------- keys that no optimizer reads


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("weigth_decay", 0.1, {"weight_decay": 0.1}),
        ("wd", 0.1, {"weight_decay": 0.1}),
        ("beta1", 0.8, {"betas": (0.8, 0.999)}),
        ("learning_rate", 0.5, {"lr": 0.5}),
        ("lr_scale", 0.5, {"lr": 0.05}),
        ("lr_mult", 0.5, {"lr": 0.05}),
    ],
)
def test_a_group_key_that_nothing_reads_is_told_once(key, value, fix):
    groups = [{"params": [parameter()], "lr": 0.1, key: value} for _ in range(3)]
    with pytest.warns(lm.LaminaWarning) as told:
        optim.AdamW(groups)
    (message,) = (str(each.message) for each in told)
    assert f"nothing reads the key {key!r}" in message
    assert repr(next(iter(fix))) in message
    told_of = re.search(r"Write ('.*?): (.*)\.$|learning rate: ('lr'): (.*)\.$", message)
    if told_of:
        written = ": ".join(part for part in told_of.groups() if part)
        assert eval(f"{{{written}}}") == fix
    optim.AdamW([{"params": [parameter()], **fix}])


@pytest.mark.parametrize("key", ["name", "initial_lr", "max_lr", "swa_lr", "_mine", "fused"])
def test_group_keys_that_others_read_are_not_told(key):
    value = None if key == "fused" else 0.1
    optimizer = optim.AdamW([{"params": [parameter()], key: value}])  # a warning would be an error
    assert optimizer.param_groups[0][key] == value


# ------------------------------------------------------------ no message without a tried proposal

#: the modules whose errors propose something of a plan or of the drop-in tier
MODULES = (
    *("algorithms/registry", "model/freeze", "model/parameters", "model/patterns"),
    *("model/suggestions", "optim/base", "optimizer/optimizer", "plan/operators", "plan/plan"),
    *("plan/reactions", "plan/validate", "resolve/cascade", "resolve/explain", "resolve/resolve"),
    *("resolve/windows", "runtime/overrides", "runtime/ownership", "runtime/reports"),
    *("schedules/base", "schedules/duration"),
)
#: a call, an argument, or a verb that asks for something
PROPOSES = re.compile(
    r"(?<![\w.])[A-Za-z_][\w.]*\(|(?<![\w{\[])[a-z_]\w*=(?![=\s{])"
    r"|\b(?:[Ww]rite|[Cc]all|[Pp]ass|[Gg]ive|[Bb]uild|[Uu]se)\b"
)
#: `raise` statements that other tests provoke, each with the test's file and words of the message
ELSEWHERE = {
    "test_low_precision.py": ("along one vector",),
    "test_optim_errors.py": ("differentiable=True",),
    "test_optim_interface.py": ("capturable=True",),
    "test_guests.py": ("has no default for",),
    "test_hostile_texts.py": ("which begins", "takes too long"),
    "test_guest_conformance.py": ("which the plan does not set", "wraps another", " first"),
    "test_state_matching.py": ("is for a saved state",),
}


def proposing(tree):
    """The `raise` statements whose message proposes something, as ranges of lines."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Raise) or node.exc is None:
            continue
        parts = (each.value for each in ast.walk(node.exc) if isinstance(each, ast.Constant))
        text = "".join(part for part in parts if isinstance(part, str))
        if PROPOSES.search(text):
            yield node.lineno, node.end_lineno, text


def provoked(code):
    """The file and line of the `raise` that a mistake ends in, and of those that it came from."""
    found = set()
    try:
        run(code)
    except lm.LaminaError as error:
        cause = error
        while cause is not None:
            trace = cause.__traceback__
            while trace.tb_next is not None:
                trace = trace.tb_next
            found.add((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
            cause = cause.__cause__
    return found


def untried(module, tree, places, elsewhere):
    """The messages of a module that propose something no test tries."""
    path = str(PACKAGE / f"{module}.py")
    return [
        f"{module}.py:{first}: {text}"
        for first, last, text in proposing(tree)
        if not any(file == path and first <= line <= last for file, line in places)
        and not any(words in text for words in elsewhere)
    ]


def test_every_proposal_of_an_error_is_tried():
    places = set().union(*(provoked(wrong) for wrong, _, _ in ROWS))
    elsewhere = [words for known in ELSEWHERE.values() for words in known]
    missing = []
    for module in MODULES:
        tree = ast.parse((PACKAGE / f"{module}.py").read_text())
        missing += untried(module, tree, places, elsewhere)
    assert missing == []


def test_what_is_tried_elsewhere_is_there():
    for file, known in ELSEWHERE.items():
        text = (Path(__file__).parent / file).read_text()
        assert [words for words in known if words not in text] == []


def test_canary_an_untried_proposal_is_found():
    tree = ast.parse('def f():\n    raise PlanError(f"{x}: use frozen=True")\n')
    assert len(untried("plan", tree, set(), ())) == 1
    assert untried("plan", tree, {(str(PACKAGE / "plan.py"), 2)}, ()) == []
    assert untried("plan", tree, set(), ("use frozen",)) == []
