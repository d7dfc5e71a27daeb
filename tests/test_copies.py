"""Copies of a model under a plan are free; what its owner froze keeps the behaviour it had."""

import copy
import io
import pickle
import types

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import lamina as lm

#: the findings on models that are frozen as the tests need it, which the build warns of
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{code}")
    for code in ("frozen-by-model", "cannot-train", "nothing-trains", "statistics-drift")
]

LOCKED = {"0", "0.0", "0.1", "0.2"}


def net():
    """A body with BatchNorm and dropout, and a head."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    return nn.Sequential(body, nn.Linear(4, 2))


def plan(**rule):
    return lm.Plan("SGD", lr=0.1, rules=[lm.Rule("0.*", **rule)])


def resting(model):
    return {name for name, module in model.named_modules() if not module.training}


def batches(number=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, generator=generator) * 2 + 1 for _ in range(number)]


def step(model, optimizer, number=1):
    for x in batches(number):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "AveragedModel": lambda model: AveragedModel(model).module,
    "with a memo": lambda model: copy.deepcopy({"model": model}, {})["model"],
    "of parts": lambda model: nn.Sequential(*map(copy.deepcopy, model)),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_in_the_mode_that_was_asked_for_and_follows(kind):
    model = net()
    optimizer = plan(thaw=3).build(model, steps=9)
    assert resting(model.train()) == LOCKED
    twin = COPIES[kind](model)
    assert resting(twin) == set()
    assert resting(twin.eval()) == {"", *LOCKED, "1"}
    assert resting(twin.train()) == set()
    assert not {"train", "__getstate__", "reset_running_stats"} & set(vars(twin[0][1]))
    assert resting(COPIES[kind](model.eval())) >= {*LOCKED, "1"}
    assert resting(model.train()) == LOCKED  # which the copies do not touch
    step(model, optimizer, 3)
    assert resting(model) == set()


def test_a_shallow_copy_is_free_too():
    model = net()
    plan(frozen=True).build(model)
    twin = copy.copy(model[0][1])
    assert twin.training
    assert not twin.eval().training
    assert twin.train().training
    assert not model[0][1].training
    assert copy.copy(model)[0] is model[0]  # shares the modules, which are locked


def disabled(self, mode=True):
    return self


def test_a_copy_has_the_train_that_the_instance_had():
    model = net()
    model[0][1].eval()
    model[0][1].train = types.MethodType(disabled, model[0][1])
    plan(frozen=True).build(model)
    twin = copy.deepcopy(model)
    assert resting(twin.train()) == {"0.1"}
    assert twin[0][1].train.__func__ is disabled
    assert twin[0][1].train.__self__ is twin[0][1]


class Own(nn.Module):
    """With slots and a state of its own, as some libraries have."""

    __slots__ = ("tag",)

    def __init__(self):
        super().__init__()
        self.dense, self.cache, self.tag = nn.Linear(3, 3), object(), "t"

    def __getstate__(self):
        return {key: value for key, value in vars(self).items() if key != "cache"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.cache, self.tag = None, "again"


def test_a_copy_of_a_module_with_a_state_of_its_own():
    model = nn.Sequential(Own(), nn.Linear(3, 2))
    plan(frozen=True).build(model)
    twin = copy.deepcopy(model)
    assert twin[0].cache is None
    assert twin[0].tag == "again"
    assert resting(twin) == set()
    assert resting(model) == {"0", "0.dense"}


def test_a_traced_module_copies_its_attributes_itself():
    model = nn.Sequential(torch.fx.symbolic_trace(net()[0]), nn.Linear(4, 2))
    plan(frozen=True).build(model)
    twin = copy.deepcopy(model)
    assert resting(twin.eval()) >= LOCKED
    assert resting(twin.train()) == set()
    assert resting(model.train()) >= {"0"}


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("kind", ["deepcopy", "pickle", "torch.save"])
def test_a_model_copied_with_its_optimizer_is_locked_by_the_copy(kind, order):
    model = net()
    optimizer = plan(thaw=3).build(model, steps=9)
    step(model, optimizer)
    pair = (model, optimizer) if order == "model first" else (optimizer, model)
    pair = COPIES[kind](pair)
    twin, its = pair if order == "model first" else pair[::-1]
    assert resting(twin.train()) == LOCKED
    optimizer.release()
    assert resting(twin.train()) == LOCKED
    assert resting(model) == set()
    step(twin, its, 2)
    assert resting(twin) == set()
    its.release()


def test_a_model_that_holds_its_own_optimizer_is_locked_in_a_copy():
    model = net()
    model.optimizer = plan(thaw=3).build(model, steps=9)
    twin = copy.deepcopy(model)
    assert resting(twin.train()) == LOCKED
    step(twin, twin.optimizer, 3)
    assert resting(twin) == set()
    assert resting(model.train()) == LOCKED


# ----------------------------------------------------------------------------------- averaging


def want_statistics(model, data):
    """The mean over batches of what goes into the BatchNorm, as torch's update_bn counts it."""
    first = model[0][0]
    with torch.no_grad():
        return torch.stack([first(x).mean(0) for x in data]).mean(0)


