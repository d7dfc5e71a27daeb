"""Where a run trains, and that all processes that were launched train it together.

Accelerate forms a group of processes only with a backend for the device it is told to use. Without
one, each process would train a copy of its own and nobody would notice; so the number of processes
in the group is compared with the number that was launched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .._util.sharding import is_distributed
from ..errors import LaminaError, shortened
from .settings import Settings
from .sharding import check_supported, fsdp_plugin, let_shard

#: what launchers set: the variable with the number of processes, and those with the number of this
#: one, of which one must be set too
_LAUNCHERS = (
    ("WORLD_SIZE", ("RANK", "LOCAL_RANK")),
    ("PMI_SIZE", ("PMI_RANK",)),
    ("OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_RANK",)),
    ("MV2_COMM_WORLD_SIZE", ("MV2_COMM_WORLD_RANK",)),
)

#: how gloo words it that another process is gone; NCCL raises errors of a kind of their own
_BROKEN = ("third_party/gloo", "gloo::", "Connection closed by peer", "Connection reset by peer")


#: groups that are over, kept: the destructor of one waits for a thread of gloo that may be waiting
#: for the interpreter's lock, which DDP's reducer holds where it is the last to let go of the group
_ENDED: list[object] = []


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, str]:
    """Return how many processes were started to train together, and what says so.

    Args:
        environment: the environment variables.

    Raises:
        LaminaError: if there are several, and this one does not know which of them it is.
    """
    if is_distributed():
        size = torch.distributed.get_world_size()
        return size, f"the process group of {size}"
    for variable, ranks in _LAUNCHERS:
        text = environment.get(variable, "")
        if not text.isdecimal() or int(text) <= 1:
            continue
        if not any(rank in environment for rank in ranks):
            raise LaminaError(
                f"{variable}={text} says that {text} processes train together, but {ranks[0]} is "
                "not set, so this one does not know which of them it is. Start them with torchrun, "
                f"or unset {variable} to train in one process."
            )
        return int(text), f"{variable}={text}"
    return 1, ""


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this is the process that writes, as far as that is known before they meet.

    Args:
        environment: the environment variables.
    """
    if is_distributed():
        return torch.distributed.get_rank() == 0
    ranks = (names[0] for variable, names in _LAUNCHERS if variable in environment)
    return all(environment.get(rank, "0") == "0" for rank in ranks)


def begin(settings: Settings, accumulate: int, cpu: bool) -> Any:
    """Return Accelerate's accelerator, with every seed set and all processes in one group.

    On a machine without accelerators several processes train on the CPU, over gloo.

    Args:
        settings: those of the run.
        accumulate: batches of this process in an optimizer step.
        cpu: train on the CPU even if there is an accelerator.

    Raises:
        LaminaError: if the device cannot train so, or a process would train alone.
    """
    from accelerate.utils import set_seed

    processes, said_by = launched()
    if processes > 1 and not torch.accelerator.is_available():
        cpu = True  # otherwise Accelerate looks for no backend
    if not cpu:
        _check_enough_devices(processes)
    sharded = settings.fsdp and processes > 1
    accelerator = _accelerator(settings, accumulate, cpu, sharded)
    try:
        check_supported(accelerator)
        _check_precision(accelerator)
        _check_together(processes, said_by, accelerator)
    except LaminaError:
        end(accelerator)
        raise
    set_seed(settings.seed)
    return accelerator


@contextmanager
def naming_lost_processes(accelerator: Any) -> Iterator[None]:
    """Say what a broken connection means: that another process ended, or hangs.

    Whoever launched the processes ends the others too; without it, each ends when it next waits for
    the one that is gone, and at the latest when the backend's time limit is over.

    Args:
        accelerator: that of the run.

    Raises:
        LaminaError: in the place of the backend's error.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        lost = isinstance(error, torch.distributed.DistError) or any(
            sign in text for sign in _BROKEN
        )
        if accelerator.num_processes == 1 or not lost:
            raise
        raise LaminaError(
            f"process {accelerator.process_index} of {accelerator.num_processes} lost another one, "
            f"which ended or does not answer ({shortened(text.splitlines()[0])}). Its own message, "
            "if it could leave one, says why. The run goes on from its newest checkpoint with "
            "--resume, with any number of processes."
        ) from error


def end(accelerator: Any) -> None:
    """End the processes' group and forget the settings, which Accelerate keeps as globals."""
    if is_distributed():
        _ENDED.append(torch.distributed.group.WORLD)
    accelerator.end_training()
    _forget()


def _forget() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _accelerator(settings: Settings, accumulate: int, cpu: bool, sharded: bool) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin

    plugin = fsdp_plugin() if sharded else None
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=settings.mixed_precision,
            # As a plugin: a plain number would give way to the launcher's environment.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulate),
            dataloader_config=DataLoaderConfiguration(data_seed=settings.seed),
            fsdp_plugin=None if cpu else plugin,
        )
    except ValueError as error:
        _forget()  # or the next run in this process would find half of this one's settings
        raise LaminaError(
            f"mixed_precision={settings.mixed_precision!r}, cpu={cpu}: this device cannot train so "
            f"({error}). Choose another precision or 'no', or correct what is named there."
        ) from error
    if plugin is not None:
        let_shard(accelerator, plugin)
    return accelerator


def _check_enough_devices(processes: int) -> None:
    """Raise if processes of this machine would have to share a GPU."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    devices = torch.cuda.device_count()
    if processes > 1 and devices and local.isdecimal() and int(local) > devices:
        raise LaminaError(
            f"{local} processes were launched on this machine, which has {devices} GPU(s), and "
            f"each process needs one. Launch with --nproc-per-node={devices}, or give --cpu."
        )


def _check_precision(accelerator: Any) -> None:
    """Raise if Accelerate would train in float32 although fp16 was asked for."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise LaminaError(
            "mixed_precision='fp16' was given, but fp16 needs a GPU and this run is on the CPU. "
            "Choose bf16 or no, or leave out --cpu where there is a GPU."
        )


def _check_together(processes: int, said_by: str, accelerator: Any) -> None:
    """Raise if the group has not as many processes as were launched."""
    if accelerator.num_processes == processes:
        return
    raise LaminaError(
        f"{processes} processes were launched ({said_by}), but this one would train "
        f"with {accelerator.num_processes} in all, on {accelerator.device}: each would train a "
        "copy of its own. Start them with torchrun (for the CPU with --cpu), or remove that "
        "setting to train in one process."
    )
