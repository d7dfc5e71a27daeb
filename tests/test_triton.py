"""The Triton kernels: which batches they take, where they compile, what they compute.

What they compute is asked in `triton_cases.py`, which needs a process of its own: Triton looks for
its interpreter when a kernel is defined.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from lamina.algorithms import ALGORITHMS
from lamina.algorithms.base import HALF
from lamina.kernels import choose, dispatch
from lamina.kernels.triton import Triton, kernel, table
from reference.runner import batch_of

CASES = Path(__file__).with_name("triton_cases.py")
pytestmark = pytest.mark.usefixtures("without_numba")
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs Triton: pip install triton"
)
#: the kernels with all variants that they are compiled in
VARIANTS = {
    "rmsprop": ("CENTERED", "MOMENTUM"),
    "lars_norms": ("MOMENTUM",),
    "lars": ("MOMENTUM",),
    "lamb_norms": (),
    "lamb": (),
    "layer_adaptive_sizes": ("AMSGRAD", "DECOUPLED"),
    "layer_adaptive": ("AMSGRAD", "DECOUPLED"),
}


@pytest.fixture(autouse=True)
def _forget():
    kernel.toolchain_refusal.cache_clear()
    yield
    kernel.toolchain_refusal.cache_clear()


def make(name="RMSprop"):
    algorithm = ALGORITHMS[name]
    return batch_of(algorithm, [torch.ones(3)], algorithm.defaults)


# --------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize("name", ["RMSprop", "LARS", "LAMB", "LayerAdaptiveAdam"])
def test_every_form_is_tried_before_those_of_several_passes(name):
    names = [each.name for each in dispatch.KERNELS]
    assert names.index("fused") < names.index("triton") < names.index("foreach")
    assert ALGORITHMS[name].__class__ in kernel.FORMS
    assert "not triton: number 0 (shape (3,)) is on cpu" in choose(make(name))[1]


def test_no_triton(monkeypatch):
    monkeypatch.setattr(kernel, "find_spec", lambda name: None)
    assert Triton(("cpu",)).refusal(make()) == "Triton is not installed"


def test_a_triton_that_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(kernel, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "lamina.kernels.triton.rules", None)
    monkeypatch.delattr("lamina.kernels.triton.rules", raising=False)
    reason = Triton(("cpu",)).refusal(make())
    assert reason.startswith("Triton failed on cpu (")
    assert "\n" not in reason
    monkeypatch.setattr(dispatch, "KERNELS", (Triton(("cpu",)), *dispatch.KERNELS))
    assert choose(make())[0].name == "foreach"


@needs_triton
def test_the_cpu_is_for_the_interpreter_alone():
    assert "TRITON_INTERPRET" in Triton(("cpu",)).refusal(make())


# ------------------------------------------------------------------------------------------ chunks


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 8193, 10**7, 2**31 + 5, 3 * 2**40])
def test_chunks_cover_a_tensor(size):
    blocks, chunks = (int(each[0]) for each in table.chunks_of(np.array([size], dtype=np.int64)))
    assert chunks <= table.MOST_CHUNKS
    assert chunks * blocks * table.BLOCK >= size
    assert (chunks - 1) * blocks * table.BLOCK < max(size, 1)


def test_a_table_and_its_packet():
    first, second = make("LAMB"), make("LAMB")
    second.params = [torch.ones(0), torch.ones(9000)]
    second.steps = [torch.ones(()), torch.ones(())]
    second.columns = {key: [torch.ones(0), torch.ones(9000)] for key in second.columns}
    made = table.Table([first, second], ("exp_avg", None, "exp_avg_sq", None), hypers=2)
    rows = made.rows.numpy()
    assert rows[:, table.WEIGHT].tolist() == [p.data_ptr() for p in first.params + second.params]
    assert rows[:, table.COUNT].tolist() == [3, 0, 9000]
    assert rows[:, table.STATE + 1].tolist() == [0, 0, 0]
    assert rows[2, table.STATE + 2] == second.columns["exp_avg_sq"][1].data_ptr()
    assert made.chunks.tolist() == [0, 2, 2]
    assert rows[:, table.FIRST].tolist() == [0, 1, 1]

    scale = torch.ones(())
    packet = made.packet([None, scale], [None, None], [[1.0, 0.1], [1.0, -2.5]], [11, 22, 33])
    assert packet[torch.from_numpy(rows[:, table.GRAD])].tolist() == [11, 22, 33]
    group = rows[2, table.GROUP]
    assert packet[group + table.SCALE] == scale.data_ptr()
    assert packet[group + table.HYPER :].view(torch.float64)[1] == -2.5
    again = made.packet([None, scale], [None, None], [[1.0, 0.1], [1.0, -2.5]], [11, 22, 33])
    assert again is packet
    other = made.packet([None, scale], [None, None], [[1.0, 0.1], [1.0, -2.5]], [11, 22, 34])
    assert other is not packet


# ------------------------------------------------------------------------------------- compilation


def compiled(name, target, dtype, aligned=True, rounding="nearest"):
    """The assembly of a kernel, for a device that need not be there."""
    import triton
    from triton.compiler import ASTSource

    from lamina.kernels.triton import rules

    made = getattr(rules, name)
    constants = {
        **dict.fromkeys(("WEIGHT_DTYPE", "GRAD_DTYPE", "STATE_DTYPE"), rules.DTYPES[dtype]),
        **dict.fromkeys(VARIANTS[name], True),
        "ROUNDING": rounding,
        "ALIGNED": aligned,
        "BLOCK": table.BLOCK,
    }
    pointers = {"chunks": "*i32", "rows": "*i64", "packet": "*i64", "sums": "*fp32"}
    signature = {key: pointers.get(key, "constexpr") for key in made.arg_names}
    source = ASTSource(made, signature, constexprs=constants)
    result = triton.compile(source, target=target, options={"enable_fp_fusion": False})
    return result.asm["ptx" if target.backend == "cuda" else "amdgcn"]


@needs_triton
@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=() if each == "lamb" else pytest.mark.slow) for each in VARIANTS],
)
def test_compiles_for_a_device_that_is_not_there(name, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    nvidia = GPUTarget("cuda", 90, 32)
    for dtype in (torch.float32, torch.bfloat16):
        assembly = compiled(name, nvidia, dtype)
        assert "ld.global.v4" in assembly  # four numbers at once, or eight of 16 bits
        assert "sqrt.approx" not in assembly
        assert "div.full" not in assembly
        writes = not name.endswith(("_norms", "_sizes"))
        if writes and dtype in HALF:
            assert "cvt.rn.bf16" in assembly  # to the nearest
    assert "ld.global.v4" not in compiled(name, nvidia, torch.float32, aligned=False)
    for rounding in ("stochastic", "kahan", "master"):
        assert compiled(name, nvidia, torch.float16, rounding=rounding)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_for_older_and_for_other_devices(name, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for target in (GPUTarget("cuda", 75, 32), GPUTarget("hip", "gfx942", 64)):
        assert compiled(name, target, torch.float32)


# -------------------------------------------------------------------------------- what they compute


def assert_cases_pass(mark):
    options = ["-q", "-p", "no:cacheprovider", "--no-header", "-m", mark]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(CASES)],
        env=environment,
        cwd=CASES.parents[1],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@needs_triton
def test_against_the_readable_rule():
    assert_cases_pass("not slow")


@needs_triton
@pytest.mark.slow
def test_every_option_against_the_readable_rule():
    assert_cases_pass("slow")
