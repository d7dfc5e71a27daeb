"""A parameter, its gradient and its state are known to fit before any operator walks them."""

import copy
import functools

import pytest
import torch
from torch import nn

import lamina as lm
from lamina import optim
from lamina._util.tensors import MemorySnapshot, has_elements, overlaps_itself

OPTIMIZERS = {
    "SGD": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "LARS": {"momentum": 0.9},
    "LAMB": {},
    "Muon": {},
    "LayerAdaptiveAdam": {},
}
#: one for each form of kernel; the others share these, and are tried more rarely
MOST = [
    pytest.param(name, marks=[] if name in ("SGD", "AdamW", "RMSprop") else pytest.mark.slow)
    for name in OPTIMIZERS
]
KERNELS = [{}, {"fused": True}, {"foreach": True}, {"foreach": False}]


def parts():
    torch.manual_seed(0)
    shapes = {"a": (4, 3), "b": (5, 4), "c": (6, 2)}
    return nn.ParameterDict({name: torch.randn(shape) for name, shape in shapes.items()})


def drop_in(name, model, options=None):
    hyper = {"lr": 0.01, **OPTIMIZERS[name]}
    optimizer = getattr(optim, name)(model.named_parameters(), **hyper)
    optimizer.param_groups[0].update(options or {})
    return optimizer


def planned(name, model):
    return lm.Plan(getattr(lm, name), lr=0.01, **OPTIMIZERS[name]).build(model, steps=50)


def backward(model):
    for param in model.parameters():
        param.grad = torch.randn_like(param)


def advance(model, optimizer, steps=2):
    for _ in range(steps):
        backward(model)
        optimizer.step()


def everything(model, optimizer):
    """Copies of all weights and state tensors, but those of the parameter that was changed."""
    found = []
    for name, param in model.items():
        if name != "b":
            state = [v for _, v in sorted(optimizer.state[param].items())]
            found += [each.detach().clone() for each in (param, *state)]
    return found


def weight(make):
    def change(param, entry):
        param.data = make(param)

    return change


def weight_and_gradient(make):
    def change(param, entry):
        param.data = make(param)
        param.grad = torch.ones_like(param)

    return change


def gradient(make):
    def change(param, entry):
        param.grad.data = make(param.grad)

    return change


def state(make):
    def change(param, entry):
        key = max(key for key in entry if key != "step")
        made = make(entry[key])
        entry[key] = entry[key] if made is None else made

    return change


def in_place(change):
    return lambda tensor: change(tensor) and None


def swapped_to_meta(param, entry):
    """As `module.to_empty` does where tensors are swapped."""
    param.grad = None
    torch.utils.swap_tensors(param, nn.Parameter(torch.empty(5, 4, device="meta")))
    param.grad = torch.empty(5, 4, device="meta")


RESIZED = {
    "grown": weight(lambda p: torch.randn(400, 4)),
    "grown with its gradient": weight_and_gradient(lambda p: torch.randn(400, 4)),
    "pruned": weight(lambda p: p.data[:2]),
    "pruned with its gradient": weight_and_gradient(lambda p: p.data[:2].clone()),
    "reshaped": weight(lambda p: p.data.reshape(4, 5)),
    "set": lambda p, entry: p.detach().set_(torch.randn(90, 4)) is p.set_(torch.randn(90, 4)),
    "state replaced": state(lambda s: torch.zeros(2, 2)),
    "state replaced in place": state(in_place(lambda s: setattr(s, "data", torch.zeros(1)))),
    "state resized": state(in_place(lambda s: s.resize_(1, 1))),
    "state freed": state(in_place(lambda s: s.untyped_storage().resize_(0))),
    "state cut": state(in_place(lambda s: s.untyped_storage().resize_(8))),
    "state without data": state(lambda s: s.to("meta")),
    "state of integers": state(lambda s: s.to(torch.int64)),
    "complex state": state(lambda s: s.to(torch.complex64)),
    "a number for a state": state(lambda s: 0.5),
    "several steps": lambda p, entry: entry.update(step=torch.zeros(3)),
}
GRADIENTS = {
    "stale": gradient(lambda g: torch.ones(2, 2)),
    "stale and larger": gradient(lambda g: torch.ones(400, 4)),
    "of as many numbers": gradient(lambda g: g.reshape(4, 5)),
    "that would broadcast": gradient(lambda g: torch.ones(1, 4)),
    "resized": lambda p, entry: p.grad.resize_(1, 1),
    "freed": lambda p, entry: p.grad.untyped_storage().resize_(0),
    "complex": gradient(lambda g: g.to(torch.complex64)),
    "of integers": gradient(lambda g: g.to(torch.int64)),
}
WEIGHTS = {
    "freed": lambda p, entry: p.untyped_storage().resize_(0),
    "expanded": weight(lambda p: torch.randn(1, 4).expand(5, 4)),
    "overlapping": weight(lambda p: torch.randn(20).as_strided((5, 4), (2, 1))),
    "without data": swapped_to_meta,
}


