"""Groups and schedulers written by hand, read back into plans: the same values for everything."""

from __future__ import annotations

import copy
import inspect
import warnings

import accelerate
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


def test_every_optimizer_of_torch_with_values_of_its_own():
    """What is no default is kept: two steps of the plan are two of the optimizer."""
    other = {"decoupled_weight_decay": True, "maximize": True, "nesterov": True, "centered": True}
    other |= {"amsgrad": True, "weight_decay": 0.1, "momentum": 0.7, "eps": 1e-3}
    other |= {"rho": 0.8, "lr_decay": 0.1, "initial_accumulator_value": 0.2, "alpha": 0.8, "t0": 1}
    other |= {"etas": (0.4, 1.3), "betas": (0.7, 0.8), "momentum_decay": 0.01, "ns_steps": 3}
    for kind in (getattr(torch.optim, name) for name in sorted(torch.optim.__all__)):
        if not isinstance(kind, type) or kind in (torch.optim.Optimizer, torch.optim.SparseAdam):
            continue
        known = inspect.signature(kind).parameters
        given = {key: value for key, value in other.items() if key in known}
        if kind.__name__ in ("Muon", "Adafactor"):
            given.pop("eps", None)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
        copies = copy.deepcopy(model)
        optimizer = kind(copies.parameters(), lr=0.01, **given)
        plan = lm.Plan.from_optimizer(copies, optimizer)
        ours = (
            lm.Plan.from_toml(plan.to_toml()) if plan.optimizer.__module__[:5] != "torch" else plan
        )
        ours = ours.build(model, steps=2)
        for net, each in ((model, ours), (copies, optimizer)):
            for step in range(2):
                data = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).double()

                def closure(net=net, each=each, data=data):
                    each.zero_grad()
                    loss = net(data).square().mean()
                    loss.backward()
                    return loss

                closure()
                each.step(closure) if kind is torch.optim.LBFGS else each.step()
        atol = 1e-3 if kind.__name__ == "Muon" else 1e-8  # inside Muon it is bfloat16
        for mine, theirs in zip(model.parameters(), copies.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, msg=kind.__name__, rtol=0, atol=atol)


def test_bad_input():
    model = bert()
    with pytest.raises(lm.PlanError, match="2 tensors that are no parameters of this model"):
        lm.Plan.from_optimizer(model, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    with pytest.raises(lm.PlanError, match="expected an optimizer"):
        lm.Plan.from_optimizer(model, lm.Plan("SGD", lr=0.1))


def leaves_out(words, model, groups, kind=torch.optim.SGD, **settings):
    optimizer = kind(groups, lr=0.1, **settings)
    with pytest.warns(lm.LaminaWarning, match=words):
        return lm.Plan.from_optimizer(model, optimizer)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_what_a_plan_leaves_out_is_said():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first, *rest = model.parameters()
    leaves_out("second update in each step of 0.weight", model, [first, first, *rest])
    groups = [{"params": [first], "lr_scale": 0.5}, {"params": rest}]
    plan = leaves_out("lr_scale in its groups.*give the plan the scheduler", model, groups)
    assert plan == lm.Plan("SGD", lr=0.1)
    groups = [{"params": [first], "layer": 1}, {"params": rest}]
    leaves_out("layer in its groups, which its step does not read", model, groups)


class Kept(torch.optim.SGD):
    """An optimizer that keeps settings in itself, where groups do not have them."""

    def __init__(self, params, lr=0.1, warm=0.5, hidden=0.25):
        self.warm, self._hidden = warm, hidden
        super().__init__(params, lr=lr)


def test_settings_that_a_class_keeps_in_itself():
    model = nn.Linear(2, 2)
    plan = leaves_out("hidden, which it keeps where", model, model.parameters(), Kept, warm=0.7)
    assert dict(plan.settings) == {"lr": 0.1, "warm": 0.7}


def test_wrappers_and_plans_given_for_optimizers():
    model = nn.Linear(2, 2)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.StepLR(inner, 3)
    accelerator = accelerate.Accelerator(cpu=True)
    wrapped = accelerator.prepare(inner)
    wrapped_scheduler = accelerator.prepare_scheduler(scheduler)
    plan = lm.Plan("SGD", lr=0.1, schedule=lm.step_decay(3))
    assert lm.Plan.from_optimizer(model, wrapped, wrapped_scheduler) == plan
    with pytest.raises(lm.PlanError, match="carries out a plan already"):
        lm.Plan.from_optimizer(model, plan.build(model, steps=5))


def test_names_that_mean_something_to_patterns():
    names = ["a b", "x|y", "!z", "ndim<2", "re:q", "*", "type:Linear", "(", "{depth}", "a", "[b]"]
    model = nn.Module()
    model.d = nn.ParameterDict({name: torch.zeros(2) for name in names})
    for chosen in (names[::2], names[1::2], ["*"], ["ndim<2"], ["a", "a b"]):
        groups = [
            {"params": [p for n, p in model.d.items() if (n in chosen) is mine], "lr": lr}
            for mine, lr in ((True, 1.0), (False, 2.0))
        ]
        plan = lm.Plan.from_optimizer(model, torch.optim.SGD(groups))
        assert lm.Plan.from_toml(plan.to_toml()) == plan
        resolved = plan.build(model, steps=1).resolved
        rates = {
            info.name.removeprefix("d."): lm.values_at(resolved, 0).lr(index)
            for index, cell in enumerate(resolved.cells)
            for info in cell.parameters
        }
        assert rates == {name: 1.0 if name in chosen else 2.0 for name in names}


def test_patterns_too_long_for_one_rule():
    long = "a_name_as_nobody_would_give_it_to_a_part_of_a_model_but_generated_code_does"
    model = nn.ParameterDict({f"{long}_{long}_{i}": torch.zeros(1) for i in range(300)})
    generator = torch.Generator().manual_seed(0)
    picks = torch.rand(300, generator=generator) < 0.5
    params = list(model.parameters())
    groups = [
        {"params": [p for p, pick in zip(params, picks, strict=True) if pick == mine], "lr": lr}
        for mine, lr in ((True, 1.0), (False, 2.0))
    ]
    given = torch.optim.SGD(groups)
    plan = lm.Plan.from_optimizer(model, given)
    assert len(plan.rules) > 1
    rates = {id(p): group["lr"] for group in given.param_groups for p in group["params"]}
    for group in plan.build(model, steps=1).param_groups:
        assert {rates[id(p)] for p in group["params"]} == {group["lr"]}
