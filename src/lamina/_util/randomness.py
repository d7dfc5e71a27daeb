"""The random sources of a process, and how to put all of them back."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..errors import StateError

#: what `Randomness.now` gives: plain values and tensors, by source
State = Mapping[str, Any]


class Randomness:
    """The random sources of this process: Python, NumPy, torch, the device, and the loaders' own.

    Args:
        device: that of the model.
        loaders: whose generators (their samplers' and data sets' too) belong to the run.
    """

    def __init__(self, device: torch.device, *loaders: DataLoader[Any]) -> None:
        self._kinds = ("cpu",) if device.type == "cpu" else ("cpu", device)
        self._device = None if device.type == "cpu" else torch.get_device_module(device)
        self._loaders = loaders

    def now(self) -> dict[str, Any]:
        """Return the state of every source."""
        # NumPy's global source: tasks draw from it.
        name, keys, *rest = np.random.get_state()  # noqa: NPY002
        state = {
            "python": random.getstate(),
            "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
            "torch": torch.get_rng_state(),
            "generators": {key: own.get_state() for key, own in self._generators().items()},
        }
        if self._device is not None:
            state["device"] = self._device.get_rng_state()
        return state

    def set(self, state: State) -> None:
        """Put every source back; a generator that is not made yet is left to its maker."""
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
        torch.set_rng_state(state["torch"])
        if self._device is not None and "device" in state:
            self._device.set_rng_state(state["device"])
        saved = {_place(key): value for key, value in state["generators"].items()}
        for key, own in self._generators().items():
            if key in saved:
                own.set_state(saved[key])

    def check(self, state: State) -> None:
        """Raise `StateError` unless a state can be set; every source stays as it is."""
        now = self.now()
        try:
            self.set(state)
            for saved in state["generators"].values():  # also of those that are not made yet
                self._refuse_misfit(saved)
        except Exception as error:  # whatever a source says of what is not its state
            raise StateError(
                f"a random state cannot be set ({error!r}); it was changed by hand, or saved by "
                "another version of Python, NumPy or torch."
            ) from error
        finally:
            self.set(now)

    def _refuse_misfit(self, saved: torch.Tensor) -> None:
        """Raise torch's error for a state that no generator of these devices can have."""
        for kind in self._kinds:
            try:
                torch.Generator(kind).set_state(saved)
                return
            except RuntimeError as error:
                refused = error
        raise refused

    def _generators(self) -> dict[str, torch.Generator]:
        """Return the generators of the loaders and of what they are made of, by place."""
        found: dict[str, torch.Generator] = {}
        for number, loader in enumerate(self._loaders):
            parts = [(str(number), loader)]
            for place, part in parts:
                generator = getattr(part, "generator", None)
                if isinstance(generator, torch.Generator):
                    found[_place(place)] = generator
                for name in ("sampler", "batch_sampler", "dataset"):
                    inner = getattr(part, name, None)
                    if inner is not None and len(parts) < 20:
                        parts.append((f"{place}.{name}", inner))
        return found


def _place(path: str) -> str:
    """Return the place of a part, without the wrappers that deal batches to several processes."""
    return re.sub(r"(\.batch_sampler)+", ".batch_sampler", path)
