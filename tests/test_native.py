"""The loops compiled by Numba against the readable rule, and what keeps them from wrong writes."""

from __future__ import annotations

import builtins
import copy
import math
import os
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import torch

import lamina as lm
from lamina.algorithms import ALGORITHMS
from lamina.algorithms.base import Batch
from lamina.errors import MismatchError
from lamina.gradients import norms
from lamina.kernels import apply, choose
from lamina.kernels.native import batched
from lamina.kernels.native import kernel as native_kernel
from lamina.optim import updates

pytest.importorskip("numba")

from lamina.compiled import chunks, loader, openmp, squares, workers
from reference.runner import assert_close, batch_of

SHAPES = [(40, 31), (), (7,), (0, 3), (5, 3, 2, 2)]
CASES = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "maximize": True}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.9, "centered": True, "weight_decay": 0.1, "eps": 1e-3}),
    ("Adam", {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    ("AdamW", {}),
    ("LARS", {"weight_decay": 0.1}),
    ("LARS", {"momentum": 0.0}),
    ("LAMB", {"weight_decay": 0.1, "maximize": True}),
    ("LayerAdaptiveAdam", {"weight_decay": 0.1}),
    ("LayerAdaptiveAdam", {"amsgrad": True, "weight_decay": 0.1, "decoupled_weight_decay": True}),
]
cases = pytest.mark.parametrize(("name", "options"), CASES, ids=str)


@pytest.fixture(autouse=True)
def _bounds_are_checked(monkeypatch):
    monkeypatch.setattr(batched, "CHECK_BOUNDS", True)
    monkeypatch.setattr(chunks, "CHUNK", 100)  # so that small tensors have several


def make(name: str, dtype=torch.float32, **options) -> Batch:
    generator = torch.Generator().manual_seed(3)
    params = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES
    ]
    return batch_of(ALGORITHMS[name], params, {**ALGORITHMS[name].defaults, "lr": 1e-2, **options})


def train(batch: Batch, prefer: str | None, steps: int, factor=1.0, size=1.0) -> Batch:
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        batch.grads = [
            size * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for p in batch.params
        ]
        batch.grads = [g.to(p.dtype) for g, p in zip(batch.grads, batch.params, strict=True)]
        batch.scale = None if factor is None else torch.tensor(factor)
        apply([batch], prefer)
        if batch.has_new_state:
            batch.has_new_state = False
    return batch


def assert_native(batch: Batch) -> None:
    kernel, reason = choose(batch)
    assert kernel.name == "native", reason


def assert_agrees(name, options, dtype=torch.float32, tolerance=2e-6, steps=100, **how) -> None:
    given, oracle = (make(name, dtype, **options) for _ in range(2))
    assert_native(given)
    train(given, None, steps, **how)
    train(oracle, "readable", steps, **how)
    assert_close(given.params, oracle.params, tolerance)
    assert [float(step) for step in given.steps] == [steps] * len(given.params)
    for key, column in oracle.columns.items():
        assert_close(
            [value for value in given.columns[key] if value is not None],
            [value for value in column if value is not None],
            max(tolerance, 1e-5 if dtype is torch.float32 else 0),
        )


# ------------------------------------------------------------------------------------- the numbers


@cases
@pytest.mark.parametrize("factor", [None, 0.3, 0.0])
def test_float32_is_the_rule(name, options, factor):
    tolerance = 2e-6
    if name == "RMSprop" and options.get("centered"):
        tolerance = 2e-5  # the difference of two numbers that are nearly equal
    assert_agrees(name, options, tolerance=tolerance, factor=factor)


@cases
def test_float64_is_the_rule_to_the_last_digits(name, options):
    assert_agrees(name, options, torch.float64, 1e-11, factor=0.5)


@pytest.mark.parametrize("size", [1e-42, 1e17])
@pytest.mark.parametrize("name", ["SGD", "RMSprop", "AdamW", "LAMB", "LARS", "LayerAdaptiveAdam"])
def test_denormal_and_huge_gradients(name, size):
    if name == "LAMB" and size < 1:
        pytest.skip("the rule's float32 norm is 0, as squares vanish in it; a loop's is not")
    given, oracle = (train(make(name), prefer, 5, size=size) for prefer in (None, "readable"))
    assert all(param.isfinite().all() for param in given.params)
    assert_close(given.params, oracle.params, 2e-6)