@pytest.mark.parametrize(
    "rule", [{"thaw": 3}, {"freeze": 2}, {"frozen": True}, {"thaw": [1, 5], "freeze": 3}]
)
@pytest.mark.parametrize("average", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}])
def test_statistics_of_an_average_are_torchs(rule, average):
    model = net()
    optimizer = plan(**rule).build(model, steps=6)
    averaged = AveragedModel(model, **average)
    for x in batches(6):
        model.train()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
    assert averaged.module[0].training
    update_bn(batches(), averaged)
    norm = averaged.module[0][1]
    torch.testing.assert_close(norm.running_mean, want_statistics(averaged.module, batches()))
    assert int(norm.num_batches_tracked) == 4


def test_update_bn_on_the_model_itself_leaves_frozen_statistics():
    model = net()
    step(model.train(), lm.Plan("SGD", lr=0.1).build(copy.deepcopy(model)))
    model(batches(1)[0])
    plan(frozen=True).build(model)
    before = copy.deepcopy(model[0][1].state_dict())
    update_bn(batches(), model)
    assert all(torch.equal(v, before[k]) for k, v in model[0][1].state_dict().items())
    assert resting(model) == LOCKED


class Ema:
    """As timm keeps it: a copy in eval mode, without gradients, a step behind."""

    def __init__(self, model, decay=0.9):
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model):
        theirs = model.state_dict()
        for name, value in self.module.state_dict().items():
            if value.is_floating_point():
                value.lerp_(theirs[name], 1 - self.decay)


def test_an_ema_made_while_a_part_is_frozen_can_be_trained_later():
    model = net()
    optimizer = plan(thaw=2).build(model, steps=6)
    ema = Ema(model)
    for _ in range(3):
        step(model, optimizer)
        ema.update(model)
    twin = ema.module
    assert resting(twin) == {"", *LOCKED, "1"}
    twin.requires_grad_(True).train()
    own = lm.Plan("SGD", lr=0.1).build(twin, steps=3)
    before = int(twin[0][1].num_batches_tracked)
    step(twin, own)
    assert int(twin[0][1].num_batches_tracked) == before + 1
    own.release()
    assert resting(twin) == set()


def test_a_compiled_copy_follows():
    model = net()
    plan(frozen=True).build(model)
    twin = torch.compile(copy.deepcopy(model), backend="eager").train()  # type: ignore[attr-defined]
    before = int(model[0][1].num_batches_tracked)
    twin(batches(1)[0])
    twin.eval()
    twin(batches(1)[0])
    (norm,) = (module for module in twin.modules() if isinstance(module, nn.BatchNorm1d))
    assert int(norm.num_batches_tracked) == before + 1
    whole = copy.deepcopy(torch.compile(model, backend="eager"))
    assert resting(whole.train()) == set()  # type: ignore[attr-defined]


