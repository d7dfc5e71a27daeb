"""What the drop-in optimizers share: torch's interface, with errors that name the parameter."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from .. import kernels
from .._util.notices import warn
from .._util.numbers import is_number, python_number
from .._util.text import listed
from ..algorithms import ALGORITHMS
from ..algorithms.base import ROUNDING_ENTRIES, Batch, Method, dtype_name, state_dtype_of
from ..algorithms.rounding import entry_dtype, needed_entry, rounding_name, tell_followed
from ..errors import HyperparameterError, PlanError, StateError, did_you_mean
from ..kernels.base import short
from ..kernels.capture import refuse_host_reads
from ..model.suggestions import ALIASES
from .engine import Engine, shown_names
from .loading import check_form, loss_of_digits, matching_groups


def arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor from its `locals()`, asked for before anything else.

    So that a signature is the only place that lists them.
    """
    return {key: value for key, value in given.items() if key not in ("self", "__class__")}


class DropIn(Engine):
    """An optimizer without a plan: `param_groups` decides, as in torch.

    `state_dtype` is lamina's own: the dtype of new state, where torch takes the parameter's. So is
    `rounding`: how 16-bit weights are rounded, where torch takes the nearest.
    """

    algorithm: ClassVar[Method]

    def __init__(
        self,
        params: ParamsT,
        *,
        state_dtype: torch.dtype | str | None = None,
        rounding: str | None = None,
        **settings: Any,
    ) -> None:
        name = type(self).__name__
        self._refuse_implementation(name, settings)
        self.algorithm.check({k: v for k, v in settings.items() if k not in _IMPLEMENTATION})
        own = {
            "state_dtype": dtype_name(name, state_dtype),
            "rounding": rounding_name(name, rounding),
        }
        super().__init__(params, {**settings, **own})
        self.defaults = {key: self._plain(key, value) for key, value in self.defaults.items()}
        if not settings.get("differentiable"):
            # a tensor belongs to the groups: a group that is added later gets what was given here
            self.defaults = {key: _own(value) for key, value in self.defaults.items()}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: a dict with "params" and, if it likes, its own hyperparameters.

        Raises:
            PlanError: for a tensor that cannot be trained, that is there already, or a
                hyperparameter out of its range; nothing was added.
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise PlanError(
                f"add_param_group was given {param_group!r}; expected a dict such as "
                "{'params': layer.parameters(), 'lr': 1e-3}."
            )
        group = dict(param_group)
        given = group["params"]
        if isinstance(given, torch.Tensor):
            group["params"] = [given]
        elif not isinstance(given, set):  # which torch refuses, as it has no order
            group["params"] = list(given)
        names, params = _split(group)
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        where = f"{type(self).__name__}, parameter group {len(self.param_groups)} ({shown})"
        differentiable = group.get("differentiable", self.defaults.get("differentiable"))
        self._check_params(where, names, params)
        if "state_dtype" in group:
            group["state_dtype"] = dtype_name(where, group["state_dtype"])
        rounding = rounding_name(where, group.get("rounding"))
        if self.algorithm.unit == "vector" and rounding not in (None, "nearest"):
            raise HyperparameterError(
                f"{where} was given rounding={rounding!r}, but {self.algorithm.name} moves all "
                "parameters along one vector and rounds to the nearest; keep them in float32."
            )
        for key, default in self.defaults.items():
            group.setdefault(key, default)
        for key, value in group.items():
            if isinstance(value, torch.Tensor) and key != "params" and not differentiable:
                used = any(other.get(key) is value for other in self.param_groups)
                group[key] = _own(value) if used else value
        try:
            self.algorithm.check({k: v for k, v in group.items() if k in self.algorithm.defaults})
        except HyperparameterError as error:
            raise HyperparameterError(f"{where}: {error}") from error
        self._refuse_implementation(where, group)
        group = {k: v if k == "params" else self._plain(k, v) for k, v in group.items()}
        self._warn_of_unread(where, param_group)
        super().add_param_group(group)

    def _warn_of_unread(self, where: str, given: Mapping[str, Any]) -> None:
        """Warn of keys that neither the optimizer nor a scheduler reads; torch ignores them too."""
        known = [key for key in self.defaults if key not in _IMPLEMENTATION]
        told = self.__dict__.setdefault("_unread", set())
        for key, value in given.items():
            label = str(key).startswith("_") or isinstance(value, str)
            if label or key in {*self.defaults, *_READ_ELSEWHERE, *told}:
                continue
            told.add(key)
            warn(
                f"{where}: nothing reads the key {key!r}, so that it has no effect."
                f"{_instead(key, given, known)}"
            )

    def _refuse_implementation(self, where: str, given: Mapping[str, Any]) -> None:
        if given.get("differentiable"):
            if "differentiable" not in inspect.signature(type(self)).parameters:
                raise HyperparameterError(
                    f"{where}: {type(self).__name__} has no differentiable form; SGD, RMSprop, "
                    "Adam and AdamW have."
                )
            if given.get("rounding") not in (None, "nearest"):
                raise HyperparameterError(
                    f"{where}: differentiable=True records the update by autograd, which cannot go "
                    f"through rounding={given['rounding']!r}; leave one of them out."
                )
            for key in ("fused", "foreach", "capturable"):
                if given.get(key):
                    raise HyperparameterError(
                        f"{where}: differentiable=True goes by the rule as it is written, one "
                        f"tensor at a time, and {key}=True by another way; leave one of them out."
                    )
        if given.get("fused") and given.get("foreach"):
            raise HyperparameterError(f"{where}: fused and foreach cannot both be True.")

    def _plain(self, key: str, value: Any) -> Any:
        """Return a value as Python's: a NumPy number in a group makes checkpoints unloadable."""
        if isinstance(value, (tuple, list)):
            return type(value)(map(python_number, value))
        value = python_number(value)
        return bool(value) if isinstance(self.algorithm.defaults.get(key), bool) else value

    def _check_params(self, where: str, names: list[str], params: list[Any]) -> None:
        seen = {
            id(param): name
            for index, group in enumerate(self.param_groups)
            for name, param in zip(shown_names(group, index), group["params"], strict=True)
        }
        for name, param in zip(names, params, strict=True):
            if not isinstance(param, torch.Tensor):
                raise PlanError(f"{where}: {name} is a {type(param).__name__}; expected a tensor.")
            computed = not (param.is_leaf or param.retains_grad)
            if computed and not self.defaults.get("differentiable"):  # as in torch
                raise PlanError(
                    f"{where}: {name} is not a leaf tensor (it was computed from others, as by "
                    ".to() or an operation), so it never gets a gradient; pass the original."
                )
            if id(param) in seen:
                raise PlanError(
                    f"{where}: {name} is the same tensor as {seen[id(param)]}; it would be updated "
                    "twice in a step. Tied parameters belong into the optimizer once."
                )
            reason = self.algorithm.refusal(param)
            if reason:
                raise PlanError(f"{where}: {name} {reason}.")
            seen[id(param)] = name

    def _update(self) -> None:
        """Update the groups that ask for it under autograd, and the others as ever."""
        batches = self._collect(self.param_groups)
        for batch in batches:
            if batch.hyper.get("capturable"):
                _refuse_uncapturable(batch)
        if batches and batches[0].params[0].is_cuda:
            refuse_host_reads(batches)
        for batch in batches:
            if batch.hyper.get("differentiable"):
                kernels.differentiate(batch)
        own = [batch for batch in batches if not batch.hyper.get("differentiable")]
        kernels.carry_out(kernels.assign(own))
        self._store_new_state(batches)
        for batch in batches:
            batch.forget_gradients()
        tell_followed(batches)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state and its hyperparameters, lamina's or torch's.

        By name, if the saved parameters and those here have the same names in any order and
        groups; else by position, with a warning if both have names. As in torch, except that a
        hyperparameter which the saved groups lack keeps its value here, and that tensors are
        copied. State gets the dtype that a new optimizer would give it: that of `state_dtype`, or
        else that of its parameter; a warning says where this loses digits.

        Raises:
            StateError: if it does not fit; nothing was changed.
        """
        check_form(state_dict)
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        whole = self.algorithm.unit == "vector" and any(map(len, state_dict["state"].values()))
        saved = matching_groups(self.param_groups, state_dict["param_groups"], ordered=whole)
        params: dict[Any, tuple[torch.Tensor, dict[str, Any], str]] = {}
        groups: list[dict[str, Any]] = []
        for old, new in zip(self.param_groups, saved, strict=True):
            # Not a hyperparameter as torch's are: what was asked for here is not lost.
            new["state_dtype"] = old["state_dtype"] or new.get("state_dtype")
            asked = rounding_name("the state", new.get("rounding"))
            new["rounding"] = old.get("rounding") or asked
            names = new.get("param_names") or [f"parameter number {key}" for key in new["params"]]
            rows = zip(new["params"], old["params"], names, strict=True)
            params.update({key: (param, new, name) for key, param, name in rows})
            kept = deepcopy({key: value for key, value in old.items() if key != "params"})
            groups.append({**kept, **new, "params": old["params"]})
        state: dict[Any, Any] = {}
        converted: dict[tuple[str, str], list[str]] = {}
        dropped: list[str] = []
        for key, entry in state_dict["state"].items():
            if key not in params:
                state[key] = entry
                continue
            param, group, name = params[key]
            state[param] = _fit_entry(name, param, group, entry)
            if any(k in entry and k not in state[param] for k in ROUNDING_ENTRIES):
                dropped.append(name)
            lost = _lost_digits(entry, state[param]) if group["state_dtype"] is None else None
            if lost is not None:
                converted.setdefault(lost, []).append(name)
        _tell_of_losses(converted, dropped)
        self.state.clear()
        self.state.update(state)
        self._kept_batches.clear()
        # The list is changed in place: through the wrapper of a trainer, an assignment would land
        # in the wrapper. The dicts are new, as torch's are: by that, schedulers tell a restored
        # learning rate from an edit by hand.
        self.param_groups[:] = groups
        self.__setstate__({})  # a subclass fills in what older states lack, as in torch
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


#: group keys that schedulers, torch itself or people's logs read
_READ_ELSEWHERE = (
    *("params", "param_names", "name", "group_name", "initial_lr", "max_lr", "min_lr"),
    *("base_momentum", "max_momentum", "swa_lr", "lr", "fused", "foreach", "maximize"),
)
_IMPLEMENTATION = ("foreach", "capturable", "differentiable", "fused")


def _instead(key: str, group: Mapping[str, Any], known: list[str]) -> str:
    """Return what was most likely meant by a key that nothing reads."""
    value, lr = group[key], group.get("lr")
    target, _, form = ALIASES.get(key.lower(), "").partition("=")
    if form == "lamina.times({})":
        product = f"{lr * value:.6g}" if is_number(lr) and is_number(value) else f"lr * {value!r}"
        return f" Give the group its learning rate: 'lr': {product}."
    if target in known:
        return f" Write {target!r}: {form.format(repr(value))}."
    return did_you_mean(key, known)


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _split(group: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """Return what errors call the parameters of a new group, and the parameters."""
    items = list(group["params"])
    names = [
        repr(item[0]) if isinstance(item, tuple) else f"number {index}"
        for index, item in enumerate(items)
    ]
    return names, [item[1] if isinstance(item, tuple) else item for item in items]


def _refuse_uncapturable(batch: Batch) -> None:
    kernel, reason = kernels.choose(batch)
    on_cpu = next((i for i, param in enumerate(batch.params) if param.is_cpu), None)
    if kernel.name == "readable" or on_cpu is not None:
        what = reason if on_cpu is None else f"{batch.name_of(on_cpu)} is on the CPU"
        raise PlanError(f"capturable=True needs an accelerator and a fast kernel, but {what}.")


def _tell_of_losses(
    converted: Mapping[tuple[str, str], Sequence[str]], dropped: Sequence[str]
) -> None:
    """Warn of what a load does not keep: digits, and state of another rounding."""
    for (before, now), its in converted.items():
        warn(loss_of_digits(its, before, now))
    if dropped:
        warn(
            f"the saved state has a 'master' or 'compensation' of {listed(dropped)}, which the "
            "rounding here does not use: it was dropped."
        )


def _lost_digits(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the dtypes of a state before and now, if it has less precision than was saved."""
    for key, value in saved.items():
        if key in _SHAPED and isinstance(value, torch.Tensor) and key in now:
            dtype = now[key].dtype
            if torch.promote_types(value.dtype, dtype) is not dtype:
                return short(value.dtype), short(dtype)
    return None


