"""What users and other optimizers do to `requires_grad` under a plan, and what they are told."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

import lamina as lm

#: the findings on models that are frozen as the tests need it, which the build warns of
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{code}")
    for code in ("frozen-by-model", "cannot-train", "nothing-trains", "statistics-drift")
]


def near(ours, theirs, rtol):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=1e-7)
    return True


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def plan(*rules, optimizer="SGD", lr=0.1, **settings):
    return lm.Plan(optimizer, lr=lr, rules=rules, **settings)


def step(model, *optimizers):
    model(torch.ones(5, 3)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()


def codes(findings):
    return [finding.code for finding in findings]


def flags(model):
    return [param.requires_grad for param in model.parameters()]


def fix_of(model, optimizer, code):
    (finding,) = [found for found in optimizer.check(model) if found.code == code]
    return finding.fix


# ------------------------------------------------------------------------- turned on or off by hand


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", torch.optim.NAdam])
def test_turned_on_what_the_plan_froze(optimizer):
    model = net()
    built = plan(lm.Rule("0.*", frozen=True), optimizer=optimizer).build(model, steps=9)
    before = model[0].weight.detach().clone()
    step(model, built)
    model[0].requires_grad_(True)
    with pytest.warns(lm.LaminaWarning, match=r"requires-grad-on: 0.weight, 0.bias are frozen"):
        step(model, built)
    step(model, built)  # said once
    assert torch.equal(model[0].weight, before)
    assert codes(built.check(model)) == ["requires-grad-on"]
    built.release()
    assert codes(built.check(model)) == []


def test_the_fix_for_what_was_turned_on_works():
    model = net()
    optimizer = plan(lm.Rule("0.*", frozen=True)).build(model, steps=9)
    step(model, optimizer)
    model[0].requires_grad_(True)
    assert "call optimizer.release()" in fix_of(model, optimizer, "requires-grad-on")
    optimizer.release()
    optimizer = plan(lm.Rule("0.*", frozen=False)).build(
        model, steps=9, resume=optimizer.state_dict()
    )
    before = model[0].weight.detach().clone()
    step(model, optimizer)
    assert not torch.equal(model[0].weight, before)
    assert optimizer.clock == 2
    assert optimizer.check(model) == ()


def test_turned_on_what_was_frozen_before_the_plan():
    model = net()
    model[0].requires_grad_(False)
    optimizer = plan().build(model, steps=9)
    model[0].requires_grad_(True)
    with pytest.warns(lm.LaminaWarning, match="was False at build"):
        step(model, optimizer)
    fix = fix_of(model, optimizer, "requires-grad-on")
    assert "build the optimizer again from the plan, with resume=optimizer.state_dict()" in fix
    optimizer = plan().build(model, steps=9, resume=optimizer.state_dict())
    before = model[0].weight.detach().clone()
    model.zero_grad()
    step(model, optimizer)
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("part", ["0", "0.bias"])
@pytest.mark.parametrize("optimizer", ["AdamW", torch.optim.NAdam])
def test_turned_off_what_the_plan_trains(part, optimizer):
    model = net()
    built = plan(lm.Rule("0.*", lr=0.2), optimizer=optimizer).build(model, steps=9)
    step(model, built)
    for name, param in model.named_parameters():
        if name.startswith(part):
            param.requires_grad_(False)
    with pytest.warns(lm.LaminaWarning, match="requires-grad-off: 0"):
        step(model, built)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    step(model, built)
    fix = fix_of(model, built, "requires-grad-off")
    lm.thaw(model, [name for name in before if name.startswith(part)])
    assert all(repr(name) in fix for name in before if name.startswith(part))
    step(model, built)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert built.check(model) == ()


def closure_of(model):
    def closure():
        model.zero_grad()
        loss = model(torch.ones(5, 3)).square().mean()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", torch.optim.NAdam])
def test_a_gradient_of_what_was_turned_off_is_not_the_plans_to_drop(optimizer):
    model = net()
    optimizer = plan(lm.Rule("0.*", lr=0.2), clip_norm=1.0, optimizer=optimizer).build(model)
    model(torch.ones(5, 3)).square().mean().backward()
    model[0].weight.requires_grad_(False)
    before, grad = model[0].weight.detach().clone(), model[0].weight.grad.clone()
    with pytest.warns(lm.LaminaWarning, match="requires-grad-off: 0.weight"):
        optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert torch.equal(model[0].weight.grad, grad)


def test_lbfgs_leaves_out_what_was_turned_on_or_off():
    model = net()
    model[0].bias.requires_grad_(False)
    optimizer = plan(lm.Rule("0.*", lr=0.5), optimizer="LBFGS").build(model)
    model[0].bias.requires_grad_(True)
    model[2].bias.requires_grad_(False)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    on, off = r"requires-grad-on: requires_grad of 0\.bias", r"requires-grad-off: 2\.bias"
    with pytest.warns(lm.LaminaWarning, match=on), pytest.warns(lm.LaminaWarning, match=off):
        optimizer.step(closure_of(model))
    moved = {n for n, param in model.named_parameters() if not torch.equal(param, before[n])}
    assert moved == {"0.weight", "2.weight"}
    assert model[0].bias.grad is not None
    assert codes(optimizer.check(model)) == ["requires-grad-on", "requires-grad-off"]


def test_lm_freeze_is_no_accident_and_is_not_warned_of():
    model = net()
    optimizer = plan().build(model, steps=9)
    step(model, optimizer)
    lm.freeze(model, "0")
    step(model, optimizer)
    assert codes(optimizer.check(model)) == ["requires-grad-off"]


def test_a_flag_turned_on_without_a_gradient_is_seen_when_a_window_changes():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    rules = [lm.Rule("a.*", frozen=True), lm.Rule("b.*", thaw=2)]
    optimizer = plan(*rules).build(model, steps=9)
    model["a"].requires_grad_(True)
    for last in (False, True):
        model["c"](torch.ones(2, 3)).sum().backward()
        if last:
            with pytest.warns(lm.LaminaWarning, match=r"requires-grad-on: a.weight, a.bias"):
                optimizer.step()
        else:
            optimizer.step()


def test_parts_without_gradients_are_no_contradiction():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    optimizer = plan().build(model, steps=9)
    for name in "abba":  # as experts in a mixture
        model[name](torch.ones(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.check(model) == ()


# --------------------------------------------------------------------------- what can never train


def packed(dtype):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    data = torch.zeros(3, 3).to(dtype)
    model[0].weight = nn.Parameter(data, requires_grad=False)
    model[0].forward = lambda x: x @ model[0].weight.float().T + model[0].bias
    return model


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64])
@pytest.mark.parametrize("rule", [{"frozen": False}, {"thaw": 1}, {"thaw": [1, 3], "freeze": [2]}])
def test_dtypes_without_gradients_stay_frozen_and_are_named(dtype, rule):
    model = packed(dtype)
    given = plan(lm.Rule("0.*", **rule))
    preview = given.preview(model, steps=5)
    assert codes(preview.findings).count("cannot-train") == 1
    (finding,) = [found for found in preview.findings if found.code == "cannot-train"]
    assert f"0.weight has dtype {str(dtype)[6:]}" in finding.message
    optimizer = given.build(model, steps=5)
    before = [param.detach().clone() for param in model.parameters()]
    for _ in range(5):
        step(model, optimizer)
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert moved == [False, True, True, True]
    optimizer.release()
    assert flags(model) == [False, True, True, True]


def test_complex_parameters_train():
    model = nn.Linear(2, 2, dtype=torch.complex64)
    assert "cannot-train" not in codes(plan().preview(model).findings)


def test_a_dtype_without_gradients_is_not_told_to_thaw():
    found = plan().preview(packed(torch.int8)).findings
    assert codes(found) == ["cannot-train"]


def test_thaw_by_hand_leaves_out_what_cannot_train():
    model = packed(torch.int8)
    lm.freeze(model)
    assert lm.thaw(model) == ("0.bias", "1.weight", "1.bias")
    lm.freeze(model)
    with pytest.raises(lm.PlanError, match=r"0.weight.*int8.*no gradients"):
        lm.thaw(model, ["1.weight", "0.weight"])
    assert flags(model) == [False] * 4
    assert "int8 has no gradients" in str(lm.trainable(model))


# --------------------------------------------------------------------------------- all or nothing


class Stubborn(nn.Parameter):
    """As a tensor whose flag torch refuses to change."""

    def requires_grad_(self, mode=True):
        raise RuntimeError("you can only change requires_grad flags of leaf variables.")


def stubborn(model):
    model[2]._parameters["bias"] = Stubborn(model[2].bias.detach())
    return model


@pytest.mark.parametrize(
    "act",
    [
        lambda model: plan(lm.Rule("*", frozen=True)).build(model),
        lambda model: plan(lm.Rule("2.*", thaw=3), lm.Rule("0.*", freeze=2)).build(model, steps=9),
        lambda model: lm.freeze(model),
    ],
)
def test_a_flag_that_cannot_be_changed_changes_none(act):
    model = stubborn(net())
    grads = [torch.ones_like(param) for param in model.parameters()]
    for param, grad in zip(model.parameters(), grads, strict=True):
        param.grad = grad
    with pytest.raises(lm.PlanError, match=r"requires_grad of '2.bias' cannot be changed"):
        act(model)
    assert flags(model) == [True] * 4
    assert model[0].weight.grad is grads[0]
    assert all(module.training for module in model.train().modules())
    assert "frozen by a plan" not in str(lm.trainable(model))


def test_what_was_loaded_in_inference_mode_is_refused_by_name():
    with torch.inference_mode():
        model = net().requires_grad_(False)
    model[2] = nn.Linear(4, 2)
    with pytest.raises(lm.PlanError, match=r"requires_grad of '0.weight'.*inference"):
        plan(lm.Rule("*", frozen=False)).build(model)
    assert flags(model) == [False, False, True, True]
    with pytest.raises(lm.PlanError, match=r"requires_grad of '0.weight'.*inference"):
        lm.thaw(model)
    assert flags(model) == [False, False, True, True]


def test_a_build_that_fails_late_gives_everything_back(monkeypatch):
    model = net()
    lm.freeze(model, "2")
    first = plan(lm.Rule("0.*", frozen=True)).build(model)
    del first
    before = flags(model), [module.training for module in model.train().modules()]
    assert before == ([False] * 4, [True, False, True, False])

    def fails(*args):
        raise RuntimeError("late")

    monkeypatch.setattr(lm.Optimizer, "_drop_states", fails)
    with pytest.raises(RuntimeError, match="late"):
        plan(lm.Rule("*", frozen=False)).build(model)
    assert (flags(model), [module.training for module in model.train().modules()]) == before
    assert "frozen by a plan" in str(lm.trainable(model))
    monkeypatch.undo()
    plan(lm.Rule("*", frozen=False)).build(model)
    assert flags(model) == [True] * 4


# -------------------------------------------------------------------------------- steps without any


def spans(*rules, steps=20, **settings):
    found = plan(*rules, **settings).preview(net(), steps=steps).findings
    return [f.message.split(":")[0] for f in found if f.code == "nothing-trains"]


def test_steps_in_which_nothing_trains_are_named():
    assert spans() == []
    assert spans(lm.Rule("0.*", thaw=5)) == []
    assert spans(thaw=3) == ["nothing trains in steps 0 to 2"]
    assert spans(thaw=1) == ["nothing trains in step 0"]
    rules = [lm.Rule("0.*", freeze=8), lm.Rule("2.*", thaw=10)]
    assert spans(*rules) == ["nothing trains in steps 8 to 9"]
    assert spans(lm.Rule("0.*", freeze=8), lm.Rule("2.*", thaw=8)) == []
    assert spans(thaw=[2, 6], freeze=[4]) == [
        "nothing trains in steps 0 to 1",
        "nothing trains in steps 4 to 5",
    ]
    assert spans(freeze=15) == ["nothing trains in steps 15 to 19"]
    assert spans(freeze=15, steps=None) == ["nothing trains from step 15 on"]
    assert spans(freeze=15, steps=15) == []


def test_a_thaw_that_waits_for_a_metric_fills_no_gap_for_certain():
    waits = lm.Rule("2.*", thaw=lm.on_plateau("val_loss"))
    assert spans(waits) == []
    assert spans(lm.Rule("0.*", freeze=8), waits) == [
        "nothing trains in steps 8 to 19 unless val_loss has stalled by then"
    ]


def test_the_torch_error_that_is_named_is_torchs():
    model = net()
    (finding,) = plan(thaw=3).preview(model, steps=9).findings
    plan(thaw=3).build(model, steps=9)
    with pytest.raises(RuntimeError) as error:
        model(torch.ones(5, 3)).sum().backward()
    assert str(error.value) in finding.message


# ----------------------------------------------------------------------- several optimizers


HALVES = ("0.*", "2.*")


def test_plans_that_disagree_are_refused_and_nothing_is_changed():
    model = net()
    first = plan(lm.Rule("0.*", frozen=True)).build(model)
    before = flags(model), [module.training for module in model.modules()]
    with pytest.raises(lm.PlanError, match=r"'0.weight' trains.*is frozen.*Call release\(\)"):
        plan(lm.Rule("2.*", frozen=True)).build(model)
    assert (flags(model), [module.training for module in model.modules()]) == before
    step(model, first)
    first.release()
    second = plan(lm.Rule("2.*", frozen=True)).build(model)
    step(model, second)
    assert flags(model) == [True, True, False, False]


@pytest.mark.parametrize("rule", [{"frozen": True}, {"thaw": 5}, {"freeze": 5}])
@pytest.mark.parametrize("swap", [False, True])
def test_plans_that_will_disagree_at_a_later_step_are_refused(rule, swap):
    model = net()
    plans = [plan(), plan(lm.Rule("0.*", **rule))]
    first = (plans[::-1] if swap else plans)[0].build(model, steps=9)
    with pytest.raises(lm.PlanError, match="Call release"):
        (plans[::-1] if swap else plans)[1].build(model, steps=9)
    step(model, first)


@pytest.mark.parametrize("optimizer", ["AdamW", torch.optim.NAdam])
def test_a_released_optimizer_neither_drops_nor_updates_what_it_froze(optimizer):
    model = net()
    built = plan(lm.Rule("0.*", frozen=True), optimizer=optimizer).build(model, steps=9)
    built.release()
    before = model[0].weight.detach().clone()
    model(torch.ones(5, 3)).square().mean().backward()
    grad = model[0].weight.grad.clone()
    built.step()
    assert torch.equal(model[0].weight.grad, grad)
    assert torch.equal(model[0].weight, before)
    assert not built.state[model[0].weight].keys() - {"step"}


def test_optimizers_that_are_gone_do_not_count():
    model = net()
    plan(lm.Rule("0.*", frozen=True)).build(model)
    gc.collect()
    optimizer = plan().build(model)
    assert flags(model) == [True] * 4
    optimizer.release()
    optimizer.release()
    plan(lm.Rule("0.*", frozen=True)).build(model)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deep", "pickle"]
)
def test_a_copied_optimizer_counts_on_the_copied_model(copied):
    model = net()
    optimizer = plan(lm.Rule("0.*", frozen=True)).build(model)
    twin, its = copied((model, optimizer))
    optimizer.release()
    plan().build(model)
    with pytest.raises(lm.PlanError, match="Call release"):
        plan().build(twin)
    its.release()
    plan().build(twin)


def test_a_run_that_has_ended_does_not_count():
    model = net()
    first = plan(lm.Rule("0.*", frozen=True)).build(model, steps=2)
    for _ in range(2):
        step(model, first)
    second = plan().build(model, steps=2)
    step(model, second)
    first.release()
    assert flags(model) == [True] * 4


class Gan(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.discriminator = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def adversarial(make, toggle):
    """A GAN as Lightning trains it, with or without switching flags off around each part."""
    gan = Gan()
    parts = {"generator": gan.generator, "discriminator": gan.discriminator}
    optimizers = {name: make(part) for name, part in parts.items()}
    torch.manual_seed(1)
    for _ in range(6):
        for name, sign in (("generator", 1), ("discriminator", -1)):
            if toggle:
                for other, part in parts.items():
                    part.requires_grad_(other == name)
            gan.discriminator(gan.generator(torch.randn(8, 2))).mean().mul(sign).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if toggle:
                gan.requires_grad_(True)
    return dict(gan.named_parameters()), optimizers, gan


@pytest.mark.parametrize("toggle", [False, True])
def test_a_gan_with_an_optimizer_for_each_part_is_torchs(toggle):
    ours, optimizers, gan = adversarial(lambda part: plan(lr=0.05).build(part), toggle)
    theirs, _, _ = adversarial(lambda part: torch.optim.SGD(part.parameters(), lr=0.05), toggle)
    assert near(ours, theirs, rtol=1e-6)
    assert [optimizers[name].check(getattr(gan, name)) for name in optimizers] == [(), ()]


def adapters(make, other=None, frozen=False):
    """Two adapters on one base: backward of each, then the step of each."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"base": nn.Linear(4, 4), "a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})
    model["base"].requires_grad_(False)
    made = {}

    def activate(name):
        for each in "ab":
            model[each].requires_grad_(each == name)

    for name, build in zip("ab", (make, other or make), strict=True):
        activate(name)
        made[name] = build(model)
    torch.manual_seed(1)
    for _ in range(4):
        for name in "ab":
            activate(name)
            model[name](model["base"](torch.randn(8, 4))).square().mean().backward()
        for name in "ab":
            activate(name)
            made[name].step()
            made[name].zero_grad()
    return {name: param.detach() for name, param in model.named_parameters()}


