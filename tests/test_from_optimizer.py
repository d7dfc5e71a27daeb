"""Groups and schedulers written by hand, read back into plans: the same values for everything."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.optim import lr_scheduler

import lamina as lm
import test_recipes


def bert():
    return test_recipes.bert()


def resnet():
    """A small ResNet with torchvision's names."""

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.conv1 = nn.Conv2d(width, width, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(width)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
            self.layer1 = nn.Sequential(Block(4), Block(4))
            self.layer2 = nn.Sequential(Block(4), Block(4))
            self.fc = nn.Linear(4, 10)

    return Net()


def gpt():
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=3, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def split(model, test):
    named = dict(model.named_parameters())
    return (
        [p for n, p in named.items() if test(n, p)],
        [p for n, p in named.items() if not test(n, p)],
    )


def one_group(model):
    return model.parameters()


def transformers_groups(model):
    none = ("bias", "LayerNorm.weight")
    rest, decayed = split(model, lambda n, p: any(word in n for word in none))
    return [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def timm_groups(model):
    rest, decayed = split(model, lambda n, p: p.ndim <= 1 or n.endswith(".bias"))
    return [{"params": rest, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.05}]


def nanogpt_groups(model):
    decayed, rest = split(model, lambda n, p: p.dim() >= 2)
    return [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def detectron_groups(model):
    """A group for each parameter: norms without decay, biases at twice the rate."""
    norms = {
        id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()
    }
    groups = []
    for name, param in model.named_parameters():
        group = {"params": [param], "lr": 1e-3, "weight_decay": 1e-4}
        if id(param) in norms:
            group["weight_decay"] = 0.0
        if name.endswith("bias") and id(param) not in norms:
            group |= {"lr": 2e-3, "weight_decay": 0.0}
        groups.append(group)
    return groups


def head_faster(model):
    head, body = split(model, lambda n, p: n.startswith(("classifier", "fc", "lm_head")))
    return (
        [{"params": body, "lr": 1e-5}, {"params": head, "lr": 1e-3}]
        if head
        else [{"params": body, "lr": 1e-5}]
    )


def head_only(model):
    return split(model, lambda n, p: n.startswith(("classifier", "fc", "transformer.ln_f")))[0]


def by_layer(model):
    """A rate for each layer, as in ELECTRA, without decay on what has one dimension."""
    groups = []
    for name, param in model.named_parameters():
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        power = 3 - numbers[0] if numbers else 0
        decay = 0.0 if param.ndim < 2 else 0.01
        groups.append({"params": [param], "lr": 1e-3 * 0.8**power, "weight_decay": decay})
    return groups


def alternating(model):
    """What nobody would write: every second parameter."""
    params = list(model.parameters())
    return [{"params": params[::2], "lr": 1e-3}, {"params": params[1::2], "lr": 1e-4}]


def nanochat_groups(model):
    """Embeddings, head and matrices at rates of their own."""
    named = dict(model.named_parameters())
    embeddings = [p for n, p in named.items() if "wte" in n or "embeddings" in n]
    known = {id(p) for p in embeddings}
    matrices = [p for p in named.values() if p.ndim >= 2 and id(p) not in known]
    rest = [p for p in named.values() if p.ndim < 2 and id(p) not in known]
    parts = [(embeddings, 0.2), (matrices, 0.02), (rest, 0.004)]
    return [{"params": params, "lr": lr, "betas": (0.8, 0.95)} for params, lr in parts if params]


LAYOUTS = [
    one_group,
    transformers_groups,
    timm_groups,
    nanogpt_groups,
    detectron_groups,
    head_faster,
    head_only,
    by_layer,
    alternating,
    nanochat_groups,
]
IGNORED = ("params", "name", "clock", "overrides", "feedback", "guest")


@pytest.mark.parametrize("make", [bert, resnet, gpt])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_the_plan_gives_what_the_groups_give(make, layout, kind):
    model = make()
    groups = layout(model)
    if kind is torch.optim.SGD and layout is nanochat_groups:
        groups = [{k: v for k, v in group.items() if k != "betas"} for group in groups]
    given = kind(groups, lr=1e-3)
    plan = lm.Plan.from_optimizer(model, given)
    assert plan.optimizer is getattr(lm, kind.__name__)
    assert lm.Plan.from_toml(plan.to_toml()) == plan
    expected = {id(p): group for group in given.param_groups for p in group["params"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lm.LaminaWarning)
        built = plan.build(model, steps=10)
    active = built.active
    seen = set()
    for group in built.param_groups:
        for param in group["params"]:
            assert active[group["name"]] == (id(param) in expected)
            if id(param) in expected:
                seen.add(id(param))
                for key, value in expected[id(param)].items():
                    if key in group and key not in IGNORED:
                        assert group[key] == value, key
    assert seen == expected.keys()


def test_patterns_are_short():
    model = bert()
    plan = lm.Plan.from_optimizer(model, torch.optim.AdamW(timm_groups(model), lr=1e-3))
    decays = {rule.label: dict(rule.settings) for rule in plan.rules}
    assert decays in (
        {"ndim<2": {"weight_decay": 0.0}},
        {"ndim>=2": {"weight_decay": 0.05}},
    )
    plan = lm.Plan.from_optimizer(model, torch.optim.AdamW(head_faster(model), lr=1e-3))
    assert [(rule.label, dict(rule.settings)) for rule in plan.rules] == [
        ("classifier.*", {"lr": 1e-3})
    ]
    plan = lm.Plan.from_optimizer(model, torch.optim.AdamW(head_only(model), lr=1e-3))
    assert [(rule.label, dict(rule.settings)) for rule in plan.rules] == [
        ("bert.*", {"frozen": True})
    ]


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5),
    "multi_step": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 5], gamma=0.5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.25, total_iters=4),
    "linear up": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "linear down": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, total_iters=4),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8, power=2.0),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=20),
    "transformers linear": lambda o: transformers.get_linear_schedule_with_warmup(o, 4, 20),
    "transformers cosine": lambda o: transformers.get_cosine_schedule_with_warmup(o, 4, 20),
    "transformers constant": lambda o: transformers.get_constant_schedule_with_warmup(o, 4),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("done", [0, 3])