@cases
def test_bfloat16_is_the_rule_but_for_one_rounding(name, options):
    assert_agrees(name, options, torch.bfloat16, 2**-6 if name == "RMSprop" else 2**-8, 20)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "master"])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "LAMB"])
def test_roundings_are_those_of_the_rule(name, rounding):
    generator = torch.Generator().manual_seed(1)
    models = [torch.nn.ParameterList(torch.randn(s).bfloat16() for s in SHAPES)]
    models.append(copy.deepcopy(models[0]))
    optimizers = [
        getattr(lm, name)(model.parameters(), lr=1e-3, rounding=rounding, foreach=foreach)
        for model, foreach in zip(models, (None, False), strict=True)
    ]
    for _ in range(10):
        for mine, other in zip(*(model.parameters() for model in models), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator).bfloat16()
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    kinds = [choose(kept.batch)[0].name for o in optimizers for kept in o._kept_batches.values()]
    assert kinds == ["native", "readable"]
    mine, other = (torch.cat([p.flatten().float() for p in m.parameters()]) for m in models)
    if name == "SGD":  # every operation is the same, and so is every random bit
        assert torch.equal(mine, other)
    else:
        assert (mine != other).float().mean() < 0.05
        assert ((mine - other).abs() <= 2**-6 * other.abs()).all()


def test_a_weight_that_others_changed_is_followed_and_told():
    model = torch.nn.Linear(4, 3).bfloat16()
    optimizer = lm.AdamW(model.named_parameters(), lr=1e-3, rounding="master")
    for _ in range(2):
        model(torch.ones(1, 4).bfloat16()).sum().backward()
        optimizer.step()
    assert_native(next(iter(optimizer._kept_batches.values())).batch)
    with torch.no_grad():
        model.weight.fill_(7.0)
    with pytest.warns(lm.LaminaWarning, match="the weights of 'weight' are not those"):
        optimizer.step()
    assert (model.weight > 6.9).all()


# ---------------------------------------------------------------------- one call for many groups


def test_all_groups_are_updated_in_one_call(monkeypatch):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(5, 4)) for _ in range(30)]
    optimizer = lm.AdamW([{"params": [p], "lr": 1e-3 * (i + 1)} for i, p in enumerate(params)])
    calls = []
    real = workers.WORKERS.run
    monkeypatch.setattr(
        workers.WORKERS, "run", lambda *given: (calls.append(given[0]), real(*given))
    )
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert len(calls) == 1
    for i, (old, new) in enumerate(zip(before, params, strict=True)):
        torch.testing.assert_close(
            old - new, 1e-3 * (i + 1) * (1 + 0.01 * old), rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("plan", [False, True])
def test_gradients_are_let_go_after_a_step(groups, plan):
    """A batch that kept them would double their memory in the next backward pass."""
    model = torch.nn.ParameterList([torch.randn(4) for _ in range(3)])
    if plan:
        rules = [lm.Rule(str(i), lr=0.1 * (i + 1)) for i in range(groups)]
        optimizer = lm.Plan(lm.AdamW, lr=1.0, clip_norm=1.0, rules=rules).build(model, steps=9)
    else:
        optimizer = lm.AdamW([{"params": list(model)[i::groups]} for i in range(groups)])
    for _ in range(4):
        for param in model:
            param.grad = torch.ones(4)
        alive = [weakref.ref(param.grad) for param in model]
        optimizer.step()
        optimizer.zero_grad()
        assert [ref() for ref in alive] == [None] * 3


def test_settings_and_forms_may_change_between_steps():
    """A momentum that is scheduled to 0 and back, another lr, maximize, a tensor as lr."""
    options = {"lr": 0.1, "momentum": 0.9}
    batches = [make("SGD", **options) for _ in range(2)]
    changes = [{}, {"lr": 0.05}, {"momentum": 0.0}, {"momentum": 0.5}, {"maximize": True}]
    changes.append({"lr": torch.tensor(0.2)})
    for change in changes:
        for batch, prefer in zip(batches, (None, "readable"), strict=True):
            batch.hyper = {**batch.hyper, **change}
            train(batch, prefer, 2)
        assert_native(batches[0])
        assert_close(batches[0].params, batches[1].params, 2e-6)
    for batch in batches:
        batch.hyper["lr"].fill_(0.4)  # in place: the same object
    for batch, prefer in zip(batches, (None, "readable"), strict=True):
        train(batch, prefer, 1)
    assert_close(batches[0].params, batches[1].params, 2e-6)


@pytest.mark.parametrize("name", ["AdamW", "LAMB"])
def test_threads_change_no_bit(name, monkeypatch):
    monkeypatch.setattr(workers, "_WORTH_A_THREAD", 10)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append(train(make(name, weight_decay=0.1), None, 10).params)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_optimizers_in_several_threads_at_once():
    oracle = train(make("AdamW"), None, 20).params
    results: list[list[torch.Tensor]] = []

    def work() -> None:
        results.append(train(make("AdamW"), None, 20).params)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 4
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, oracle, strict=True))


