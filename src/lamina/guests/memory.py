"""What a guest keeps beside the state of its parameters, and how it is written and read back.

A `torch.optim.Optimizer` may keep things in four places: in the state of each parameter, in its
groups, in `state` under keys that are no parameters, and in attributes of its own, which its
`state_dict` may or may not write. The first two lie in the plan's optimizer; the others here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch

from ..errors import StateError
from .packing import UnwritableError, pack, same, unpack

#: what every group of a plan holds beside its hyperparameters; the rest is a guest's own
OURS = frozenset(
    [
        *("params", "param_names", "param_shapes", "name", "optimizer", "format", "guest"),
        *("run", "planned", "clock", "overrides", "feedback"),
    ]
)
_TORCHS = ("defaults", "state", "param_groups", "step", "_zero_grad_profile_name")


class Contents(NamedTuple):
    """Loose entries of `state`, and attributes, ready to be put in place."""

    loose: dict[Any, Any]
    attributes: dict[str, Any]


class GuestMemory:
    """What one guest keeps beside the state of its parameters; made when it is built.

    Loose entries of `state` lie here while the guest rests, since several optimizers share the
    state: `at_work` lends them.
    """

    def __init__(self, guest: torch.optim.Optimizer) -> None:
        self.loose = {k: v for k, v in guest.state.items() if not isinstance(k, torch.Tensor)}
        for key in self.loose:
            del guest.state[key]
        #: what it was built with, so that a load can begin there
        self._begun_loose = deepcopy(self.loose)
        #: values of the groups that are tensors, to which attributes may refer
        self._values = [
            value
            for group in guest.param_groups
            for value in group.values()
            if isinstance(value, torch.Tensor)
        ]
        self._initial_state = copies(guest, own_attributes(guest), self._values)

    @contextmanager
    def at_work(self, state: dict[Any, Any]) -> Iterator[None]:
        """Lend the loose entries to a state, and take them back, with those that were added."""
        state.update(self.loose)
        size = len(state)
        try:
            yield
        finally:
            if self.loose or len(state) > size:
                self.loose = {k: v for k, v in state.items() if not isinstance(k, torch.Tensor)}
                for key in self.loose:
                    del state[key]

    # --- out -----------------------------------------------------------------------------------

    def write(self, guest: torch.optim.Optimizer) -> dict[str, Any]:
        """Return all of it as plain values and tensors; what is as at build is left out."""
        parts = {
            "loose": _packed("state", self.loose),
            "attributes": self._changed(guest),
            "own": self._own(guest),
        }
        return {key: value for key, value in parts.items() if value}

    def _changed(self, guest: torch.optim.Optimizer) -> dict[str, Any]:
        known = {id(param) for group in guest.param_groups for param in group["params"]}
        known.update(map(id, self._values))
        found = {}
        for name, value in own_attributes(guest).items():
            tensors = list(_tensors(value))
            if any(id(tensor) in known for tensor in tensors):
                continue  # where it looks for its parameters and values
            now, begun = plain_form(value), plain_form(self._initial_state.get(name, ABSENT))
            # Tensors may come from the weights at build, which are others after a load.
            if now is not ABSENT and (tensors or not same(now, begun)):
                found[name] = now
        return found

    def _own(self, guest: torch.optim.Optimizer) -> dict[str, Any]:
        """Return what its own `state_dict` writes beside state and groups."""
        if type(guest).state_dict is torch.optim.Optimizer.state_dict:
            return {}
        written = apart(guest, loose=self.loose).state_dict()
        rest = {k: v for k, v in written.items() if k not in ("state", "param_groups")}
        return _packed("state_dict()", rest)

    # --- in ------------------------------------------------------------------------------------

    def read(
        self,
        guest: torch.optim.Optimizer,
        written: Mapping[str, Any],
        groups: Sequence[dict[str, Any]],
        state: Mapping[torch.Tensor, dict[str, Any]],
    ) -> Contents:
        """Return what was written, completed by what the guest was built with.

        Args:
            guest: which is not changed.
            written: what `write` returned.
            groups: its groups as they are after the load.
            state: the loaded state of their parameters.

        Raises:
            StateError: if the guest refuses what its own `state_dict` wrote.
        """
        attributes = own_attributes(guest) | copies(guest, self._initial_state, self._values)
        for name, value in dict(written.get("attributes", {})).items():
            attributes[name] = _placed(unpack(value), attributes.get(name))
        loose = deepcopy(self._begun_loose)
        for key, value in dict(written.get("loose", {})).items():
            loose[key] = _placed(unpack(value), loose.get(key))
        own = written.get("own")
        if own:
            other = apart(guest, loose=loose, attributes=attributes, state=state, groups=groups)
            try:
                other.load_state_dict({**other.state_dict(), **unpack(own)})
            except Exception as error:
                raise StateError(
                    f"the saved state does not fit the third-party optimizer "
                    f"{type(guest).__name__}: its "
                    f"load_state_dict fails ({type(error).__name__}: {error}). Nothing was loaded."
                ) from error
            attributes = own_attributes(other)
        return Contents(loose, attributes)

    def put(self, guest: torch.optim.Optimizer, contents: Contents) -> None:
        """Exchange it all for what was read."""
        for name in own_attributes(guest).keys() - contents.attributes.keys():
            del guest.__dict__[name]
        guest.__dict__.update(contents.attributes)
        self.loose = contents.loose


def own_attributes(guest: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the attributes of an optimizer that torch does not make anew itself."""
    return {
        name: value
        for name, value in vars(guest).items()
        if name not in _TORCHS and not name.startswith("_optimizer_")  # hooks, a patched `step`
    }