def refused(model, optimizer, change):
    """The error of a step after a change of one parameter, and that nothing else moved."""
    advance(model, optimizer)
    backward(model)
    with torch.no_grad():
        change(model["b"], optimizer.state[model["b"]])
    before = everything(model, optimizer)
    with pytest.raises(lm.MismatchError, match="'b' has shape") as raised:
        optimizer.step()
    after = everything(model, optimizer)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    return str(raised.value)


@pytest.mark.parametrize("change", RESIZED.values(), ids=list(RESIZED))
@pytest.mark.parametrize("name", MOST)
def test_state_of_another_size_is_named_and_can_begin_anew(name, change):
    for options in KERNELS:
        model = parts()
        optimizer = drop_in(name, model, options)
        message = refused(model, optimizer, change)
        assert "optimizer.restart_state('b')" in message
        optimizer.zero_grad()
        optimizer.restart_state("b")
        advance(model, optimizer)
        assert optimizer.state[model["b"]]["step"] == 2
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        advance(model, optimizer)


@pytest.mark.parametrize("change", GRADIENTS.values(), ids=list(GRADIENTS))
@pytest.mark.parametrize("name", MOST)
def test_a_gradient_that_does_not_fit_is_named(name, change):
    for options in KERNELS:
        model = parts()
        optimizer = drop_in(name, model, options)
        message = refused(model, optimizer, change)
        assert "optimizer.zero_grad()" in message
        assert "restart_state" not in message
        optimizer.zero_grad()
        advance(model, optimizer)


