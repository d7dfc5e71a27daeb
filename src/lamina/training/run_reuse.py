"""What a run does so that outputs of frozen modules are reused, and what came of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from .._util.notices import warn
from ..errors import PlanError
from ..optimizer.optimizer import Optimizer
from ..reuse import Reuse, reuse
from .named_examples import NamedBatch, named_loader
from .reuse_settings import ReuseSettings
from .sharding import is_sharded

#: the folder of stored outputs in that of a run
STORED = "reuse"


@dataclass(frozen=True)
class ReuseReport:
    """What was reused since the run began or was resumed, in this process.

    Of the calls whose outputs something reads, `replayed` came from storage and `missed` were made.
    `skipped` are those that only such calls would read. `seconds` is about how long the calls that
    were left out would have taken. `space` is in bytes.
    """

    replayed: int
    missed: int
    skipped: int
    seconds: float
    space: int
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        total = self.replayed + self.missed
        if not total:
            return "nothing was replayed"
        calls = f"{self.replayed:,} of {total:,} call{'s' * (total != 1)} replayed"
        if self.skipped:
            calls += f", {self.skipped:,} skipped"
        return f"{calls}; spared about {self.seconds:.1f} s with {self.space / 2**20:.1f} MiB"


class RunReuse:
    """Reuses in one run; without settings it leaves everything as it is.

    Args:
        settings: None if nothing is to be reused.
        accelerator: that of the run.
    """

    def __init__(self, settings: ReuseSettings | None, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._reused: Reuse | None = None
        self.settings = settings
        if settings is not None and is_sharded(accelerator):
            warn(
                "A sharded model (FSDP) is trained without reuse; only whole ones can be followed."
            )
            self.settings = None

    def loader(self, loader: DataLoader[Any], part: str) -> DataLoader[Any]:
        """Return a loader whose batches name their examples; the same one if nothing is reused.

        Args:
            loader: as the task made it.
            part: "train" or "validation".
        """
        return loader if self.settings is None else named_loader(loader, part)

    @contextmanager
    def batch(self, given: Any) -> Iterator[Any]:
        """Take the names from a batch; passes inside are about the examples that they name.

        Args:
            given: what a loader gave.
        """
        if not isinstance(given, NamedBatch):
            yield given
        elif self._reused is None or given.names is None:
            yield given.batch
        else:
            with self._reused.batch(given.names):
                yield given.batch

    def begin(
        self, model: nn.Module, prepared: nn.Module, optimizer: Optimizer, home: Path | None
    ) -> None:
        """Reuse from here on; a model that cannot be followed is trained without.

        Args:
            model: the model.
            prepared: what Accelerate made of it.
            optimizer: that trains it.
            home: the folder of the run, on the process that has it.
        """
        if self.settings is None:
            return
        folder = self._folder(home)
        try:
            if type(prepared).__name__ == "OptimizedModule":
                raise PlanError("the launcher asked Accelerate to compile the whole model")
            self._reused = reuse(
                model,
                optimizer,
                space=self.settings.space,
                folder=folder,
                debug=self.settings.debug,
                preprocessing=self.settings.preprocessing,
                store_dtype=self.settings.store_dtype,
            )
        except PlanError as error:
            self.give_up(error)

    def give_up(self, error: PlanError) -> None:
        """Train without reuse, and say why.

        Args:
            error: what keeps the model from being followed.
        """
        self.settings = None
        warn(f"The run goes on without reuse: {error}")

    def _folder(self, home: Path | None) -> Path | None:
        """Return where this process stores outputs; None for memory."""
        assert self.settings is not None
        several = self._accelerator.num_processes > 1
        own = f"process-{self._accelerator.process_index}" if several else ""
        if not isinstance(self.settings.folder, bool):
            return Path(self.settings.folder) / own
        if not self.settings.folder:
            return None
        known = [None if home is None else str(home.resolve())]
        if several:  # of which only the main process knows the folder
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(known)
        assert known[0] is not None
        return Path(known[0]) / STORED / own

    def report(self) -> ReuseReport | None:
        """Return what was reused; None if nothing was to be."""
        if self._reused is None:
            return None
        reused = self._reused
        return ReuseReport(
            reused.counts["replayed"],
            reused.missed,
            reused.counts["skipped"],
            reused.spared_seconds,
            reused.store.used,
            tuple(sorted(reused.refused)),
        )

    def finish(self, home: Path) -> None:
        """Remove what lies in the folder of the run: it is only there for a run that goes on.

        Args:
            home: the folder of the run.
        """
        self.close()
        asked = None if self.settings is None else self.settings.folder
        if not isinstance(asked, str):  # or it might be that very folder
            shutil.rmtree(home / STORED, ignore_errors=True)

    def close(self) -> None:
        """Let go of the model and of the files."""
        if self._reused is not None:
            self._reused.close()
