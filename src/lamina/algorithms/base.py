"""What an algorithm is: its hyperparameters, its state and one pure update rule."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar

import torch

from .._util.sharding import unit_refusal
from ..errors import HyperparameterError, did_you_mean

Hyper = Mapping[str, Any]
#: dtypes that are computed with in float32
HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *HALF)
#: state tensors that a rounding other than to the nearest adds (see `rounding`)
ROUNDING_ENTRIES = ("compensation", "master")
State = dict[str, torch.Tensor]


class Method:
    """The name and the hyperparameters of an optimization method, as a value without tensors.

    Subclasses are final. `defaults` are torch's where torch has the method.
    """

    name: ClassVar[str]
    #: what one update needs to see: "element", "tensor" (its norm), or "vector" (all parameters)
    unit: ClassVar[str] = "element"
    defaults: ClassVar[dict[str, Any]]
    #: `low <= value < below` of the numbers with another range than the usual one, 0 and above
    limits: ClassVar[dict[str, tuple[float, float]]] = {}
    #: hyperparameters that choose a variant and cannot be scheduled; all others are numbers, or
    #: several of them, as the default is
    options: ClassVar[tuple[str, ...]] = ()
    #: the values of those options that are neither True or False
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {}
    #: hyperparameters that count something
    counts: ClassVar[tuple[str, ...]] = ()
    #: hyperparameters that may be infinite
    unbounded: ClassVar[tuple[str, ...]] = ()
    #: whether a gradient may be sparse
    sparse: ClassVar[bool] = False

    def check(self, hyper: Hyper) -> None:
        """Raise `HyperparameterError` if a hyperparameter is unknown or out of its range."""
        for key, value in hyper.items():
            self._refuse_unknown(key)
            expected = ""
            if key in self.choices:
                if value not in self.choices[key]:
                    expected = f"one of {', '.join(map(repr, self.choices[key]))}."
                    expected += did_you_mean(str(value), map(str, self.choices[key]))
            elif key in self.options:
                if value not in (True, False):
                    expected = "True or False."
            elif key in self.unbounded and value == math.inf:
                continue
            elif value is not None or self.defaults[key] is not None:
                for label, number in self._numbers(key, value):
                    check_number(self.name, label, number, *self.limits.get(key, (0.0, math.inf)))
                if key in self.counts and value != int(value):
                    expected = "a whole number."
            if expected:
                raise HyperparameterError(
                    f"{self.name} was given {key}={value!r}; expected {expected}"
                )

    def refusal(self, param: torch.Tensor) -> str:
        """Return why this method cannot train a tensor at all (of its shape, say), or ""."""
        return unit_refusal(self.name, self.unit, param)

    def _refuse_unknown(self, key: str) -> None:
        """Raise `HyperparameterError` if `key` is not a hyperparameter of this algorithm."""
        if key not in self.defaults:
            raise HyperparameterError(
                f"{self.name} has no hyperparameter {key!r}; it has "
                f"{', '.join(self.defaults)}.{did_you_mean(key, self.defaults)}"
            )

    def _numbers(self, key: str, value: Any) -> list[tuple[str, Any]]:
        """Return the single numbers in a value, each with the name an error shows."""
        default = self.defaults[key]
        if not isinstance(default, tuple):
            return [(key, value)]
        count = len(default)
        if isinstance(value, torch.Tensor) and value.ndim == 1:
            value = tuple(value)
        if not isinstance(value, (tuple, list)) or len(value) != count:
            raise HyperparameterError(
                f"{self.name} was given {key}={value!r}; expected {count} numbers, "
                f"as in {default!r}."
            )
        return [(f"{key}[{index}]", number) for index, number in enumerate(value)]

    def __repr__(self) -> str:
        return self.name


class Algorithm(Method, ABC):
    """A method that updates every parameter by itself; `update` is its readable rule.

    Every fast kernel is tested against the rule.
    """

    #: the tensors that it may keep for a parameter under any settings, each as large as the
    #: parameter; what `init` gives is among them
    buffers: ClassVar[tuple[str, ...]]
    #: the options that decide which of them there are
    state_options: ClassVar[tuple[str, ...]] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """The state tensors of a parameter: those of the rule, and those of its rounding."""
        return (*self.buffers, *ROUNDING_ENTRIES)

    def init(self, param: torch.Tensor, hyper: Hyper) -> State:
        """Return the state of a parameter that was never updated, without `step`: zeros.

        It lacks the entries that begin to exist with the first update that needs them.
        """
        return zeros(param, *self.buffers)

    @abstractmethod
    def update(
        self, param: torch.Tensor, grad: torch.Tensor, state: State, step: int, hyper: Hyper
    ) -> tuple[torch.Tensor, State]:
        """Return the change of `param`, and the new state; pure: no argument is modified.

        `step` is the number of updates of this parameter, this one included (1 for the first). On
        an accelerator it is a float64 scalar there, which is not to be read.
        16-bit tensors are computed with in float32 and the change is returned in float32, so that
        `param` is rounded once; the state has the dtype it had. Complex parameters arrive as pairs
        of real numbers (`torch.view_as_real`).
        """


@dataclass(slots=True)
class Batch:
    """The tensors of one parameter group that are updated together in one step.

    `columns[key][i]` is the state tensor `key` of `params[i]`, or None where it does not exist yet;
    `steps[i]` its scalar step count (float32), counted before this update. `scale`, if given, is a
    scalar tensor that multiplies every gradient (the clip factor). `found_inf`, if given, is a
    float32 scalar on the device of the parameters: 1.0 where a gradient of the step is not finite,
    and then the update changes nothing; else 0.0.

    A batch may be kept for many steps: only `grads`, `hyper`, `scale` and `found_inf` may be
    changed then, or
    `kernel` must be set to None. `known_grads` is the list of gradients whose forms are as in the
    step before, and `suited` the kernel that was ready for them, with the reason.
    """

    algorithm: Algorithm
    params: list[torch.Tensor]
    grads: list[torch.Tensor]
    columns: dict[str, list[Any]]
    steps: list[torch.Tensor]
    hyper: Hyper
    scale: torch.Tensor | None = None
    names: list[str] = field(default_factory=list)
    #: the choice made for these tensors, kept by `kernels.choose`
    kernel: Any = None
    #: what the kernel has prepared for this batch and those that follow it
    prepared: Any = None
    #: the name of the kernel to use where it can be
    prefer: str | None = None
    #: set when an update put new tensors into `columns`; the holder of the state stores them
    has_new_state: bool = False
    known_grads: list[torch.Tensor] | None = None
    suited: Any = None
    found_inf: torch.Tensor | None = None
    #: names of parameters whose weights others changed while the state has a copy of them
    followed: set[str] = field(default_factory=set)

    def forget_gradients(self) -> None:
        """Let go of the gradients after a step, so that `zero_grad` frees their memory."""
        self.grads = self.known_grads = []

    def name_of(self, index: int) -> str:
        """Return what an error calls the parameter at `index`."""
        if index < len(self.names):
            return repr(self.names[index])
        return f"number {index} (shape {tuple(self.params[index].shape)})"


def check_number(
    name: str, key: str, value: object, low: float = 0.0, below: float = math.inf
) -> None:
    """Raise `HyperparameterError` unless `low <= value < below` (a finite number)."""
    number: Any = value
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        number = value.item()
    is_number = isinstance(number, Real) and not isinstance(number, bool)
    if is_number and math.isfinite(number) and low <= number < below:
        return
    limit = (f"{low:g} <= " if low > -math.inf else "") + key
    limit += f" < {below:g}" if below < math.inf else ", finite"
    raise HyperparameterError(f"{name} was given {key}={value!r}; expected a number, {limit}.")


def dtype_name(where: str, dtype: torch.dtype | str | None) -> str | None:
    """Return a `state_dtype` by its name, since groups and state dicts hold plain values."""
    known = {str(each).removeprefix("torch."): each for each in _DTYPES}
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in known:
        raise HyperparameterError(
            f"{where} was given state_dtype={dtype!r}; expected None or one of {', '.join(known)}."
        )
    return name


def state_dtype_of(param: torch.Tensor, hyper: Hyper) -> torch.dtype:
    """Return the dtype of new state: the parameter's, unless `state_dtype` is given.

    Beside float32 master weights it is float32, so that all of the update is that of float32.
    """
    wanted = hyper.get("state_dtype")
    if wanted is None or not param.is_floating_point():
        beside_master = param.dtype in HALF and hyper.get("rounding") == "master"
        return torch.float32 if beside_master else param.dtype
    dtype: torch.dtype = getattr(torch, wanted)
    return dtype


def number(value: Any) -> float:
    """Return a hyperparameter as a Python number; a tensor on an accelerator is waited for.

    Under autograd a tensor that requires a gradient stays one.
    """
    if not isinstance(value, torch.Tensor):
        return float(value)
    if value.requires_grad and torch.is_grad_enabled():
        return value  # type: ignore[return-value]
    return float(value.item())


def numbers(hyper: Hyper, *keys: str) -> tuple[float, ...]:
    """Return several hyperparameters, each as `number` does."""
    return tuple(number(hyper[key]) for key in keys)


def betas(hyper: Hyper) -> tuple[float, float]:
    """Return the two decay rates of Adam and its relatives, each as `number` does."""
    beta1, beta2 = hyper["betas"]
    return number(beta1), number(beta2)


def zeros(param: torch.Tensor, *keys: str) -> State:
    """Return state of a parameter that begins as zeros."""
    return {key: torch.zeros_like(param, requires_grad=False) for key in keys}


def root(value: float) -> float:
    """Return the square root of what `number` returned."""
    return math.sqrt(value) if isinstance(value, float) else value**0.5


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in a dtype fit for arithmetic: float32 for 16-bit floats, else its own."""
    return tensor.float() if tensor.dtype in HALF else tensor


def times(grad: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply a gradient by a scalar, at the higher of the two precisions."""
    wide = grad.to(torch.promote_types(grad.dtype, factor.dtype))
    return (wide * factor.to(grad.device)).to(grad.dtype)


def trust_ratio(weight: torch.Tensor, update: torch.Tensor, damped: torch.Tensor) -> torch.Tensor:
    """Return `weight / damped` of two norms (or lists of them); 1 where a norm is 0.

    A tensor that starts at zero could otherwise never leave it.
    """
    alive = (weight > 0) & (update > 0)
    return torch.where(alive, weight / torch.where(alive, damped, 1), 1)