@pytest.mark.parametrize("change", WEIGHTS.values(), ids=list(WEIGHTS))
@pytest.mark.parametrize("name", MOST)
def test_a_parameter_without_memory_of_its_own_is_named(name, change):
    for options in KERNELS:
        model = parts()
        assert "(5, 4)" in refused(model, drop_in(name, model, options), change)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_under_a_plan_and_saving_works_afterwards(name):
    for change in (RESIZED["grown with its gradient"], RESIZED["pruned with its gradient"]):
        model = parts()
        optimizer = planned(name, model)
        refused(model, optimizer, change)
        assert optimizer.clock == 2
        optimizer.restart_state("b")
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved, strict=True)
        twin = copy.deepcopy(model)
        other = lm.Plan(getattr(lm, name), lr=0.01, **OPTIMIZERS[name]).build(
            twin, steps=50, resume=saved, strict=True
        )
        torch.manual_seed(1)
        advance(model, optimizer)
        torch.manual_seed(1)
        advance(twin, other)
        pairs = zip(model.parameters(), twin.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        assert optimizer.state[model["b"]]["step"] == 3
        assert optimizer.state[model["a"]]["step"] == 5


def test_a_restarted_parameter_trains_as_in_a_new_optimizer_of_torchs():
    model = parts()
    optimizer = drop_in("AdamW", model)
    advance(model, optimizer)
    model["b"].data = torch.cat([model["b"].data, torch.zeros(3, 4)])
    optimizer.zero_grad()
    lm.restart_state(optimizer, "b")
    twin = nn.Parameter(model["b"].detach().clone())
    theirs = torch.optim.AdamW([twin], lr=0.01)
    for _ in range(3):
        backward(model)
        twin.grad = model["b"].grad.clone()
        optimizer.step()
        theirs.step()
    torch.testing.assert_close(model["b"].detach(), twin.detach(), rtol=1e-6, atol=1e-7)


GOES_ON = {
    "transposed in place": state(in_place(lambda s: setattr(s, "data", s.t().contiguous().t()))),
    "expanded": state(lambda s: torch.full((1, 1), 9.0).expand(5, 4)),
    "in another layout": weight(lambda p: p.data.t().contiguous().t()),
    "with gaps": weight(lambda p: torch.randn(5, 9)[:, :4]),
    "a count in Python": lambda p, entry: entry.update(step=int(entry["step"])),
    "a note in its state": lambda p, entry: entry.update(note="mine", other=torch.zeros(7)),
}


@pytest.mark.parametrize("change", GOES_ON.values(), ids=list(GOES_ON))
@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "LAMB"])
def test_what_still_fits_goes_on_as_with_the_readable_rule(name, change):
    def trained(options):
        model = parts()
        optimizer = drop_in(name, model, options)
        advance(model, optimizer)
        torch.manual_seed(3)
        change(model["b"], optimizer.state[model["b"]])
        advance(model, optimizer, 3)
        return [param.detach() for param in model.parameters()]

    readable = trained({"foreach": False})
    for options in KERNELS[:3]:
        torch.testing.assert_close(trained(options), readable, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_weight_and_state_may_grow_together(dtype):
    """As in densification: the state is extended by hand, nothing begins anew."""
    param = nn.Parameter(torch.ones(3, 2, dtype=dtype))
    twin = nn.Parameter(torch.ones(5, 2, dtype=dtype))
    optimizer, theirs = optim.Adam([param], lr=0.1), torch.optim.Adam([twin], lr=0.1)
    for step in range(4):
        if step == 2:
            pad = torch.zeros(2, 2, dtype=dtype)
            param.data = torch.cat([param.data, twin.data[3:]])
            for key in ("exp_avg", "exp_avg_sq"):
                optimizer.state[param][key] = torch.cat([optimizer.state[param][key], pad])
        twin.grad = torch.full_like(twin, 0.5 + step)
        twin.grad[3:] *= step >= 2
        param.grad = twin.grad[: len(param)].clone()
        optimizer.step()
        theirs.step()
    torch.testing.assert_close(param.detach()[:3], twin.detach()[:3])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_may_become_empty(name):
    model = parts()
    optimizer = drop_in(name, model)
    advance(model, optimizer)
    model["b"].data = torch.zeros(0, 4)
    optimizer.zero_grad()
    optimizer.restart_state("b")
    advance(model, optimizer)
    assert all(bool(param.isfinite().all()) for param in model.parameters())


def test_lbfgs_names_a_gradient_and_a_memory_of_another_size():
    for build in (
        lambda model: optim.LBFGS(model.named_parameters(), lr=0.1),
        lambda model: lm.Plan(lm.LBFGS, lr=0.1).build(model),
    ):
        model = parts()
        optimizer = build(model)

        def closure(model=model):
            for param in model.parameters():
                param.grad = None
            loss = sum(param.square().sum() for param in model.parameters())
            loss.backward()
            return loss

        optimizer.step(closure)
        before = model["a"].detach().clone()
        model["b"].data = torch.ones(9, 4)
        with pytest.raises(lm.MismatchError, match=r"restart_state\('a'\)"):
            optimizer.step(closure)
        assert torch.equal(model["a"], before)
        optimizer.restart_state("a")
        assert optimizer.step(closure).item() > closure().item()
        model["b"].grad.data = torch.ones(2, 2)
        with pytest.raises(lm.MismatchError, match="'b' of shape"):
            optimizer.step(lambda: torch.tensor(1.0))


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.Adadelta, torch.optim.Adagrad])
def test_a_guest_never_meets_state_of_another_size(kind):
    model = parts()
    plan = lm.Plan(lm.AdamW, lr=0.01, rules=[lm.Rule("b | c", optimizer=kind, lr=0.01)])
    optimizer = plan.build(model)
    message = refused(model, optimizer, RESIZED["grown with its gradient"])
    assert optimizer.clock == 2
    assert "(5, 4)" in message
    if kind is torch.optim.Adagrad:  # which makes its state when it is built
        with pytest.raises(lm.PlanError, match="build the optimizer again"):
            optimizer.restart_state("b")
        return
    optimizer.restart_state("b")
    optimizer.step()
    other = plan.build(copy.deepcopy(model), resume=optimizer.state_dict(), strict=True)
    assert other.clock == 3


def test_gradient_operations_meet_no_gradient_of_another_size():
    model = parts()
    optimizer = lm.Plan(lm.SGD, lr=0.1, clip_norm=1.0).build(model)
    seen = refused(model, optimizer, GRADIENTS["stale and larger"])
    assert "its gradient (400, 4)" in seen