def test_a_run_goes_on_in_a_frozen_span_with_a_model_that_was_saved_whole():
    model = net()
    optimizer = plan(thaw=3).build(model, steps=9)
    step(model, optimizer)
    file = io.BytesIO()
    torch.save(model, file)
    state = copy.deepcopy(optimizer.state_dict())
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert resting(twin) == set()
    its = plan(thaw=3).build(twin, steps=9, resume=state)
    assert its.findings == ()  # what the plan froze is not taken for frozen by hand
    assert resting(twin.train()) == LOCKED
    for each, own in ((model, optimizer), (twin, its)):
        torch.manual_seed(5)
        step(each, own, 4)
    for mine, other in zip(twin.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


# -------------------------------------------------------------------------- frozen by the owner


class Lora(nn.Module):
    """A low-rank adapter beside a frozen layer, with dropout of its own, as in PEFT."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_dropout = nn.Dropout(0.5)
        self.lora_A, self.lora_B = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(self.lora_dropout(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = Lora(nn.Linear(4, 4))
        self.output = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).requires_grad_(False)

    def forward(self, x):
        return self.output(self.attention(x))


@pytest.mark.parametrize("rule", [{}, {"lr": 0.2}, {"thaw": 2}, {"freeze": 1}])
def test_dropout_of_what_its_owner_froze_goes_on(rule):
    model, free = Block(), Block()
    rules = [lm.Rule("*lora_?.*", **rule)] if rule else []
    optimizer = lm.Plan("SGD", lr=0.1, rules=rules).build(model, steps=9)
    for each in (model, free):
        each.train()
    assert resting(model) <= {"attention.lora_A", "attention.lora_B"}
    x = torch.randn(6, 4)
    out = []
    for each in (model, free):
        torch.manual_seed(3)
        out.append(each(x))
    assert torch.equal(*out)
    optimizer.release()
    assert resting(model) == set()


@pytest.mark.parametrize("rule", [{"frozen": True}, {"thaw": 2}, {"freeze": 0}])
def test_a_rule_that_freezes_what_was_frozen_by_hand_locks_it(rule):
    if rule == {"freeze": 0}:
        rule = {"freeze": [0], "thaw": [2]}
    model = net()
    model[0].requires_grad_(False)
    optimizer = plan(**rule).build(model, steps=9)
    assert resting(model.train()) == LOCKED
    optimizer.release()
    assert resting(model) == set()


def test_what_an_owner_keeps_in_eval_mode_stays_so_and_a_hand_lock_outlives_the_plan():
    model = net()
    lm.freeze(model, "0")
    optimizer = lm.Plan("SGD", lr=0.1).build(model, steps=9)
    step(model.train(), optimizer)
    assert resting(model) == LOCKED
    optimizer.release()
    assert resting(model.train()) == LOCKED


def test_frozen_by_lm_freeze_stays_locked_in_copies_with_its_statistics():
    model = net()
    model(batches(1)[0])
    lm.freeze(model, "0")
    before = copy.deepcopy(model[0][1].state_dict())
    averaged = AveragedModel(model)
    update_bn(batches(), averaged)
    for twin in (averaged.module, *(COPIES[kind](model) for kind in ("deepcopy", "pickle"))):
        assert resting(twin.train()) == LOCKED
        assert all(torch.equal(v, before[k]) for k, v in twin[0][1].state_dict().items())
        lm.thaw(twin, "0")
        assert resting(twin) == set()
        twin[0][1].reset_running_stats()
        assert int(twin[0][1].num_batches_tracked) == 0
    assert resting(model.train()) == LOCKED


def bert():
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
    )
    lora = peft.LoraConfig(r=2, target_modules=["query"], lora_dropout=0.1)
    return peft.get_peft_model(transformers.BertModel(config), lora).train()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_peft_is_trained_as_without_a_plan():
    model, free = bert(), bert()
    optimizer = lm.Plan(lm.AdamW, lr=1e-2).build(model, steps=5)
    trains = [param for param in free.parameters() if param.requires_grad]
    theirs = torch.optim.AdamW(trains, lr=1e-2)
    words = torch.arange(12).view(2, 6)
    for number in range(5):
        for each, its in ((model, optimizer), (free, theirs)):
            torch.manual_seed(number)
            each(input_ids=words).last_hidden_state.square().mean().backward()
            its.step()
            its.zero_grad()
    assert resting(model) == resting(free) == set()
    for mine, other in zip(model.parameters(), free.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert optimizer.check(model) == ()
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    found = {finding.code: finding.message for finding in optimizer.check(model)}
    assert set(found) == {"parameter-added", "requires-grad-off"}
