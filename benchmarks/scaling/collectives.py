"""Count the collectives of a training step, and say by formula what they must be."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lamina as lm
from processes import join_group, leave_group, run_processes

#: bytes of a number in float32
FLOAT = 4
#: what torch's DDP puts into its first bucket, and into each of the others (bytes)
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
#: the number of collectives, and the bytes of the tensors that go through them
Traffic = tuple[int, int]
#: operators beside the collectives, and the words in the names of these
_NOT_SENT = ("wait_tensor", "wrap_tensor_autograd")
_KINDS = {
    "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "broadcast": "broadcast",
}
#: width and number of the layers of the model that is counted
WIDTH, LAYERS = 8, 6
METRICS = {"val_loss": 0.5}


class Collectives(TorchDispatchMode):
    """Counts every collective that is called, whoever calls it: torch, a wrapper, or lamina.

    The bytes are those of the whole tensor: summed, gathered or sent, as each process has it
    before or after. What travels over the wires depends on the algorithm; see `on_the_wire`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # it comes again with the tensors of this process
        found = func(*args, **(kwargs or {}))
        name = func._opname.strip("_")
        if func.namespace in ("c10d", "_c10d_functional") and name not in _NOT_SENT:
            kind = next((kind for word, kind in _KINDS.items() if word in name), name)
            self.calls[kind] += 1
            self.bytes[kind] += max(_bytes(args), _bytes(found))
        return found

    @property
    def traffic(self) -> Traffic:
        """All collectives together."""
        return self.calls.total(), self.bytes.total()