def _fit_entry(
    name: str, param: torch.Tensor, group: Mapping[str, Any], entry: Any
) -> dict[str, Any]:
    """Return the saved state of a parameter, on its device and in its dtype, as new tensors."""
    fitted: dict[str, Any] = {}
    for key, value in dict(entry).items():
        if key == "step":
            step = torch.as_tensor(value, dtype=torch.float32)
            fitted[key] = step.to(kernels.step_device(param), copy=True)
            continue
        if key in _SHAPED and isinstance(value, torch.Tensor):
            if value.shape != param.shape:
                raise StateError(
                    f"the saved {key} of {name} has shape {tuple(value.shape)}, but the parameter "
                    f"has {tuple(param.shape)}; nothing was loaded."
                )
            if value.is_complex() != param.is_complex():
                raise StateError(
                    f"the saved {key} of {name} is of type {short(value.dtype)}, and the parameter "
                    f"is {short(param.dtype)}; nothing was loaded."
                )
        if key not in ROUNDING_ENTRIES:
            fitted[key] = _fit(param, state_dtype_of(param, group), value)
        elif key == needed_entry(param, group):
            fitted[key] = _fit(param, entry_dtype(param, key), value)
    return fitted


#: state that is as large as its parameter
_SHAPED = {key for algorithm in ALGORITHMS.values() for key in algorithm.tensors}


def _fit(param: torch.Tensor, wanted: torch.dtype, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        dtype = value.dtype
        if value.is_floating_point() and param.is_floating_point():
            dtype = wanted
            if value.shape != param.shape and dtype.itemsize < 4:
                dtype = torch.float32  # vectors of L-BFGS, which computes in float32
        return value.to(device=param.device, dtype=dtype, copy=True)
    if isinstance(value, (list, tuple)):
        return type(value)(_fit(param, wanted, each) for each in value)
    return value