def test_known_schedulers(name, done):
    model = bert()
    optimizer = torch.optim.SGD(head_faster(model), lr=1e-3)
    scheduler = SCHEDULERS[name](optimizer)
    courses = []
    for step in range(20):
        if step == done:
            plan = lm.Plan.from_optimizer(model, optimizer, scheduler)
        courses.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert lm.Plan.from_toml(plan.to_toml()) == plan
    built = plan.build(model, steps=20)
    places = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
    for step in range(20):
        values = lm.values_at(built.resolved, step)
        for index, group in enumerate(built.param_groups):
            wanted = courses[step][places[id(group["params"][0])]]
            assert values.lr(index) == pytest.approx(wanted, rel=1e-12, abs=1e-15), (name, step)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-3, cycle_momentum=False), "the CyclicLR"),
        (lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0), "the LambdaLR, whose function"),
        (lambda o: lr_scheduler.CosineAnnealingLR(o, 10, eta_min=1e-6), "whose eta_min"),
        (lambda o: lr_scheduler.LinearLR(o, 0.3, 0.5), "neither of which is 1"),
    ],
)
def test_what_cannot_be_expressed_is_said(make, words):
    model = bert()
    optimizer = torch.optim.SGD(head_faster(model), lr=1e-3)
    with pytest.warns(lm.LaminaWarning, match=words):
        plan = lm.Plan.from_optimizer(model, optimizer, make(optimizer))
    assert "schedule" not in dict(plan.settings)


def test_bad_input():
    model = bert()
    with pytest.raises(lm.PlanError, match="2 tensors that are no parameters of this model"):
        lm.Plan.from_optimizer(model, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    with pytest.raises(lm.PlanError, match="expected an optimizer"):
        lm.Plan.from_optimizer(model, lm.Plan("SGD", lr=0.1))