needs_team = pytest.mark.skipif(openmp.torch_team() is None, reason="torch's threads are its own")


@needs_team
@pytest.mark.parametrize("name", ["AdamW", "LAMB"])
def test_loops_run_on_the_threads_of_torch(name, two_threads):
    """Others would share a core with torch's, which wait busily between two operations."""

    def threads():
        return {int(each) for each in os.listdir("/proc/self/task")}

    param = torch.nn.Parameter(torch.ones(1_000_000))
    param.grad = torch.ones_like(param)
    param.grad.mul_(2.0)  # on torch's threads, which begin now at the latest
    before = threads()
    optimizer = getattr(lm, name)([param], lr=0.1)
    for _ in range(3):
        lm.clip_grad_norm_([param], 1.0)
        optimizer.step()
    assert "native" in optimizer.kernels()["0"]
    assert threads() <= before  # those of other tests may end meanwhile


@needs_team
def test_both_threads_of_torch_take_part_and_an_error_comes_out(two_threads):
    team, seen, both = openmp.torch_team(), [], threading.Barrier(2)

    def note(value):
        both.wait(60)
        seen.append((value, threading.get_ident()))

    team.run(note, (7,), 2, 2)
    assert [value for value, _ in seen] == [7, 7]
    assert len({ident for _, ident in seen}) == 2
    assert threading.get_ident() in {ident for _, ident in seen}

    seen.clear()
    team.run(lambda: seen.append(threading.get_ident()), (), 1, 2)
    assert len(seen) == 1  # the other one was not wanted

    def fail():
        raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        team.run(fail, (), 2, 2)


@pytest.mark.parametrize("team", [True, False])
def test_large_tensors_in_several_threads_at_once(team, monkeypatch, two_threads):
    if not team:
        monkeypatch.setattr(workers, "torch_team", lambda: None)
    results: list[torch.Tensor] = []

    def work() -> None:
        torch.set_num_threads(2)  # the runtime keeps it for each thread
        param = torch.nn.Parameter(torch.ones(1_000_000))
        optimizer = lm.AdamW([param], lr=0.1)
        for step in range(20):
            param.grad = torch.full_like(param, float(step - 7))
            optimizer.step()
        results.append(param.detach())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    work()
    assert len(results) == 4
    assert all(torch.equal(result, results[0]) for result in results)
    assert len(results[0].unique()) == 1


@needs_team
def test_another_runtime_is_not_that_of_torch():
    class Another:
        GOMP_parallel = None

        def omp_set_num_threads(self, threads):
            """It has threads of its own."""

    before = torch.get_num_threads()
    assert not openmp._is_torchs(Another())
    assert not openmp._is_torchs(object())
    assert any(map(openmp._is_torchs, openmp._libraries()))
    assert torch.get_num_threads() == before


def test_without_the_threads_of_torch_there_are_those_of_python(monkeypatch):
    find = openmp.torch_team.__wrapped__
    assert (find() is None) == (openmp.torch_team() is None)
    with monkeypatch.context() as patch:
        patch.setattr(openmp, "_libraries", list)
        assert find() is None
    with monkeypatch.context() as patch:  # the entrance cannot be compiled
        patch.setitem(sys.modules, "lamina.compiled.entrance", None)
        assert find() is None
    monkeypatch.setattr(torch.backends.openmp, "is_available", lambda: False)
    assert find() is None


