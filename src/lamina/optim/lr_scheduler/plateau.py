"""ReduceLROnPlateau."""

from __future__ import annotations

from typing import Any, ClassVar, SupportsFloat

from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers

from ..._util.notices import warn
from ...errors import ScheduleError
from ..base import arguments
from .groups import attach, keep_config
from .ledger import Ledger, ledger_of

_DEFAULT_EPS = 1e-8


class ReduceLROnPlateau(torch_schedulers.ReduceLROnPlateau):
    """Lower when a metric stops to improve; arguments and defaults are torch's.

    The default `eps` is relative to the learning rate, so that small ones are reduced too; any
    other `eps` is absolute, as in torch.
    """

    _config: ClassVar[tuple[str, ...]] = (
        *("factor", "patience", "cooldown", "eps", "default_min_lr", "min_lrs"),
        *("mode", "threshold", "threshold_mode"),
    )

    _ledger: Ledger

    def __init__(
        self,
        optimizer: Optimizer,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: list[float] | float = 0,
        eps: float = _DEFAULT_EPS,
        verbose: object = False,
    ) -> None:
        settings = arguments(locals())
        del settings["verbose"]  # which newer versions of torch refuse
        attach(self, optimizer, 0)
        self._verbose = verbose is True
        super().__init__(**settings)

    def step(self, metrics: SupportsFloat, epoch: int | None = None) -> None:  # type: ignore[override]
        """Take in the metric of the next epoch.

        Args:
            metrics: the number to watch.
            epoch: the number of the epoch, if it is not the next one; deprecated by torch.
        """
        if epoch is not None:
            warn(torch_schedulers.EPOCH_DEPRECATION_WARNING)
            self.last_epoch = epoch - 1
        super().step(metrics)

    def _reduce_lr(self, epoch: int) -> None:
        groups = self.optimizer.param_groups
        self._ledger = ledger_of(self.optimizer, self._ledger)
        self._ledger.read(groups)
        default = 0.0 if self.default_min_lr is None else self.default_min_lr
        self.min_lrs += [default] * (len(groups) - len(self.min_lrs))
        values = []
        for group, least in zip(groups, self.min_lrs, strict=True):
            old = float(group["lr"])
            new = max(old * self.factor, least)
            limit = self.eps * old if self.eps == _DEFAULT_EPS else self.eps
            values.append(new if old - new > limit else group["lr"])
        self._ledger.rescale(self, values)

    def at(self, step: int) -> list[float]:
        """Raise: the values depend on a metric."""
        raise ScheduleError("ReduceLROnPlateau depends on a metric, so no step can be told ahead.")

    def plot(self, path: object = None, steps: int | None = None) -> Any:
        """Raise: the values depend on a metric."""
        raise ScheduleError(
            "ReduceLROnPlateau depends on a metric, so it cannot be drawn ahead; a plan draws "
            "its schedule without the metric's part: lamina.Plan(..., feedback=lamina.plateau(...))"
            ".preview(model, steps=...).plot()."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the optimizer, under torch's keys."""
        hidden = ("optimizer", "_verbose", "_ledger")
        kept = {k: v for k, v in self.__dict__.items() if k not in hidden}
        return {key: list(v) if isinstance(v, list) else v for key, v in kept.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a saved scheduler was; what this one's constructor was given stays."""
        saved = dict(state_dict)
        keep_config(self, saved)
        super().load_state_dict(saved)
        if self._ledger.schedulers == 1:  # next to others its last values may be old ones
            self._ledger.resume(self, self._last_lr)
