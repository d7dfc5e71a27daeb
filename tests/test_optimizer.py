"""The optimizer under a plan: torch's interface, ownership, accidents, compiled training."""

import contextlib
import copy
import logging
import os
import pickle
import signal
import sys
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import lamina as lm
from lamina import kernels
from lamina._util.interrupts import HeldInterrupt
from lamina.runtime.ownership import WriteGuard
from models import backward, encoder, equal, mlp, same, train, weights

PLAN = lm.Plan(
    lm.AdamW,
    lr=0.05,
    weight_decay=0.1,
    schedule=lm.warmup(3) >> lm.cosine(to=0.1),
    clip_norm=1.0,
    rules=[lm.Rule("body", thaw=4, lr=lm.times(0.5)), lm.Rule("head.bias", weight_decay=0)],
)


def built(plan=PLAN, steps=30, seed=0):
    model = mlp(seed)
    return model, plan.build(model, steps=steps)


def lrs(optimizer):
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


# --------------------------------------------------------------------------- torch's interface


def test_it_is_a_torch_optimizer_with_plain_groups():
    _, optimizer = built()
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert [type(group) for group in optimizer.param_groups] == [dict] * 3
    assert all(type(group["lr"]) is float for group in optimizer.param_groups)
    assert optimizer.clock == 0  # type: ignore[attr-defined]
    assert "AdamW" in repr(optimizer)


def test_groups_hold_the_next_values_and_applied_those_of_the_step_just_done():
    model, optimizer = built()
    assert optimizer.applied == {}
    for step in range(8):
        announced = lrs(optimizer)
        train(model, optimizer, 1, first=step)
        assert {name: hyper["lr"] for name, hyper in optimizer.applied.items()} == announced
        assert optimizer.clock == step + 1
    assert lrs(optimizer) != announced


def test_lr_is_zero_while_frozen():
    model, optimizer = built()
    seen = []
    for step in range(6):
        seen.append(lrs(optimizer)["body"])
        train(model, optimizer, 1, first=step)
    assert seen[:4] == [0.0] * 4
    assert seen[4] > 0


def test_the_closure_is_called_with_gradients_enabled_and_its_value_returned():
    model, optimizer = built()
    twin, other = built()

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        return backward(model, 0)

    with torch.no_grad():
        loss = optimizer.step(closure)
    (expected,) = train(twin, other, 1)
    assert torch.equal(loss, expected)
    assert same(weights(model), weights(twin))
    assert optimizer.clock == 1


def test_step_hooks_run_around_the_step():
    model, optimizer = built()
    seen = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(("pre", opt.clock)))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(("post", opt.clock)))
    train(model, optimizer, 2)
    assert seen == [("pre", 0), ("post", 1), ("pre", 1), ("post", 2)]


def test_add_param_group_is_refused_with_what_to_do_instead():
    _, optimizer = built()
    with pytest.raises(lm.PlanError, match=r"thaw=.*new optimizer.*state_dict"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    assert len(optimizer.param_groups) == 3


def test_a_parameter_without_a_gradient_is_left_alone():
    model, optimizer = built()
    before = model.head.bias.detach().clone()
    for step in range(3):
        backward(model, step)
        model.head.bias.grad = None
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model.head.bias, before)
    assert float(optimizer.state[model.head.bias]["step"]) == 0.0
    assert float(optimizer.state[model.head.weight]["step"]) == 3.0


def test_each_parameter_counts_its_own_updates():
    model, optimizer = built()
    train(model, optimizer, 6)
    assert optimizer.clock == 6
    assert float(optimizer.state[model.head.weight]["step"]) == 6.0
    assert float(optimizer.state[model.body.weight]["step"]) == 2.0


def test_left_over_gradients_are_dropped_at_a_freeze():
    model = mlp()
    optimizer = lm.Plan("SGD", lr=0.1, momentum=0.9, rules=[lm.Rule("body", freeze=2)]).build(model)
    train(model, optimizer, 2)
    assert model.body.weight.grad is None
    before = model.body.weight.detach().clone()
    model.body.weight.grad = torch.ones_like(before)
    optimizer.step()
    assert torch.equal(model.body.weight, before)