@needs_team
def test_what_no_thread_has_done_is_done_in_the_end(monkeypatch, two_threads):
    """An interrupt may come in the moment in which the only thread that came begins."""
    team, calls = openmp.torch_team(), []
    monkeypatch.setattr(team, "_parallel", lambda *given: None)
    team.run(calls.append, (1,), 2, 2)
    assert calls == [1]


def test_a_forked_process_has_threads_of_its_own():
    code = """
import os, torch, lamina as lm
torch.set_num_threads(2)
param = torch.nn.Parameter(torch.ones(1_000_000))
optimizer = lm.AdamW([param], lr=0.1)
param.grad = torch.ones_like(param)
optimizer.step()
child = os.fork()
optimizer.step()
if child == 0:
    os._exit(0 if abs(float(param[0]) - 0.8) < 0.01 else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=120)
    assert done.returncode == 0


# ----------------------------------------------------------------------------------- bad input


def assert_refused(params, words: str, name: str = "AdamW") -> None:
    kernel, reason = choose(batch_of(ALGORITHMS[name], params, dict(ALGORITHMS[name].defaults)))
    assert kernel.name != "native"
    assert words in reason


def test_memory_that_a_loop_cannot_walk_is_refused():
    assert_refused(
        [torch.ones(4, 4)[:, :2]], "not native: number 0 (shape (4, 2)) is not contiguous"
    )
    assert_refused([torch.ones(4, dtype=torch.complex64)], "is complex64")
    assert_refused([torch.ones(4, dtype=torch.float16)], "is float16")
    assert_refused([torch.ones(4, device="meta")], "not on the CPU")
    whole = torch.ones(10)
    assert_refused([whole[:6], whole[4:]], "two tensors that it writes have memory in common")
    raw = torch.zeros(41, dtype=torch.uint8)
    odd = torch.frombuffer(memoryview(raw.numpy())[1:], dtype=torch.float32)
    assert_refused([odd], "does not lie at a multiple of its element size")


def test_groups_that_share_memory_are_updated_one_after_the_other():
    results = []
    for foreach in (None, False):
        whole = torch.arange(300.0)
        params = [torch.nn.Parameter(whole[:200]), torch.nn.Parameter(whole[100:])]
        optimizer = lm.SGD([{"params": [p]} for p in params], lr=0.1, foreach=foreach)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        results.append(whole.clone())
    assert torch.equal(*results)


def test_dense_layouts_that_agree_are_walked_as_they_lie():
    batches = []
    for prefer in (None, "readable"):
        torch.manual_seed(0)
        param = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
        batch = batch_of(ALGORITHMS["AdamW"], [param], dict(ALGORITHMS["AdamW"].defaults))
        batch.grads = [torch.randn_like(param)]
        apply([batch], prefer)
        batches.append(batch)
    assert_native(batches[0])
    assert_close(batches[0].params, batches[1].params, 1e-6)
    batches[0].grads = [torch.randn(2, 3, 4, 4)]
    kernel, reason = choose(batches[0])
    assert kernel.name == "readable"
    assert "a gradient is sparse, or of another dtype or layout" in reason


def test_a_gradient_of_another_dtype_goes_to_the_next_best_kernel():
    batch = make("AdamW", torch.bfloat16)
    batch.grads = [grad.float() for grad in batch.grads]
    assert choose(batch)[0].name == "blockwise"


def test_tensors_that_moved_are_found_again():
    model = torch.nn.Linear(30, 30)
    twin = copy.deepcopy(model)
    optimizers = [
        lm.AdamW(each.parameters(), lr=1e-2, foreach=foreach)
        for each, foreach in ((model, None), (twin, False))
    ]
    for step in range(6):
        if step == 3:
            for each in (model, twin):
                each.weight.data = each.weight.data.clone()
                each.bias = torch.nn.Parameter(each.bias.detach().clone())
            for each, optimizer in zip((model, twin), optimizers, strict=True):
                optimizer.param_groups[0]["params"][1] = each.bias
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            each(torch.ones(2, 30)).square().sum().backward()
            optimizer.step()
    assert_close(model.parameters(), twin.parameters(), 2e-6)


def test_a_table_that_is_out_of_date_is_seen():
    batch = train(make("AdamW"), None, 2)
    batch.params[0] = torch.randn(2, 2)  # against the rules of a batch
    batch.grads[0] = torch.randn(2, 2)
    with pytest.raises(MismatchError, match="no longer lies where it lay"):
        apply([batch])


def test_chunks_count_beyond_32_bits():
    rows = chunks.chunks_of([2**31 + 5, 0, 3])
    assert rows[0].tolist() == [0, 0, 100]
    assert rows[-2].tolist() == [0, 2**31 - 48, 2**31 + 5] or rows[-2, 2] == 2**31 + 5
    assert rows[-1].tolist() == [2, 0, 3]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("prefer", [{}, {"foreach": True}])
@pytest.mark.parametrize(
    ("name", "option"),
    [("AdamW", "amsgrad"), ("LayerAdaptiveAdam", "amsgrad"), ("RMSprop", "centered")],
)
def test_an_option_that_needs_more_state_may_be_set_in_the_middle(name, option, prefer, groups):
    """The state that it needs begins as zeros; what is not used any more stays."""

    def trained(**settings):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(3)]
        cut = [params] if groups == 1 else [[param] for param in params]
        optimizer = getattr(lm.optim, name)([{"params": its} for its in cut], lr=0.1, **settings)
        for step in range(12):
            if step in (4, 7, 9):
                for group in optimizer.param_groups[:2]:
                    group[option] = step != 7
            for param in params:
                param.grad = torch.randn(3, 4)
            optimizer.step()
        return params, optimizer

    params, optimizer = trained(**prefer)
    expected, _ = trained(foreach=False)
    for mine, other in zip(params, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    (key,) = {"amsgrad": ["max_exp_avg_sq"], "centered": ["grad_avg"]}[option]
    assert key in optimizer.state[params[0]]


def test_state_that_is_missing_is_an_error_and_no_address():
    batch = train(make("AdamW"), None, 1)
    batch.hyper = {**batch.hyper, "amsgrad": True}  # against the rules of a batch
    before = [param.clone() for param in batch.params]
    with pytest.raises(MismatchError, match="AdamW needs max_exp_avg_sq"):
        apply([batch])
    assert all(map(torch.equal, before, batch.params))


# ------------------------------------------------------------------------------- without Numba


def test_without_numba_the_next_best_kernel_says_what_to_install(monkeypatch):
    monkeypatch.setattr(native_kernel, "unavailable", lambda: "Numba is not installed")
    kernel, reason = choose(make("AdamW"))
    assert kernel.name == "fused"
    assert "not native: Numba is not installed" in reason


def test_reasons_for_not_using_numba(monkeypatch):
    import numba

    loader.unavailable.cache_clear()
    monkeypatch.setattr(numba, "__version__", "0.50.1")
    assert "too old: pip install" in loader.unavailable()
    loader.unavailable.cache_clear()
    monkeypatch.setitem(sys.modules, "numba", None)
    assert 'pip install "lamina[fast]"' in loader.unavailable()
    loader.unavailable.cache_clear()


@pytest.mark.parametrize("error", [SystemError, OSError, RuntimeError])
def test_a_numba_that_is_broken_is_a_reason(error, monkeypatch):
    def broken(name, *arguments, **more):
        if name == "numba":
            raise error("initialization of _internal failed")
        return real(name, *arguments, **more)

    real = builtins.__import__
    loader.unavailable.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", broken)
        reason = loader.unavailable()
    loader.unavailable.cache_clear()
    assert reason == "Numba cannot be imported: initialization of _internal failed"


def test_an_optimizer_says_which_kernels_it_uses(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    plan = lm.Plan(lm.AdamW, lr=0.1, rules=[lm.Rule("1.*", thaw=1)])
    optimizer = plan.build(model, steps=3)
    assert set(optimizer.kernels().values()) == {"none yet: it was not updated"}
    for _ in range(2):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert len(optimizer.kernels()) == 2
    assert all(text.startswith("native: loops") for text in optimizer.kernels().values())
    monkeypatch.setattr(native_kernel, "unavailable", lambda: "Numba is not installed")
    other = lm.AdamW(model.parameters())
    other.step()
    assert "not native: Numba is not installed" in other.kernels()["0"]


def test_what_no_kernel_updates_is_told_too():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    plan = lm.Plan(lm.AdamW, lr=0.1, rules=[lm.Rule("1.*", optimizer=torch.optim.NAdam, lr=0.1)])
    optimizer = plan.build(model, steps=3)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    texts = [text.split(":")[0] for text in optimizer.kernels().values()]
    assert sorted(texts) == ["native", "third-party"]
    search = lm.LBFGS(model.parameters())
    assert search.kernels() == {
        "0": "one vector: the search of L-BFGS over all parameters together"
    }


def test_code_that_cannot_be_compiled_is_a_reason(monkeypatch):
    monkeypatch.setattr(native_kernel, "_FAILURES", {})
    monkeypatch.setattr(loader, "_leave_cache", lambda: None)

    def broken(name):
        def fail(*arguments):
            raise TypeError("no such instruction")

        return fail

    monkeypatch.setattr(loader, "loop", broken)
    kernel, reason = choose(make("AdamW"))
    assert kernel.name == "fused"
    assert "Numba could not compile count, adam: no such instruction" in reason


def test_many_groups_are_compared_in_one_go(monkeypatch):
    """From the third step on: what is asked of a tensor in C is asked once, not for each group."""
    params = [torch.nn.Parameter(torch.randn(4)) for _ in range(20)]
    optimizer = lm.AdamW([{"params": [param]} for param in params])
    calls = []
    real = updates.KeptBatch.holds
    monkeypatch.setattr(
        updates.KeptBatch, "holds", lambda self, *given: calls.append(1) or real(self, *given)
    )
    counts = []
    for step in range(5):
        for param in params:
            param.grad = torch.ones(4)
        if step == 3:
            params[7].data = params[7].data.clone()  # which is found, and updated where it is now
        optimizer.step()
        counts.append(len(calls))
        calls.clear()
    assert counts[2] == 1
    assert counts[3] > 20
    for param in params[1:]:
        assert optimizer.state[param]["step"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["damaged", "read-only", "none"])
def test_caches_that_cannot_be_used(tmp_path, kind):
    """The machine code is compiled anew, and the numbers are the same."""
    code = (
        "import torch, lamina as lm; torch.set_num_threads(2);"
        "p = torch.nn.Parameter(torch.ones(1_000_000)); p.grad = torch.ones_like(p);"
        "o = lm.SGD([p], lr=0.5); o.step(); b = next(iter(o._kept_batches.values())).batch;"
        "print(b.kernel.kernel.name, *p.unique().tolist())"
    )
    cache = tmp_path / "cache"
    cache.mkdir()
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    if kind == "none":
        environment["NUMBA_CACHE_DIR"] = "/proc/nothing"
    runs = 2 if kind != "none" else 1
    for turn in range(runs):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.stdout.split() == ["native", "0.5"], done.stderr
        if turn == 0 and kind == "damaged":
            files = [path for path in cache.rglob("*") if path.is_file()]
            assert files
            for path in files:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        if turn == 0 and kind == "read-only":
            for path in cache.rglob("*"):
                path.chmod(0o555 if path.is_dir() else 0o444)


# -------------------------------------------------------------------------------------- the norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norms_are_those_of_torch(dtype):
    tensors = [torch.randn(shape).to(dtype) for shape in SHAPES]
    found = norms.each_norm(tensors)
    assert isinstance(found, norms.MeasuredNorms)
    for norm, tensor in zip(found, tensors, strict=True):
        torch.testing.assert_close(norm.double(), tensor.double().norm(), rtol=1e-6, atol=0.0)
        assert norm.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    whole = torch.cat([tensor.flatten().double() for tensor in tensors]).norm()
    torch.testing.assert_close(norms.total_norm(tensors).double(), whole, rtol=1e-6, atol=0.0)
    assert norms.finite(found)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_norms_that_are_not_finite(bad):
    tensors = [torch.ones(5), torch.full((7,), bad)]
    assert not norms.finite(norms.each_norm(tensors))
    assert not norms.total_norm(tensors).isfinite()


def test_other_tensors_go_to_torch():
    assert squares.squares_of([torch.ones(3), torch.ones(3, dtype=torch.float64)]) is None
    assert squares.squares_of([torch.ones(3, 3).t()[:, 1:]]) is None
    assert squares.squares_of([torch.ones(3, dtype=torch.complex64)]) is None
    empty = squares.squares_of([torch.ones(0)])
    assert empty is not None
    assert np.array_equal(empty, [0.0])
