"""The loaders of a task, prepared by Accelerate: the parts of each process, in whose order.

A task that shuffles without a generator gets an order that is a function of the seed and the epoch.
A generator, sampler or batch sampler that the task made is the task's: it is kept as it is, drawn
from as in a loop of one's own, and its state is saved with the run. In several processes the one of
the main process counts.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, IterableDataset, RandomSampler


def training_loader(accelerator: Any, loader: DataLoader[Any]) -> Any:
    """Return this process' part of the training data; all parts have equally many batches."""
    accelerator.dataloader_config.use_seedable_sampler = is_ordered_by_seed(loader)
    return accelerator.prepare(loader)


def validation_loader(accelerator: Any, loader: DataLoader[Any], seed: int) -> Any:
    """Return this process' part of a loader, each example in exactly one part.

    For training, Accelerate repeats examples so that all processes get equally many batches; an
    average would count those twice. A stream cannot be cut without that, so each process reads it.
    """
    from accelerate.data_loader import prepare_data_loader

    whole = isinstance(loader.dataset, IterableDataset)
    return prepare_data_loader(
        loader,
        device=accelerator.device,
        num_processes=1 if whole else accelerator.num_processes,
        process_index=0 if whole else accelerator.process_index,
        put_on_device=True,
        dispatch_batches=False,
        even_batches=False,
        rng_types=["generator"],
        use_seedable_sampler=is_ordered_by_seed(loader),
        data_seed=seed,
    )


def is_ordered_by_seed(loader: DataLoader[Any]) -> bool:
    """Return whether the run's seed decides the order of a loader's examples.

    Accelerate would exchange whatever is a `RandomSampler`, and seed its generator anew in every
    epoch; only torch's own without a generator has nothing to lose by that.
    """
    sampler = getattr(_batches(loader), "sampler", None)
    return type(sampler) is RandomSampler and sampler.generator is None


def has_own_order(loader: DataLoader[Any]) -> bool:
    """Return whether the order of a loader's examples comes from a generator of the task."""
    batches = _batches(loader)
    parts = (batches, getattr(batches, "sampler", None))
    return any(getattr(part, "generator", None) is not None for part in parts)


def _batches(loader: DataLoader[Any]) -> Any:
    """Return what gives the indices of a batch; without automatic batching that is the sampler."""
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler
