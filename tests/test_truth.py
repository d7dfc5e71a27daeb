"""What is previewed is what is applied: values recovered from the change of the weights alone."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import lamina as lm
from lamina.resolve.timeline import Values
from models import described, encoder
from oracle import SHAPES, Meaning
from plans import RUNS, fits, plain_plans, to_plan

#: plans made at random give findings of all kinds, and go on beyond their end: both are told
pytestmark = pytest.mark.filterwarnings("ignore::lamina.LaminaWarning")
BEYOND = 3  # steps taken past the planned end, where schedules hold
LAYERS = st.sampled_from([(0, 1), (0, 2, 5), (0, 1, 2, 3)])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors: handing them to threads costs more than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trees(plain):
    """Every schedule in a plan."""
    tables = [plain["settings"], *(rule["settings"] for rule in plain["rules"])]
    for value in (value for table in tables for value in table.values()):
        found = value[1] if isinstance(value, tuple) and value[0] == "times" else value
        if isinstance(found, tuple) and found[0] in SHAPES:
            yield found


def taken(optimizer, model, gradient, weight):
    """Weights after one step from `weight` with `gradient` everywhere, and what was applied."""
    applied_to = {}
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(weight)
            param.grad = torch.full_like(param, gradient)
    optimizer.step()
    for group in optimizer.param_groups:
        applied_to |= dict.fromkeys(group["param_names"], optimizer.applied[group["name"]])
    return {name: param.detach() for name, param in model.named_parameters()}, applied_to


def uniform(weight):
    """The one number that all elements have."""
    first, *others = weight.flatten().tolist()
    assert all(other == first for other in others)
    return first


def near(found, expected, tolerance=1e-12):
    return abs(found - expected) <= tolerance * max(abs(expected), 1e-3)


def assert_truth(plain, layers, run, change=None):
    """The three accounts of every step agree: the weights, the preview, and the oracle."""
    model, twin = encoder(layers), encoder(layers)
    plan, params = to_plan(plain), described(model)
    meaning = Meaning(plain, params, run)
    preview = plan.preview(model, **run)
    optimizer, decayed = plan.build(model, **run), plan.build(twin, **run)
    if change is not None:
        change(optimizer)
    squares = {name: float(param.numel()) for name, param in model.named_parameters()}

    def place(*numbers):
        return f"{name} at step {step}: {numbers} in {plain}"

    for step in range(run["steps"] + BEYOND):
        previewed = preview.at(step)
        flags = {name: param.requires_grad for name, param in model.named_parameters()}
        moved, applied = taken(optimizer, model, gradient=1.0, weight=0.0)
        shrunk, _ = taken(decayed, twin, gradient=0.0, weight=1.0)
        factors = meaning.clip_factors(step, squares)
        for name in moved:
            announced = previewed[preview.resolved.cells[preview.resolved.cell_of[name]].name]
            lr, decay = meaning.lr(name, step), meaning.hyper(name, "weight_decay", step)
            assert applied[name] == announced, place()
            assert flags[name] == meaning.trains(name, step), place()
            assert near(announced["lr"], lr), place(announced["lr"], lr)
            assert near(announced["weight_decay"], decay), place()
            recovered = -uniform(moved[name])
            assert near(recovered, lr * factors[name]), place(recovered, lr, factors[name])
            if factors[name] == 1.0:
                assert recovered == announced["lr"], place()
            product = 1.0 - uniform(shrunk[name])
            assert near(product, lr * decay), place(product, lr * decay)
            if not meaning.trains(name, step):
                assert recovered == 0.0, place()
                assert product == 0.0, place()


@given(plain_plans(), LAYERS, st.sampled_from(RUNS))
def test_previewed_values_are_applied(plain, layers, run):
    assume(all(fits(tree, run) for tree in trees(plain)))
    assert_truth(plain, layers, run)


PLAIN = {
    "settings": {
        "lr": 0.5,
        "weight_decay": ("linear", 0.1, 0.5, None),
        "schedule": (">>", [("warmup", "10%", 0.0), ("cosine", None, 0.01, None)]),
    },
    "rules": [
        {
            "match": "encoder.layer.{depth}.*",
            "settings": {"lr": ("by_depth", 0.9), "thaw": ("top_down", "0.4 epochs", None)},
        },
        {"match": "embeddings", "settings": {"frozen": True}},
        {"match": "classifier.*", "settings": {"lr": 1.0, "clip_norm": 0.5, "freeze": "90%"}},
        {"match": "*.bias | type:LayerNorm", "settings": {"weight_decay": 0}},
    ],
}


def test_the_plan_of_the_readme_is_true():
    assert_truth(PLAIN, (0, 2, 5), RUNS[1])


SEVERAL = {
    "settings": {"lr": 0.5, "weight_decay": 0.1, "schedule": ("linear", None, 0.2, None)},
    "rules": [
        {
            "match": "encoder",
            "settings": {
                "thaw": ["0.4 epochs", "1.6 epochs"],
                "freeze": ["1 epochs"],
                "rewarm": ("warmup", 3, 0.25),
                "clip_norm": 0.5,
            },
        },
        {"match": "classifier", "settings": {"freeze": [4, "80%"], "thaw": ["50%"]}},
    ],
}


def test_several_windows_in_one_rule_are_true():
    assert_truth(SEVERAL, (0, 1), RUNS[1])


def test_canary_a_rewarmup_that_does_not_restart_is_found(monkeypatch):
    def from_the_first_thaw(self, cell):
        return float(cell.rewarm(max(0.0, self._step - self._feedback.windows(cell)[0][0])))

    monkeypatch.setattr(Values, "_rewarm", from_the_first_thaw)
    with pytest.raises(AssertionError):
        assert_truth(SEVERAL, (0, 1), RUNS[1])


def test_a_model_frozen_by_its_user_stays_frozen():
    model = encoder((0, 1))
    model.embeddings.requires_grad_(False)
    with pytest.warns(lm.LaminaWarning, match="frozen-by-model"):
        optimizer = lm.Plan("SGD", lr=0.5).build(model)
    before = model.embeddings.weight.detach().clone()
    model.embeddings.weight.grad = grad = torch.ones_like(before)
    optimizer.step()
    assert torch.equal(model.embeddings.weight, before)
    assert model.embeddings.weight.grad is grad  # it may be another optimizer's


def afterwards(optimizer, fault):
    """Let a fault change every parameter after each step."""
    inner = optimizer.step

    def step():
        inner()
        for group in optimizer.param_groups:
            for param in group["params"]:
                fault(param.detach())

    optimizer.step = step


def scaled(optimizer):
    """As if every lr were a little larger than announced."""
    afterwards(optimizer, lambda weight: weight.mul_(1 + 1e-9))


def leaky(optimizer):
    """As if something small reached the frozen weights too."""
    afterwards(optimizer, lambda weight: weight.sub_(1e-300))


def late(optimizer):
    """The values of each step are those of the next one."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = None
    optimizer.step()