def test_no_model_is_walked_and_no_pattern_read_in_a_step(monkeypatch):
    model, optimizer = built()
    calls = []
    for step in range(6):
        optimizer.zero_grad()
        backward(model, step)
        with monkeypatch.context() as patch:
            for name in ("named_modules", "named_parameters", "modules", "parameters"):
                patch.setattr(torch.nn.Module, name, lambda *args, **kwargs: calls.append(args))
            patch.setattr("lamina.model.patterns._parse", lambda *args: calls.append(args))
            optimizer.step()
    assert calls == []
    assert optimizer.clock == 6


# -------------------------------------------------------------------------------- ownership


@pytest.mark.parametrize(
    ("key", "written"), [("lr", 0.123), ("weight_decay", 0.5), ("betas", (0.5, 0.5)), ("lr", None)]
)
def test_a_foreign_write_is_refused_by_name_and_can_be_undone(key, written):
    model, optimizer = built()
    train(model, optimizer, 2)
    group = optimizer.param_groups[1]
    right, before = group[key], weights(model)
    group[key] = written
    backward(model)
    with pytest.raises(lm.OwnershipError) as caught:
        optimizer.step()
    message = str(caught.value)
    for word in [repr(group["name"]), f"{key}={written!r}", repr(right), "change the plan"]:
        assert word in message, message
    takes = isinstance(written, float)  # what override takes
    assert (f"optimizer.override({key}={written!r}" in message) == takes, message
    assert same(weights(model), before)
    assert optimizer.clock == 2
    group[key] = right
    optimizer.step()
    assert optimizer.clock == 3
    assert not same(weights(model), before)


def test_a_key_that_was_removed_is_a_foreign_write():
    _, optimizer = built()
    del optimizer.param_groups[0]["eps"]
    with pytest.raises(lm.OwnershipError, match="eps=nothing"):
        optimizer.step()


