"""Wrappers of trainers around an optimizer: its verbs work through them, or on what is inside."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import lamina as lm
from lamina import optim
from models import equal

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # those of the trainers' own imports
    import lightning.pytorch as pl
    from accelerate import Accelerator
    from lightning.fabric import Fabric
    from lightning.pytorch.core.optimizer import LightningOptimizer

REACTIVE = lm.Plan(
    lm.AdamW,
    lr=0.1,
    clip_norm=1.0,
    feedback=lm.plateau("loss", patience=0, factor=0.5),
    stop=lm.early_stop("loss", patience=2),
    rules=[lm.Rule("0", thaw=2)],
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))


def step(optimizer, model, inner=None):
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
    (inner or optimizer).zero_grad()


def lightning(optimizer, model):
    return LightningOptimizer(optimizer)


def fabric(optimizer, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Fabric(accelerator="cpu", devices=1)
    return made.setup(model, optimizer)[1]


def accelerated(optimizer, model):
    return Accelerator(cpu=True).prepare(optimizer)


WRAPPERS = [lightning, fabric, accelerated]
INHERITING = [lightning, fabric]  # whose wrappers have the optimizer's methods as their own


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_verbs_on_a_wrapper_do_what_they_do_on_the_optimizer(wrap):
    plain_model, model = network(), network()
    plain, inner = (REACTIVE.build(each, steps=8) for each in (plain_model, model))
    wrapper = wrap(inner, model)
    assert lm.unwrap(wrapper) is inner
    for index in range(6):
        step(plain, plain_model)
        step(inner, model)
        plain.report(loss=1.0)
        lm.report(wrapper, loss=1.0)
        if index == 3:
            plain.override(lr=0.05, rule="2.*")
            lm.override(wrapper, lr=0.05, rule="2.*")
        assert lm.should_stop(wrapper) == plain.should_stop
    assert plain.should_stop
    assert all(map(torch.equal, model.parameters(), plain_model.parameters()))
    assert inner.applied == plain.applied


@pytest.mark.parametrize("wrap", INHERITING)
def test_methods_called_on_a_wrapper_act_on_the_optimizer(wrap):
    plain_model, model = network(), network()
    plain, inner = (REACTIVE.build(each, steps=8) for each in (plain_model, model))
    wrapper = wrap(inner, model)
    for _ in range(3):
        step(plain, plain_model)
        step(inner, model)
        plain.report(loss=1.0)
        wrapper.report(loss=1.0)
    plain.override(lr=0.05)
    wrapper.override(lr=0.05)
    saved = copy.deepcopy(plain.state_dict())
    step(plain, plain_model)
    step(inner, model)
    for optimizer in (plain, wrapper):
        optimizer.load_state_dict(copy.deepcopy(saved))
    assert wrapper.last_load is inner.last_load is not None
    assert wrapper.clock == inner.clock == 3
    step(plain, plain_model)
    step(inner, model)
    assert all(map(torch.equal, model.parameters(), plain_model.parameters()))
    assert wrapper.norms.keys() == inner.norms.keys() == {"plan"}
    assert wrapper.applied == inner.applied == plain.applied
    assert wrapper.skipped == inner.skipped == 0


@pytest.mark.parametrize("wrap", INHERITING)
def test_a_drop_in_optimizer_loads_through_a_wrapper(wrap):
    model = network()
    inner = optim.AdamW(model.parameters(), lr=0.1)
    wrapper = wrap(inner, model)
    step(inner, model)
    saved = copy.deepcopy(inner.state_dict())
    saved["param_groups"][0]["lr"] = 0.025
    step(inner, model)
    groups = inner.param_groups
    wrapper.load_state_dict(saved)
    assert inner.param_groups is groups
    assert inner.param_groups[0]["lr"] == 0.025
    assert equal(inner.state_dict(), saved)
    step(inner, model)
    assert {float(entry["step"]) for entry in inner.state.values()} == {2.0}


def test_lightning_trains_with_manual_optimization_and_reports_on_its_wrapper():
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net = network()

        def configure_optimizers(self):
            return REACTIVE.build(self.net, steps=8)

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.net(batch).square().mean())
            optimizer.step()
            optimizer.report(loss=1.0)
            if index == 4:
                optimizer.override(lr=0.05)

    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_steps=6,
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(torch.ones(12, 4), batch_size=2))
    (optimizer,) = trainer.optimizers
    assert (optimizer.clock, optimizer.should_stop) == (6, True)
    assert any(group["overrides"] for group in optimizer.param_groups)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_have_a_run_state_of_their_own(twin):
    model = network()
    optimizer = REACTIVE.build(model, steps=8)
    step(optimizer, model)
    other, its_model = twin((optimizer, model))
    step(other, its_model)
    assert (optimizer.clock, other.clock) == (1, 2)
    assert other._run_state is not optimizer._run_state
    assert other._kept_batches is not optimizer._kept_batches
    step(optimizer, model)
    assert all(map(torch.equal, model.parameters(), its_model.parameters()))


@pytest.mark.parametrize("given", [None, 3, torch.optim.SGD([torch.zeros(1)], lr=0.1)])
def test_what_holds_no_plan_is_refused(given):
    for verb in (lm.unwrap, lambda it: lm.report(it, loss=1.0), lambda it: lm.override(it, lr=1.0)):
        with pytest.raises(lm.PlanError, match=type(given).__name__):
            verb(given)