@pytest.mark.parametrize("fault", [scaled, late, leaky])
def test_canary_a_fault_is_found(fault):
    with pytest.raises(AssertionError):
        assert_truth(PLAIN, (0, 2, 5), RUNS[1], change=fault)


@pytest.mark.parametrize("shift", ["lr", "weight_decay"])
def test_canary_another_plan_is_found(shift, monkeypatch):
    hyper = Meaning.hyper
    monkeypatch.setattr(
        Meaning,
        "hyper",
        lambda self, name, key, step: hyper(self, name, key, step) * (1 + 1e-9 * (key == shift)),
    )
    with pytest.raises(AssertionError):
        assert_truth(PLAIN, (0, 2, 5), RUNS[1])


FROZEN_LATER = [
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    ("Adam", {"weight_decay": 0.1}),
    ("AdamW", {"weight_decay": 0.1}),
    ("RMSprop", {"momentum": 0.9, "weight_decay": 0.1}),
]


@pytest.mark.parametrize(("optimizer", "hyper"), FROZEN_LATER)
def test_frozen_weights_are_bit_identical_and_hold_no_state(optimizer, hyper):
    model = encoder((0, 1))
    rules = [
        lm.Rule("embeddings", frozen=True),
        lm.Rule("encoder.layer.0", thaw=2),
        lm.Rule("classifier", freeze=2),
    ]
    made = lm.Plan(optimizer, lr=0.1, rules=rules, **hyper).build(model, steps=4)
    trains = {"embeddings": (), "encoder.layer.0": (2, 3), "classifier": (0, 1)}
    for step in range(4):
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        made.step()
        for name, param in model.named_parameters():
            part = next((part for part in trains if name.startswith(part)), None)
            moves = part is None or step in trains[part]
            assert torch.equal(param, before[name]) == (not moves), (name, step)
            if part != "classifier" and not moves:
                assert set(made.state[param]) <= {"step"}
                assert float(made.state[param]["step"]) == 0.0