def _bytes(value: Any) -> int:
    """Return the bytes of the largest tensor, or list of tensors, that a collective was given."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if not isinstance(value, (list, tuple)):
        return 0
    if value and all(isinstance(each, torch.Tensor) for each in value):
        return sum(map(_bytes, value))
    return max(map(_bytes, value), default=0)


# --------------------------------------------------------------------------------- by formula


@dataclass(frozen=True)
class Case:
    """A plan whose step is counted, and what the formula needs to know of it.

    `scoped` and `free` are how many tensors with a gradient lie in clip scopes and in none;
    `norms` how many numbers each group asks for that has an optimizer with norms of its own;
    `gathered` the shape of each matrix that its optimizer needs as a whole.
    """

    settings: dict[str, Any]
    scoped: int = 0
    free: int = 0
    norms: tuple[int, ...] = ()
    gathered: tuple[tuple[int, int], ...] = ()
    frozen: bool = False


def in_step(wrapper: str, case: Case, ranks: int = 1) -> Traffic:
    """Return what `step` sends.

    Under DDP every process has the same gradients: nothing. Under FSDP2 the norms of all scopes go
    in one sum, and those of what is in no scope, which are read for NaN, in another; the norms of
    LARS, LAMB and LayerAdaptiveAdam in one for each group, and Muon gathers each matrix in
    bfloat16, of which all processes send the same number of rows: the last ones may be empty.
    """
    if wrapper == "DDP":
        return 0, 0
    asked = [count for count in (case.scoped, case.free, *case.norms) if count]
    sent = sum(-(-rows // ranks) * ranks * columns for rows, columns in case.gathered)
    size = FLOAT * sum(asked) + FLOAT // 2 * sent
    return len(asked) + len(case.gathered), size


def in_report() -> Traffic:
    """Return what `report` sends: the length of a pickle, and the pickle."""
    return 2, 8 + len(pickle.dumps(METRICS))


def in_backward(wrapper: str, numbers: list[int]) -> Traffic:
    """Return what the wrapper itself sends for a forward and a backward.

    DDP sums all gradients, in buckets. FSDP2 gathers each part in forward and, but for the root,
    again in backward, and sums its gradients, of which each process keeps its share.

    Args:
        wrapper: "DDP" or "FSDP2".
        numbers: the numbers in the tensors of each part that was wrapped by itself; the root first.
    """
    total = FLOAT * sum(numbers)
    if wrapper == "DDP":
        return 1 + max(0, -(-(total - FIRST_BUCKET) // BUCKET)), total
    root = FLOAT * numbers[0]
    return 3 * len(numbers) - 1, 3 * total - root


def on_the_wire(kind: str, size: float, ranks: int) -> float:
    """Return the bytes that each process sends in a ring, or along a chain of processes."""
    if ranks == 1:
        return 0.0
    rounds = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}
    return size * rounds[kind] * (ranks - 1) / ranks if kind in rounds else float(size)


# ------------------------------------------------------------------------------------- counted


class Layer(nn.Module):
    """One layer; every size divides by the numbers of processes that are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.tanh(self.dense(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        out: torch.Tensor = self.head(x)
        return out


def scopes_of(count: int) -> list[lm.Rule]:
    """Return a rule with a clip norm of its own for each of the first layers."""
    return [lm.Rule(f"layers.{n}.*", clip_norm=0.5) for n in range(count)]


#: all tensors of the model, and those of its layers
ALL, IN_LAYERS = 4 * LAYERS + 2, 4 * LAYERS
_FROZEN = [lm.Rule(f"layers.{n}.*", frozen=True) for n in range(LAYERS // 2)]
_MUON = [lm.Rule("layers.*.dense.weight", optimizer=lm.Muon, lr=0.01)]
_BIASES = [lm.Rule("*.bias", lr=0.1)]
CASES: dict[str, Case] = {
    "no clipping": Case({}, free=ALL),
    "1 scope": Case({"clip_norm": 1.0}, scoped=ALL),
    "4 scopes, rest free": Case({"rules": scopes_of(4)}, scoped=4 * 4, free=ALL - 4 * 4),
    "7 scopes": Case({"clip_norm": 1.0, "rules": scopes_of(LAYERS)}, scoped=ALL),
    "1 scope, half frozen": Case(
        {"clip_norm": 1.0, "rules": _FROZEN}, scoped=ALL - 4 * len(_FROZEN), frozen=True
    ),
    "LAMB": Case({"optimizer": lm.LAMB}, free=ALL, norms=(2 * ALL,)),
    "LARS": Case({"optimizer": lm.LARS}, free=ALL, norms=(2 * ALL,)),
    "LayerAdaptiveAdam, 2 groups": Case(
        {"optimizer": lm.LayerAdaptiveAdam, "rules": _BIASES}, free=ALL, norms=(13, 13)
    ),
    "Muon on 6 matrices": Case({"rules": _MUON}, free=ALL, gathered=((WIDTH, WIDTH),) * LAYERS),
}


@dataclass(frozen=True)
class Counted:
    """What one case sent: in the wrapper's forward and backward, and where lamina acts."""

    wrapper: str
    case: str
    ranks: int
    backward: Traffic | None
    step: Traffic
    report: Traffic
    should_stop: Traffic


def _traffic_of(work: Callable[[], Any]) -> Traffic:
    with Collectives() as seen:
        work()
    return seen.traffic


def count_case(wrapper: str, case: str, rank: int, ranks: int) -> Counted:
    """Train three steps in a process group, and count the last one."""
    torch.manual_seed(0)
    model: Any = Net()
    settings = {"feedback": lm.plateau("val_loss"), "stop": lm.early_stop("val_loss")}
    plan = lm.Plan(**{"optimizer": lm.AdamW, "lr": 1e-3, **settings, **CASES[case].settings})
    optimizer = plan.build(model, steps=100)
    if wrapper == "DDP":
        wrapped: Any = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in model.layers:
            fully_shard(layer)
        wrapped = fully_shard(model)

    def learn() -> None:
        wrapped(torch.full((2, WIDTH), float(rank + 1))).square().mean().backward()

    for _ in range(2):  # DDP makes its buckets anew after the first
        learn()
        optimizer.step()
        optimizer.zero_grad()
    return Counted(
        wrapper,
        case,
        ranks,
        backward=_traffic_of(learn),
        step=_traffic_of(optimizer.step),
        report=_traffic_of(lambda: optimizer.report(**METRICS)),
        should_stop=_traffic_of(lambda: optimizer.should_stop),
    )


def _work(rank: int, folder: str, ranks: int, cases: list[tuple[str, str]]) -> None:
    join_group(rank, folder, ranks)
    counted = [asdict(count_case(wrapper, case, rank, ranks)) for wrapper, case in cases]
    Path(folder, f"counted-{rank}.json").write_text(json.dumps(counted), encoding="utf-8")
    leave_group()


def count(folder: Path, ranks: int, cases: list[tuple[str, str]]) -> list[list[Counted]]:
    """Return what each process counted of each case, over gloo.

    Args:
        folder: an empty folder for the processes.
        ranks: how many processes.
        cases: wrapper and name of each case.
    """
    run_processes(partial(_work, ranks=ranks, cases=cases), folder, count=ranks)
    rows = [json.loads(Path(folder, f"counted-{rank}.json").read_text()) for rank in range(ranks)]
    lists = ("backward", "step", "report", "should_stop")
    return [
        [Counted(**{k: tuple(v) if k in lists else v for k, v in row.items()}) for row in each]
        for each in rows
    ]


def computed(wrapper: str, case: str, ranks: int) -> Counted:
    """Return what the formulas say of a case; nothing of a wrapper around what is frozen."""
    layer = WIDTH * WIDTH + 3 * WIDTH
    parts = [WIDTH * WIDTH + WIDTH, *[layer] * LAYERS]
    return Counted(
        wrapper,
        case,
        ranks,
        backward=None if CASES[case].frozen else in_backward(wrapper, parts),
        step=in_step(wrapper, CASES[case], ranks),
        report=in_report(),
        should_stop=(0, 0),
    )


def agrees(counted: Counted, formula: Counted) -> bool:
    """Return whether what was counted is what the formulas say."""
    if formula.backward is None:
        counted = replace(counted, backward=None)
    return counted == formula
