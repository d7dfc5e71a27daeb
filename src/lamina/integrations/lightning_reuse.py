"""Reuse in Lightning: finds the part of a module that `training_step` calls.

Lightning calls `training_step`, which calls the network: `self(x)`, `self.model(x)`, or parts of it
one by one. Which it is shows in the first batch.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .._util.text import listed
from ..optimizer.optimizer import Optimizer
from ..reuse import Reuse
from .common import tell
from .reusing import begin_reuse


class LightningReuse:
    """Begins and ends the reuse of one `fit` after the other.

    Args:
        settings: of `lamina.reuse`; None if nothing is to be reused.
    """

    def __init__(self, settings: dict[str, Any] | None) -> None:
        self.session: Reuse | None = None
        self._settings = settings
        self._calls: _OuterCalls | None = None

    def follow(self, module: nn.Module, wrapped: nn.Module, optimizer: Optimizer) -> None:
        """Look at the calls of the batch that comes.

        Args:
            module: the module that is trained.
            wrapped: what the strategy has made of it.
            optimizer: that of the plan.
        """
        self.end()
        self.session = None
        if self._settings is None:
            return
        if getattr(module, "_compiler_ctx", None) is not None:  # set by `trainer.fit(compiled)`
            tell(
                "Nothing is reused, and training goes on without: the module is compiled as a "
                "whole, as one piece of which nothing can be left out. Compile the parts that "
                "train instead, e.g. module.head = torch.compile(module.head)."
            )
        else:
            self._module, self._optimizer = module, optimizer
            # A wrapper such as DDP is given training_step as the forward pass of the module, which
            # cannot be repeated on a copy; the parts that it calls can.
            self._calls = _OuterCalls(module, with_itself=wrapped is module)

    def begin(self) -> None:
        """Begin with the part that was called in the first batch; do nothing in later ones."""
        if self._calls is None:
            return
        self._calls.stop()
        part = self._part(self._calls.found)
        self._calls = None
        if part is None:
            return
        # It is called by the code of the module, so no wrapper is around it.
        self.session = begin_reuse(part, part, self._optimizer, self._settings)

    def end(self) -> None:
        """Give the module its passes back."""
        if self._calls is not None:
            self._calls.stop()
            self._calls = None
        if self.session is not None:
            self.session.close()

    def _part(self, found: list[str]) -> nn.Module | None:
        """Return the part to reuse the passes of; None, and a warning, if there is none."""
        if not found:
            tell("Nothing is reused: training_step called no part of the module with parameters.")
            return None
        if len(found) > 1:
            tell(
                f"Nothing is reused: training_step calls {listed(found)} one by one, and what lies "
                "between them cannot be followed. Put them into one part with a forward of its "
                "own, and call that."
            )
            return None
        return self._module.get_submodule(found[0])


class _OuterCalls:
    """Notes which modules with parameters are called, but not from within another one.

    Args:
        module: the module to which they belong.
        with_itself: whether calls of the module itself count.
    """

    def __init__(self, module: nn.Module, *, with_itself: bool) -> None:
        self.found: list[str] = []
        self._inside: list[nn.Module] = []
        self._handles: list[Any] = []
        for path, part in module.named_modules():
            if next(part.parameters(), None) is not None and (path or with_itself):
                self._watch(path, part)

    def stop(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _watch(self, path: str, part: nn.Module) -> None:
        def before(*_: Any) -> None:
            if not self._inside and path not in self.found:
                self.found.append(path)
            self._inside.append(part)

        def after(*_: Any) -> None:
            self._inside.pop()

        self._handles.append(part.register_forward_pre_hook(before))
        self._handles.append(part.register_forward_hook(after, always_call=True))