@pytest.mark.parametrize("build", [planned, drop_in])
def test_under_compile_too(build):
    model = parts()
    optimizer = build("AdamW", model)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    backward(model)
    step()
    model["b"].data = torch.ones(50, 4)
    with pytest.raises(lm.MismatchError, match="'b' has shape"):
        step()


def test_every_parameter_is_named_with_a_proposal_that_works_without_names():
    params = [nn.Parameter(torch.ones(3)) for _ in range(8)]
    optimizer = optim.AdamW([{"params": params[:4]}, {"params": params[4:]}])
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    for param in params[2:]:
        param.data = torch.ones(5)
        param.grad = torch.ones(5)
    for left in (6, 1):
        with pytest.raises(lm.MismatchError) as raised:
            optimizer.step()
        message = str(raised.value)
        assert message.count("has shape (5,)") == min(left, 5)
        assert ("and 1 more" in message) == (left == 6)
        call = message.partition("anew with ")[2].partition(", or bring")[0]
        eval(call, {"optimizer": optimizer})
    optimizer.step()
    assert [float(optimizer.state[param]["step"]) for param in params] == [2.0] * 2 + [1.0] * 6


def test_restart_state_refuses_what_is_no_parameter_and_changes_nothing():
    model = parts()
    for optimizer in (drop_in("AdamW", model), planned("AdamW", model)):
        advance(model, optimizer)
        for wrong, words in [
            ((), "no parameter was given"),
            (("b", "bb"), "matches none of the 3 parameters"),
            ((torch.ones(5, 4),), "in no parameter group"),
            ((3,), "expected the name"),
        ]:
            with pytest.raises(lm.PlanError, match=words):
                optimizer.restart_state(*wrong)
        assert optimizer.state[model["b"]]["step"] == 2
    nameless = optim.AdamW(model.parameters())
    with pytest.raises(lm.PlanError, match=r"model\.named_parameters\(\)"):
        nameless.restart_state("b")
    with pytest.raises(lm.PlanError, match="expected an optimizer of lamina"):
        lm.restart_state(torch.optim.AdamW(model.parameters()), "b")


def test_a_step_looks_closely_only_after_a_change(monkeypatch):
    model = parts()
    optimizer = drop_in("AdamW", model)
    advance(model, optimizer)
    monkeypatch.setattr(type(optimizer), "_refuse_misfits", lambda *_: pytest.fail("looked"))
    advance(model, optimizer, 3)
    model["b"].data = model["b"].data.clone()
    with pytest.raises(pytest.fail.Exception):
        advance(model, optimizer)


@pytest.mark.parametrize("guarded", [True, False])
def test_a_snapshot_sees_every_change_of_form(guarded, monkeypatch):
    if not guarded:  # as where torch has no such guards
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    for change in (
        lambda t: t.resize_(1, 2),
        lambda t: t.t_(),
        lambda t: setattr(t, "data", t.double()),
        lambda t: setattr(t, "data", t.t()),
    ):
        tensors = [torch.ones(3, 3), torch.ones(2, 5)]
        snapshot = MemorySnapshot(tensors)
        assert snapshot.matches(tensors)
        change(tensors[1])
        assert not snapshot.matches(tensors)
    twice = [tensors[0], tensors[0]]
    assert MemorySnapshot(twice).matches(twice)


def test_which_tensors_have_all_their_elements_apart():
    base = torch.zeros(24)
    apart = [base, base[::2], base.view(4, 6).t(), base.as_strided((3, 4), (1, 5)), base[:0]]
    shared = [
        base[:1].expand(5),
        base.as_strided((5, 4), (2, 1)),
        base.as_strided((3, 3), (2, 4)),
    ]
    assert not any(map(overlaps_itself, apart))
    assert all(map(overlaps_itself, shared))
    assert not overlaps_itself(base.as_strided((2, 3), (3, 2)).clone())
    for tensor in (*apart, *shared):
        places = (torch.arange(24).as_strided(tensor.size(), tensor.stride())).reshape(-1)
        assert overlaps_itself(tensor) == (len(places.unique()) < len(places))
    assert all(map(has_elements, (*apart, *shared)))
    whole = torch.zeros(10)
    view = whole[5:]
    whole.untyped_storage().resize_(6 * 4)
    assert not has_elements(view)
    assert functools.reduce(lambda a, b: a and b, map(has_elements, [torch.zeros(0), base]))