def trained(model):
    return [param for param in model.parameters() if param.requires_grad]


@pytest.mark.parametrize("clip", [{}, {"clip_norm": 0.1}])
def test_a_step_leaves_the_gradients_of_another_plan_alone(clip):
    def torchs(model):
        optimizer, own = torch.optim.AdamW(trained(model), lr=0.1), trained(model)
        if clip:
            optimizer.register_step_pre_hook(
                lambda *_: torch.nn.utils.clip_grad_norm_(own, 0.1) and None
            )
        return optimizer

    ours = adapters(lambda model: plan(optimizer="AdamW", weight_decay=0.01, **clip).build(model))
    assert near(ours, adapters(torchs), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:requires-grad-on")
def test_a_step_leaves_the_gradients_of_a_torch_optimizer_alone():
    def torchs(model):
        return torch.optim.SGD(trained(model), lr=0.1)

    ours = adapters(lambda model: plan().build(model), torchs)
    assert near(ours, adapters(torchs), rtol=1e-6)


def test_locks_of_another_optimizer_are_left_alone():
    gan = Gan()
    gan.generator[1].requires_grad_(False)
    inner = plan(lm.Rule("1.*", frozen=True)).build(gan.generator, steps=9)
    gan.generator.requires_grad_(False)
    whole = plan(lm.Rule("discriminator.1.*", thaw=1)).build(gan, steps=9)
    gan.discriminator(torch.ones(4, 3)).sum().backward()
    whole.step()
    gan.train()
    assert not gan.generator[1].training
    assert gan.discriminator[1].training
    whole.release()
    assert not gan.generator[1].training
    inner.release()
    assert gan.generator[1].training


# ---------------------------------------------------------------------------------- built again


def test_an_optimizer_built_in_the_loop_is_told_of():
    model = net()
    optimizer = plan(optimizer="AdamW").build(model, steps=9)
    step(model, optimizer)
    optimizer = plan(optimizer="AdamW").build(model, steps=9)
    with pytest.warns(lm.LaminaWarning, match=r"rebuilt: .* had taken 1 step: momentum"):
        step(model, optimizer)
    step(model, optimizer)


def released(model, old):
    old.release()
    return plan().build(model, steps=9)


def resumed(model, old):
    return plan().build(model, steps=9, resume=old.state_dict())


def loaded(model, old):
    new = plan().build(model, steps=9)
    new.load_state_dict(old.state_dict())
    return new


@pytest.mark.parametrize("again", [released, resumed, loaded])
def test_an_optimizer_built_again_in_the_way_that_is_named_is_not(again):
    model = net()
    old = plan().build(model, steps=9)
    step(model, old)
    new = again(model, old)
    step(model, new)
    assert new.clock == (1 if again is released else 2)


def test_the_same_plan_built_again_may_be_in_another_window():
    model = net()
    old = plan(lm.Rule("0.*", thaw=2)).build(model, steps=9)
    for _ in range(3):
        step(model, old)
    new = plan(lm.Rule("0.*", thaw=2)).build(model, steps=9)
    assert flags(model) == [False, False, True, True]
    with pytest.warns(lm.LaminaWarning, match="rebuilt"):
        step(model, new)
    old.release()  # what the new one freezes is the new one's
    assert flags(model) == [False, False, True, True]


# ---------------------------------------------------------------------------- modules exchanged


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_a_conversion_of_batchnorm_after_the_build_is_found():
    model = normed()
    optimizer = plan(lm.Rule("1.*", frozen=True)).build(model, steps=9)
    step(model, optimizer)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    (finding,) = optimizer.check(model)
    assert finding.code == "module-replaced"
    assert "1 (BatchNorm1d, now SyncBatchNorm) was kept in eval mode" in finding.message
    assert "resume=optimizer.state_dict()" in finding.fix
    optimizer = plan(lm.Rule("1.*", frozen=True)).build(
        model, steps=9, resume=optimizer.state_dict()
    )
    assert optimizer.check(model) == ()
    assert not model.train()[1].training
    optimizer.release()
    assert flags(model) == [True] * 6


def test_a_conversion_of_what_trains_is_found():
    model = normed()
    optimizer = plan().build(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    (finding,) = optimizer.check(model)
    assert finding.code == "module-replaced"
    assert "its parameters are the same" in finding.message


def test_a_layer_that_was_replaced_is_found_once():
    model = normed()
    optimizer = plan(lm.Rule("1.*", frozen=True)).build(model)
    model[2] = nn.Linear(4, 2)
    assert codes(optimizer.check(model)) == ["parameter-replaced"]
    model[1] = nn.BatchNorm1d(4)
    assert codes(optimizer.check(model)) == ["parameter-replaced", "module-replaced"]


def test_wrappers_around_the_model_exchange_nothing():
    model = normed()
    optimizer = plan(lm.Rule("1.*", frozen=True)).build(model)
    assert optimizer.check(torch.compile(model, backend="eager")) == ()
    assert optimizer.check(nn.Sequential(model)) == ()
    assert optimizer.check(nn.DataParallel(model)) == ()


# --------------------------------------------------------- statistics of what is frozen by hand


def drifts(model):
    found = plan().preview(model, steps=9).findings
    return [found.message for found in found if found.code == "statistics-drift"]


def test_statistics_of_parts_frozen_by_hand_are_named():
    model = normed()
    assert drifts(model) == []
    model[1].requires_grad_(False)  # only BatchNorm's weights
    (message,) = drifts(model)
    assert message.startswith("the parameters of 1 were frozen by hand")
    optimizer = plan().build(model, steps=9)
    before = model[1].running_mean.clone()
    step(model, optimizer)
    assert not torch.equal(model[1].running_mean, before)
    assert codes(optimizer.check(model)) == ["statistics-drift"]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("way", ["freeze", "rule", "let go"])
def test_the_fix_for_drifting_statistics_works(affine, way):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=affine))
    model = nn.Sequential(body, nn.Linear(4, 2))
    model[0].requires_grad_(False)
    (fix,) = [f.fix for f in plan().preview(model).findings if f.code == "statistics-drift"]
    rules = {"rule": [lm.Rule("0", frozen=True)], "let go": [lm.Rule("0", frozen=True, hold=False)]}
    said = {
        "freeze": "lamina.freeze(model, '0')",
        "rule": "lamina.Rule('0', frozen=True)",
        "let go": "lamina.Rule('0', frozen=True, hold=False)",
    }
    assert said[way] in fix
    if way == "freeze":
        lm.freeze(model, "0")
    optimizer = plan(*rules.get(way, [])).build(model, steps=9)
    assert "statistics-drift" not in codes((*optimizer.findings, *optimizer.check(model)))
    before = model[0][1].running_mean.clone()
    step(model.train(), optimizer)
    assert torch.equal(model[0][1].running_mean, before) == (way != "let go")


def test_statistics_that_the_owner_keeps_in_eval_mode_are_not_named():
    model = normed()
    model[1].requires_grad_(False)
    model[1].eval()
    assert drifts(model) == []
    model.eval()  # as loaded: it tells nothing
    assert len(drifts(model)) == 1