def apart(
    guest: torch.optim.Optimizer,
    *,
    loose: Mapping[Any, Any],
    attributes: Mapping[str, Any] | None = None,
    state: Mapping[torch.Tensor, dict[str, Any]] | None = None,
    groups: Iterable[dict[str, Any]] | None = None,
) -> torch.optim.Optimizer:
    """Return another optimizer like a guest, with copies of its groups and of its own state.

    Args:
        guest: which keeps what it has.
        loose: the entries of `state` that are no parameter's.
        attributes: instead of the guest's own.
        state: by parameter, instead of the guest's.
        groups: instead of the guest's.
    """
    other = guest.__class__.__new__(guest.__class__)
    other.__dict__.update(guest.__dict__ if attributes is None else {**vars(guest), **attributes})
    listed = list(guest.param_groups if groups is None else groups)
    entries = guest.state if state is None else state
    other.__dict__["param_groups"] = [dict(group) for group in listed]
    own = [param for group in listed for param in group["params"]]
    other.__dict__["state"] = defaultdict(
        dict, {p: dict(entries[p]) for p in own if entries.get(p)} | dict(loose)
    )
    return other


ABSENT = object()


def plain_form(value: Any) -> Any:
    """Return the plain form of a value, or `ABSENT`."""
    try:
        return pack(value)
    except UnwritableError:
        return ABSENT


def _packed(place: str, values: Mapping[Any, Any]) -> dict[Any, Any]:
    found = {}
    for key, value in values.items():
        try:
            found[key] = pack(value)
        except UnwritableError as error:
            raise StateError(
                f"a third-party optimizer keeps {error} in its {place}, under {key!r}, which a "
                "checkpoint cannot hold."
            ) from None
    return found


def copies(
    guest: torch.optim.Optimizer,
    attributes: Mapping[str, Any],
    shared: Iterable[torch.Tensor] = (),
) -> dict[str, Any]:
    """Return deep copies of attributes that still refer to the guest's parameters, and to others.

    What cannot be copied is left out: it stays as it is in every load.
    """
    params = [*shared, *(p for g in guest.param_groups for p in g["params"])]
    found = {}
    for name, value in attributes.items():
        memo: dict[int, Any] = {id(param): param for param in params}
        memo |= {id(part): part for part in (guest, guest.param_groups, guest.state)}
        try:
            found[name] = deepcopy(value, memo)
        except Exception:
            continue
    return found


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Return all tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _tensors(key)
            yield from _tensors(each)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for each in value:
            yield from _tensors(each)


def _placed(value: Any, like: Any) -> Any:
    """Return a loaded value, copied to where the guest had it."""
    if isinstance(value, torch.Tensor):
        device = like.device if isinstance(like, torch.Tensor) else value.device
        return value.detach().to(device=device, copy=True)
    return deepcopy(value)
