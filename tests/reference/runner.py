"""One small problem, and how torch, lamina and the scalar re-writes train on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch

from lamina.algorithms import ALGORITHMS
from lamina.algorithms.base import Algorithm, Batch
from lamina.kernels import apply, step_device

from .table import Row

DTYPES = {"float32": 1e-6, "float64": 1e-12}


def start(row: Row, dtype: torch.dtype = torch.float64) -> list[list[torch.Tensor]]:
    """The parameters of each group."""
    torch.manual_seed(0)
    return [[torch.randn(s, dtype=torch.float64).to(dtype) for s in group] for group in row.shapes]


def gradient(param: torch.Tensor, place: int, t: int) -> torch.Tensor:
    """Of a noisy bowl: it depends on the parameter, so an error at one step shows in the next."""
    generator = torch.Generator().manual_seed(1000 * place + t)
    noise = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.device)
    return 0.3 * param.detach() + noise.to(param.dtype)


def hypers(row: Row, algorithm: Algorithm | None = None) -> list[dict[str, Any]]:
    """The hyperparameters of each group."""
    first = {**(algorithm or ALGORITHMS[row.name]).defaults, **row.options}
    return [first, {**first, **row.second}]


def batch_of(
    algorithm: Algorithm,
    params: list[torch.Tensor],
    hyper: Mapping[str, Any],
    scale: torch.Tensor | None = None,
) -> Batch:
    """A batch as an optimizer makes it: state from `init`, steps at 0."""
    states = [algorithm.init(param, hyper) for param in params]
    columns = {key: [state[key] for state in states] for key in states[0]}
    steps = [torch.zeros((), device=step_device(param)) for param in params]
    grads = [torch.zeros_like(param) for param in params]
    return Batch(algorithm, params, grads, columns, steps, hyper, scale)


def run_lamina(
    row: Row,
    dtype: torch.dtype,
    prefer: str | None,
    steps: int = 100,
    algorithm: Algorithm | None = None,
    scale: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """The parameters after some steps."""
    algorithm = algorithm or ALGORITHMS[row.name]
    batches = [
        batch_of(algorithm, params, hyper, scale)
        for params, hyper in zip(start(row, dtype), hypers(row, algorithm), strict=True)
    ]
    params = [param for batch in batches for param in batch.params]
    for t in range(1, steps + 1):
        grads = iter([gradient(param, place, t) for place, param in enumerate(params)])
        for batch in batches:
            batch.grads = [next(grads) for _ in batch.params]
        apply(batches, prefer)
    return params


def run_torch(row: Row, dtype: torch.dtype, steps: int = 100, **kind: Any) -> list[torch.Tensor]:
    """The parameters after some steps of torch.optim."""
    groups = [
        {"params": [torch.nn.Parameter(param) for param in params], **changed}
        for params, changed in zip(start(row, dtype), [{}, row.second], strict=True)
    ]
    optimizer = row.torch_class(groups, **row.options, **kind)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for t in range(1, steps + 1):
        for place, param in enumerate(params):
            param.grad = gradient(param, place, t)
        optimizer.step()
    return [param.detach() for param in params]


@cache
def run_scalar(row: Row, steps: int = 100) -> list[torch.Tensor]:
    """The parameters after some steps of the re-write from the paper, in float64."""
    result, place = [], 0
    for params, hyper in zip(start(row), hypers(row), strict=True):
        for param in params:
            values, memories = param.flatten().tolist(), [{} for _ in range(param.numel() or 1)]
            for t in range(1, steps + 1):
                now = torch.tensor(values, dtype=torch.float64).reshape(param.shape)
                grads = gradient(now, place, t).flatten().tolist()
                if row.whole:
                    values = row.scalar(values, grads, memories[0], t, **hyper)
                elif values:
                    values = [
                        row.scalar(value, grad, memory, t, **hyper)
                        for value, grad, memory in zip(values, grads, memories, strict=True)
                    ]
            result.append(torch.tensor(values, dtype=torch.float64).reshape(param.shape))
            place += 1
    return result


def assert_close(
    given: Iterable[torch.Tensor], oracle: Iterable[torch.Tensor], tolerance: float
) -> None:
    """For each tensor: the norm of the difference, over the norm of the oracle."""
    for a, b in zip(given, oracle, strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)
        assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"