def test_a_scheduler_of_torch_is_a_foreign_writer():
    model, optimizer = built(lm.Plan("SGD", lr=0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(model, optimizer, 1)
    scheduler.step()
    with pytest.raises(lm.OwnershipError, match=r"a torch scheduler .*scheduler_view"):
        train(model, optimizer, 1)


def test_the_scheduler_view_satisfies_trainers_and_changes_nothing():
    model, optimizer = built()
    view = optimizer.scheduler_view()
    assert isinstance(view, torch.optim.lr_scheduler.LRScheduler)
    for step in range(5):
        expected = [group["lr"] for group in optimizer.param_groups]
        assert step > 0 or view.get_last_lr() == expected
        train(model, optimizer, 1, first=step)
        assert expected == [hyper["lr"] for hyper in optimizer.applied.values()]
        view.step()
        view.step()
        assert view.get_last_lr() == expected == view.get_lr()
        assert view.last_epoch == optimizer.clock == step + 1
    view.load_state_dict(view.state_dict())
    assert all("initial_lr" not in group for group in optimizer.param_groups)


# --------------------------------------------------------------------------------- accidents


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_bad_gradient_leaves_weights_state_and_clock(policy, bad, caplog):
    plan = lm.Plan("AdamW", lr=0.1, weight_decay=0.1, clip_norm=1.0, nonfinite=policy)
    model, optimizer = built(plan)
    train(model, optimizer, 2)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    backward(model, 2)
    model.head.weight.grad[0, 0] = bad
    if policy == "raise":
        with pytest.raises(lm.NonFiniteError, match=r"'head.weight'.*step 2"):
            optimizer.step()
    else:
        with caplog.at_level(logging.WARNING, "lamina"):
            optimizer.step()
        assert "step 2 skipped" in caplog.text
        assert "'head.weight'" in caplog.text
        assert optimizer.skipped == 1
    assert same(weights(model), before)
    assert optimizer.clock == 2
    assert equal(optimizer.state_dict(), state)
    train(model, optimizer, 1, first=3)
    assert optimizer.clock == 3


def test_a_grad_scaler_that_skips_a_step_leaves_the_clock():
    model = mlp(dtype=torch.float32)
    optimizer = PLAN.build(model, steps=30)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    clocks, before = [], None
    for step in range(5):
        optimizer.zero_grad()
        x = torch.ones(2, 3) * (float("inf") if step == 2 else 1.0)
        before = weights(model)
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        clocks.append(optimizer.clock)
        assert same(weights(model), before) == (step in (0, 2))  # the warmup begins at lr 0
    assert clocks == [1, 2, 2, 3, 4]
    assert scaler.get_scale() == 2.0


def test_a_grad_scaler_hands_on_unscaled_gradients():
    model, twin = mlp(dtype=torch.float32), mlp(dtype=torch.float32)
    optimizer, other = (lm.Plan("SGD", lr=0.5, clip_norm=0.1).build(m) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.ones(2, 3)).square().mean()).backward()
    scaler.step(optimizer)
    twin(torch.ones(2, 3)).square().mean().backward()
    other.step()
    torch.testing.assert_close(weights(model), weights(twin))


# ------------------------------------------------------------------------------------ copies


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("at", [0, 2, 5])
def test_copies_of_model_and_optimizer_continue_exactly(copied, at):
    model, optimizer = built()
    train(model, optimizer, at)
    twin, other = copied((model, optimizer))
    assert other.clock == at
    assert other.plan == PLAN
    for step in range(at, 12):
        train(model, optimizer, 1, first=step)
        train(twin, other, 1, first=step)
        assert same(weights(model), weights(twin)), step
        assert lrs(optimizer) == lrs(other)
        assert optimizer.applied == other.applied
    assert twin.body.weight is not model.body.weight
    assert twin.body.weight.requires_grad


# --------------------------------------------------------------------------- compiled training


def step_by_step(model, optimizer, forward):
    def run(x):
        optimizer.zero_grad()
        loss = forward(x).square().mean()
        loss.backward()
        optimizer.step()

    return run


@pytest.mark.parametrize("what", ["model", "step"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_thirty_compiled_steps_equal_eager_ones(what):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    accounts = []
    for compiled in (False, True):
        model = encoder((0, 1), dtype=torch.float32)
        rules = [lm.Rule("embeddings", frozen=True), lm.Rule("encoder.layer.0", lr=lm.times(0.5))]
        plan = lm.Plan(
            lm.AdamW,
            lr=0.05,
            schedule=lm.warmup(3) >> lm.cosine(to=0.1),
            clip_norm=1.0,
            rules=rules,
        )
        optimizer = plan.build(model, steps=30)
        forward = torch.compile(model, backend=counter) if compiled and what == "model" else model
        run = step_by_step(model, optimizer, forward)
        run = torch.compile(run, backend=counter) if compiled and what == "step" else run
        account = []
        for step in range(30):
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            run(x)
            account.append((optimizer.clock, lrs(optimizer), dict(optimizer.applied)))
        accounts.append((weights(model), account))
    (eager, expected), (compiled, found) = accounts
    assert found == expected
    assert [clock for clock, _, _ in found] == list(range(1, 31))
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    assert 1 <= counter.frame_count <= 2
    torch._dynamo.reset()


def test_a_thaw_under_compile_trains_the_thawed_part():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    accounts = []
    for compiled in (False, True):
        model, optimizer = built()
        forward = torch.compile(model, backend=counter) if compiled else model
        run = step_by_step(model, optimizer, forward)
        for step in range(8):
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step)).double()
            run(x)
        accounts.append(weights(model))
    torch.testing.assert_close(*accounts)
    assert not torch.equal(accounts[1]["body.weight"], mlp().body.weight)
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_state_dtype_is_a_setting_of_plans():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)).bfloat16()
    rules = [lm.Rule("1", state_dtype=None)]
    plan = lm.Plan(lm.AdamW, lr=1e-3, state_dtype=torch.float32, rules=rules)
    assert lm.Plan.from_toml(plan.to_toml()) == plan
    optimizer = plan.build(model)
    model(torch.ones(3, 4).bfloat16()).sum().backward()
    optimizer.step()
    found = [optimizer.state[param]["exp_avg"].dtype for param in model.parameters()]
    assert found == [torch.float32] * 2 + [torch.bfloat16] * 2


