"""The Triton kernel: which batches it takes, and what it launches for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from itertools import chain
from typing import Any, ClassVar, NamedTuple, final

import torch

from ..._util.blocks import PLAIN, is_dense
from ..._util.tensors import addresses
from ...algorithms.base import HALF, ROUNDING_ENTRIES, Batch, Hyper, number, state_dtype_of
from ...algorithms.lamb import LAMB
from ...algorithms.lars import LARS
from ...algorithms.layer_adaptive import LayerAdaptiveAdam
from ...algorithms.rmsprop import RMSprop
from ...algorithms.rounding import has_noisy_state, needed_entry, rounding_of
from ..base import Kernel, begin_momentum, short
from ..fused import step_refusal
from .table import BLOCK, Table, float32_on

DTYPES = (torch.float32, *HALF)
_DEVICES = ("cuda", "xpu")


class Form(NamedTuple):
    """How a rule is launched; its kernels are in `rules.py`."""

    #: the kernels, in turn
    launches: tuple[str, ...]
    #: the hyperparameters in the order in which the kernels read them, after the gradient's sign
    hypers: Callable[[Hyper], tuple[Any, ...]]
    #: the state in the order of the rule's `buffers`; None for what is not used now
    state: Callable[[Hyper], tuple[str | None, ...]]
    #: what is compiled apart
    variant: Callable[[Hyper], Mapping[str, bool]]


class Launch(NamedTuple):
    """What batches have in common that are updated in one launch."""

    rule: type
    device: torch.device
    weight: torch.dtype
    grad: torch.dtype
    state: torch.dtype
    rounding: str
    keys: tuple[str | None, ...]
    variant: tuple[tuple[str, bool], ...]


@final
class Triton(Kernel):
    """One launch for all tensors of all groups, two for rules with norms; nothing waits for it.

    The kernels walk raw memory, so that layouts are compared here, with the gradients' at every
    step. The clip factor and the flag for a gradient that is not finite are read on the device.

    Args:
        devices: the types of devices whose tensors are taken. Tests add the CPU, for Triton's
            interpreter.
    """

    name: ClassVar[str] = "triton"
    about: ClassVar[str] = "one Triton kernel over all tensors, each result rounded once"
    #: `run` changes nothing where `found_inf` of a batch is not 0
    masks: ClassVar[bool] = True

    def __init__(self, devices: Sequence[str] = _DEVICES) -> None:
        self._devices = tuple(devices)

    def refusal(self, batch: Batch) -> str:
        """Refuse rules that are not written for Triton, and memory that they cannot walk."""
        if type(batch.algorithm) not in FORMS:
            return f"there is no Triton form of {batch.algorithm.name}"
        dtypes: set[torch.dtype] = set()
        for index in range(len(batch.params)):
            if reason := self._tensor_refusal(batch, index):
                return f"{batch.name_of(index)} {reason}"
            dtypes |= _state_dtypes(batch, index)
        if len(dtypes) > 1:
            return f"its state is {' and '.join(sorted(map(short, dtypes)))}"
        return toolchain_refusal(self, batch.params[0].device)

    def _tensor_refusal(self, batch: Batch, index: int) -> str:
        param = batch.params[index]
        if param.device.type not in self._devices:
            return f"is on {param.device.type}"
        if type(param) not in PLAIN:
            return f"is a {type(param).__name__}"
        if param.dtype not in DTYPES:
            return f"is {short(param.dtype)}"
        if not is_dense(param):
            return "has gaps in memory"
        if param.dtype is torch.float32 and has_noisy_state(param, batch.hyper):
            return "is float32, and its state of 16 bits is rounded by chance"
        for key, values in batch.columns.items():
            if reason := _state_refusal(param, values[index]):
                return f"has a {key} that {reason}"
        return step_refusal(param, batch.steps[index])

    def ready(self, batch: Batch) -> bool:
        """Accept plain gradients of one dtype, laid out as their parameters."""
        dtype = batch.grads[0].dtype
        return dtype in DTYPES and all(
            grad.dtype is dtype and _same_layout(grad, param)
            for param, grad in zip(batch.params, batch.grads, strict=True)
        )

    def run(self, batches: Sequence[Batch]) -> None:
        """Launch once for all batches that are alike."""
        launches: dict[Launch, list[Batch]] = {}
        for batch in batches:
            launches.setdefault(_launch_of(batch), []).append(batch)
        for launch, members in launches.items():
            with _current(launch.device):
                _update(launch, members)


def _same_layout(grad: torch.Tensor, param: torch.Tensor) -> bool:
    if grad.layout is not torch.strided or type(grad) not in PLAIN or grad.is_neg():
        return False
    if grad.shape != param.shape or grad.device != param.device:
        return False
    return grad.stride() == param.stride() or (grad.is_contiguous() and param.is_contiguous())


def _state_refusal(param: torch.Tensor, value: torch.Tensor | None) -> str:
    """Return why the kernels cannot read this state of a parameter, or ""."""
    if value is None:
        return ""
    if type(value) not in PLAIN or value.layout is not torch.strided:
        return "is not a plain dense tensor"
    if value.dtype not in DTYPES:
        return f"is {short(value.dtype)}"
    if value.device != param.device or value.shape != param.shape:
        return f"is on {value.device}, with the shape {tuple(value.shape)}"
    return "" if value.stride() == param.stride() else "lies in another order in memory"


def _state_dtypes(batch: Batch, index: int) -> set[torch.dtype]:
    """Return the dtypes of the state of a parameter, of a buffer that may begin too."""
    columns = [batch.columns[key] for key in batch.columns if key not in ROUNDING_ENTRIES]
    values = [column[index] for column in columns]
    found = {value.dtype for value in values if value is not None}
    if "momentum" in batch.algorithm.defaults:
        buffers = batch.columns.get("momentum_buffer")
        if buffers is None or buffers[index] is None:
            found.add(state_dtype_of(batch.params[index], batch.hyper))
    return found


@cache
def toolchain_refusal(kernel: Triton, device: torch.device) -> str:
    """Return why nothing can be compiled for a device, or "": tried once, on one element."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    one = torch.ones(1, device=device)
    hyper = RMSprop.defaults
    batch = Batch(
        algorithm=RMSprop(),
        params=[one],
        grads=[one.clone()],
        columns={"square_avg": [torch.zeros_like(one)]},
        steps=[one.clone()],
        hyper=hyper,
    )
    try:
        from . import rules

        is_on_cpu = device.type == "cpu"
        if is_on_cpu != rules.IS_INTERPRETED:  # it would read an address of the device as its own
            return (
                "on the CPU there is only Triton's interpreter (TRITON_INTERPRET=1), and only there"
            )
        kernel.run([batch])
    except Exception as error:  # of a compiler, a driver, or a package that is half installed
        reason = str(error).strip().splitlines() or [""]
        return f"Triton failed on {device.type} ({type(error).__name__}: {reason[0]})"
    return ""


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which a device is the one that launches go to."""
    if device.type == "cpu":
        return nullcontext()
    context: AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return context


def _launch_of(batch: Batch) -> Launch:
    form, hyper, param = FORMS[type(batch.algorithm)], batch.hyper, batch.params[0]
    if "momentum_buffer" in form.state(hyper):
        begin_momentum(batch)
    state = form.state(hyper)
    used = [batch.columns[key][0].dtype for key in state if key]
    return Launch(
        rule=type(batch.algorithm),
        device=param.device,
        weight=param.dtype,
        grad=batch.grads[0].dtype,
        state=used[0] if used else param.dtype,
        rounding=rounding_of(param, hyper) or "nearest",
        keys=(*state, needed_entry(param, hyper)),
        variant=tuple(form.variant(hyper).items()),
    )


def _update(launch: Launch, batches: Sequence[Batch]) -> None:
    """Update batches that are alike."""
    from . import rules

    form = FORMS[launch.rule]
    hypers = [_on_device((_sign(batch.hyper), *form.hypers(batch.hyper))) for batch in batches]
    table = batches[0].prepared
    if not isinstance(table, Table) or not table.holds(batches, launch.keys):
        table = batches[0].prepared = Table(batches, launch.keys, len(hypers[0]))
    if not table.programs:
        return
    grads = addresses([*chain.from_iterable(batch.grads for batch in batches)])
    # Kept in these lists until the launch: the packet has only their addresses.
    scales = [float32_on(launch.device, batch.scale) for batch in batches]
    flags = [float32_on(launch.device, batch.found_inf) for batch in batches]
    packet = table.packet(scales, flags, hypers, grads)
    for name in form.launches:
        getattr(rules, name)[(table.programs,)](
            table.chunks,
            table.rows,
            packet,
            table.sums,
            WEIGHT_DTYPE=rules.DTYPES[launch.weight],
            GRAD_DTYPE=rules.DTYPES[launch.grad],
            STATE_DTYPE=rules.DTYPES[launch.state],
            ROUNDING=launch.rounding,
            ALIGNED=table.aligned and not any(address & 15 for address in grads),
            **dict(launch.variant),
            BLOCK=BLOCK,
            enable_fp_fusion=False,  # each operation is rounded by itself, as torch's are
        )


def _sign(hyper: Hyper) -> float:
    return -1.0 if hyper["maximize"] else 1.0


def _on_device(values: Sequence[Any]) -> list[Any]:
    """Return numbers, and tensors where they are on an accelerator, which is not waited for."""
    return [value if _is_on_device(value) else number(value) for value in values]


def _is_on_device(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_cpu


def _has_momentum(hyper: Hyper) -> bool:
    """Return whether there is a momentum; one that lies on an accelerator is taken for one."""
    return _is_on_device(hyper["momentum"]) or bool(hyper["momentum"])


def _buffer(hyper: Hyper) -> str | None:
    return "momentum_buffer" if _has_momentum(hyper) else None


def _rmsprop_hypers(hyper: Hyper) -> tuple[Any, ...]:
    return tuple(hyper[key] for key in ("lr", "alpha", "eps", "weight_decay", "momentum"))


def _lars_hypers(hyper: Hyper) -> tuple[Any, ...]:
    keys = ("lr", "momentum", "weight_decay", "trust_coefficient", "eps")
    return tuple(hyper[key] for key in keys)


def _adam_hypers(hyper: Hyper) -> tuple[Any, ...]:
    return (hyper["lr"], *hyper["betas"], hyper["eps"], hyper["weight_decay"])


FORMS: dict[type, Form] = {
    RMSprop: Form(
        launches=("rmsprop",),
        hypers=_rmsprop_hypers,
        state=lambda hyper: (
            "square_avg",
            _buffer(hyper),
            "grad_avg" if hyper["centered"] else None,
        ),
        variant=lambda hyper: {
            "CENTERED": bool(hyper["centered"]),
            "MOMENTUM": _has_momentum(hyper),
        },
    ),
    LARS: Form(
        launches=("lars_norms", "lars"),
        hypers=_lars_hypers,
        state=lambda hyper: (_buffer(hyper), None, None),
        variant=lambda hyper: {"MOMENTUM": _has_momentum(hyper)},
    ),
    LAMB: Form(
        launches=("lamb_norms", "lamb"),
        hypers=_adam_hypers,
        state=lambda hyper: ("exp_avg", "exp_avg_sq", None),
        variant=lambda hyper: {},
    ),
    LayerAdaptiveAdam: Form(
        launches=("layer_adaptive_sizes", "layer_adaptive"),
        hypers=_adam_hypers,
        state=lambda hyper: (
            "exp_avg",
            "exp_avg_sq",
            "max_exp_avg_sq" if hyper["amsgrad"] else None,
        ),
        variant=lambda hyper: {
            "AMSGRAD": bool(hyper["amsgrad"]),
            "DECOUPLED": bool(hyper["decoupled_weight_decay"]),
        },
    ),
}