@pytest.mark.parametrize("wrong", ["float31", 3, torch.int32])
def test_state_dtype_that_is_none(wrong):
    with pytest.raises(lm.LaminaError, match=r"state_dtype=.*expected None or one of float32"):
        lm.Plan(lm.AdamW, lr=1e-3, state_dtype=wrong)


@pytest.mark.parametrize("optimizer", [lm.LBFGS, torch.optim.Adagrad])
def test_state_dtype_of_an_optimizer_that_has_none(optimizer):
    with pytest.raises(lm.LaminaError, match="no hyperparameter 'state_dtype'"):
        lm.Plan(optimizer, lr=1e-3, state_dtype="float32").build(torch.nn.Linear(2, 2))


def test_what_was_applied_is_the_readers_own():
    model = torch.nn.Linear(2, 2)
    optimizer = lm.Plan(lm.SGD, lr=0.1).build(model)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.applied["default"]["lr"] = 5.0
    optimizer.step()
    assert optimizer.applied == {"default": optimizer.applied["default"]}
    assert optimizer.applied["default"]["lr"] == 0.1


def test_a_build_that_cannot_resume_leaves_the_model_alone():
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1)
    )
    plan = lm.Plan(lm.AdamW, lr=0.1, rules=[lm.Rule("0 | 1", frozen=True)])
    optimizer = plan.build(model, steps=5)
    state = optimizer.state_dict()
    state["param_groups"][0]["clock"] = "x"
    with pytest.raises(lm.StateError):
        plan.build(model, steps=5, resume=state)
    assert not model[0].weight.requires_grad
    model.train()
    assert not model[1].training


def test_a_saved_state_shares_no_list_with_the_live_groups():
    optimizer = lm.Plan(lm.SGD, lr=0.1).build(torch.nn.Linear(2, 2), steps=5)
    group = optimizer.state_dict()["param_groups"][0]
    group["run"]["steps"] = 99
    group["param_names"].clear()
    assert optimizer.state_dict()["param_groups"][0]["run"]["steps"] == 5
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_active_says_which_groups_train_next():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    plan = lm.Plan(lm.SGD, lr=0.1, rules=[lm.Rule("0", thaw=1), lm.Rule("1.bias", frozen=True)])
    optimizer = plan.build(model, steps=5)
    assert optimizer.active == {"0": False, "default": True, "1.bias": False}
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert optimizer.active == {"0": True, "default": True, "1.bias": False}


# --- Ctrl-C --------------------------------------------------------------------------------------


@pytest.fixture
def python_handles_interrupts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_interrupts")
@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself a SIGINT there")
@pytest.mark.parametrize("where", ["publish", "carry_out"])
def test_an_interrupt_waits_until_the_step_is_whole(where, monkeypatch):
    def trained(interrupted):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        optimizer = lm.Plan(lm.AdamW, lr=0.1, schedule=lm.cosine()).build(model, steps=10)
        for step in range(6):
            for param in model.parameters():
                param.grad = torch.randn_like(param)
            if step == interrupted:
                with interrupting(where), pytest.raises(KeyboardInterrupt):
                    optimizer.step()
            else:
                optimizer.step()
        assert optimizer.clock == 6
        return [*model.parameters()]

    @contextlib.contextmanager
    def interrupting(where):
        owner = WriteGuard if where == "publish" else kernels
        real = getattr(owner, where)

        def send(*arguments):
            os.kill(os.getpid(), signal.SIGINT)
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(owner, where, send)
            yield

    assert all(map(torch.equal, trained(3), trained(None)))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("python_handles_interrupts")
@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself a SIGINT there")
def test_a_second_interrupt_does_not_wait_and_other_handlers_are_left_alone():
    reached = []

    def pressed_twice():
        with HeldInterrupt():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("once")
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("twice")

    with pytest.raises(KeyboardInterrupt):
        pressed_twice()
    assert reached == ["once"]
    calls = []
    before = signal.signal(signal.SIGINT, lambda *_: calls.append(1))
    try:
        with HeldInterrupt():
            os.kill(os.getpid(), signal.SIGINT)
            assert calls == [1]
    finally:
        signal.signal(signal.SIGINT, before)
    thread = threading.Thread(target=lambda: HeldInterrupt().__enter__())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
