"""Train under every wrapper on two processes, and compare with one process on the full batch.

`python tests/wrapper_matrix.py` prints the table of docs/explanation/wrappers.md. A cell is a
wrapper, where the plan was built, what the plan does, and who clips. Its outcome is "equal" (the
final weights are those of one process), or the error of lamina that refused; anything else is a
fault. All cells run in one pair of processes; a cell that breaks it gets a new pair for the rest.

A wrapper is an entry of `WRAPPERS`: a function that trains a `Task` and returns the final weights.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lamina as lm
from processes import join_group, leave_group, run_processes

STEPS, BATCH, PROCESSES = 8, 8, 2
TOLERANCE = 1e-5
Weights = dict[str, torch.Tensor]
Build = Callable[[nn.Module], lm.Optimizer]


class Net(nn.Module):
    """Three numbered layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def net() -> Net:
    """The model at the start of every cell, in double precision."""
    torch.manual_seed(0)
    return Net().double()


def batches(rank: int = 0, world: int = 1) -> list[torch.Tensor]:
    """The share of one process in each of the batches."""
    generator = torch.Generator().manual_seed(1)
    full = torch.randn(STEPS, BATCH, 4, generator=generator, dtype=torch.float64) * 3
    share = BATCH // world
    return list(full[:, rank * share : (rank + 1) * share])


def loss_of(output: torch.Tensor) -> torch.Tensor:
    """The loss of a batch; its mean over equal shares is that of the full batch."""
    return (output - 1).square().mean()


# ---------------------------------------------------------------------------------- what is trained

#: the largest norm, small enough that every step is clipped
LIMIT = 0.1
CLIPS = ("no clip", "plan", "trainer")


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What the plan does: rules for each phase, what is frozen by hand before it all."""

    phases: tuple[tuple[lm.Rule, ...], ...]
    by_hand: str | None = None


SCENARIOS = {
    "nothing frozen": Scenario(((),)),
    "frozen": Scenario(((lm.Rule("layers.0", frozen=True),),)),
    "by hand": Scenario(((),), by_hand="layers.0"),
    "by hand, thawed": Scenario(((lm.Rule("layers.0", thaw=3),),), by_hand="layers.0"),
    "thaw": Scenario(((lm.Rule("layers.0", thaw=3),),)),
    "freeze": Scenario(((lm.Rule("layers.0", freeze=4),),)),
    "top_down": Scenario(((lm.Rule("layers.{depth}", thaw=lm.top_down(every=2)),),)),
    "on_plateau": Scenario(
        ((lm.Rule("layers.0", thaw=lm.on_plateau("loss", patience=1)),),),
    ),
    "two phases": Scenario(((lm.Rule("layers.0", frozen=True),), ())),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One cell, without its wrapper: the model, the plans, the batches of this process."""

    built: str
    scenario: str
    clip: str
    rank: int = 0
    world: int = 1

    @property
    def limit(self) -> float | None:
        """The norm to which the trainer clips, if it does."""
        return LIMIT if self.clip == "trainer" else None

    def model(self) -> Net:
        """The model, with what is frozen by hand."""
        model = net()
        by_hand = SCENARIOS[self.scenario].by_hand
        if by_hand:
            lm.freeze(model, by_hand)
        return model

    def phases(self) -> list[tuple[Build, list[torch.Tensor]]]:
        """For each plan: how its optimizer is built, and the batches it trains on."""
        phases = SCENARIOS[self.scenario].phases
        data, steps = batches(self.rank, self.world), STEPS // len(phases)
        return [
            (self._build(rules, steps), data[steps * number : steps * (number + 1)])
            for number, rules in enumerate(phases)
        ]

    def _build(self, rules: Sequence[lm.Rule], steps: int) -> Build:
        norm = LIMIT if self.clip == "plan" else None
        plan = lm.Plan(lm.SGD, lr=0.1, momentum=0.9, weight_decay=0.01, clip_norm=norm, rules=rules)
        return functools.partial(plan.build, steps=steps)


def report(optimizer: lm.Optimizer) -> None:
    """Tell the plan a metric that never gets better."""
    optimizer.report(loss=1.0)


# -------------------------------------------------------------------------- wrappers with a loop

#: where the plan was built: "before" wrapping, on the "wrapper", on the "inner" module
BUILT = ("before", "wrapper", "inner")


class Loop:
    """A training loop of one's own on the bare model; a wrapper overrides what it does else."""

    def __init__(self, model: nn.Module, built: str, build: Build) -> None:
        if built == "before":
            optimizer = build(model)
            self.model = self.wrap(model)
        else:
            self.model = self.wrap(model)
            optimizer = build(self.target(built))
        self.optimizer = self.own(optimizer)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model that is called in the loop."""
        return model

    def target(self, built: str) -> nn.Module:
        """What the plan is built on, once the model is wrapped."""
        return self.model if built == "wrapper" else self.model.module

    def own(self, optimizer: lm.Optimizer) -> Any:
        """The optimizer as the loop uses it."""
        return optimizer

    def next_phase(self, built: str, build: Build) -> None:
        """Another plan for the same model, wrapped as it is."""
        self.release()
        target = self.model if built == "before" else self.target(built)
        self.optimizer = self.own(build(target))

    def release(self) -> None:
        """Undo what the plan did to the model."""
        self.optimizer.release()

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Compute the output for a batch."""
        return self.model(batch)

    def backward(self, loss: torch.Tensor) -> None:
        """Compute the gradients."""
        loss.backward()

    def clip(self, limit: float) -> None:
        """Clip as the trainer does it, before `optimizer.step()`."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def report(self) -> None:
        """Tell the plan a metric."""
        report(self.optimizer)

    def weights(self) -> Weights:
        """All weights, whole, by the names of the bare model."""
        named = {
            name.removeprefix("module."): param for name, param in self.model.named_parameters()
        }
        return {name: param.detach().clone() for name, param in named.items()}


def train(loop: Callable[[nn.Module, str, Build], Loop], task: Task) -> Weights:
    """Train all phases of a task in a loop."""
    running: Loop | None = None
    for build, data in task.phases():
        if running is None:
            running = loop(task.model(), task.built, build)
        else:
            running.next_phase(task.built, build)
        for batch in data:
            running.backward(loss_of(running.forward(batch)))
            if task.limit is not None:
                running.clip(task.limit)
            running.optimizer.step()
            running.optimizer.zero_grad()
            running.report()
    assert running is not None
    return running.weights()


class DDPLoop(Loop):
    """DistributedDataParallel by hand."""

    def wrap(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model)


class StaticGraph(Loop):
    """The reducer takes it that the graph never changes."""

    def wrap(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model, static_graph=True)


class FindUnused(Loop):
    """The reducer looks for parameters without a gradient."""

    def wrap(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model, find_unused_parameters=True)


class Accelerated(Loop):
    """Accelerate; `built` says in which order its `prepare` and `build` are called."""

    def __init__(self, model: nn.Module, built: str, build: Build) -> None:
        self.accelerator = new_accelerator()
        if built == "together":
            self.model, self.optimizer = self.accelerator.prepare(model, build(model))
        elif built == "separately":
            optimizer = build(model)
            self.model = self.accelerator.prepare(model)
            self.optimizer = self.accelerator.prepare(optimizer)
        else:
            self.model = self.accelerator.prepare(model)
            self.optimizer = self.accelerator.prepare(build(self.target(built)))

    def target(self, built: str) -> nn.Module:
        return self.model if built == "wrapper" else self.accelerator.unwrap_model(self.model)

    def own(self, optimizer: lm.Optimizer) -> Any:
        return self.accelerator.prepare(optimizer)

    def next_phase(self, built: str, build: Build) -> None:
        super().next_phase("wrapper" if built in ("together", "separately") else built, build)

    def release(self) -> None:
        self.optimizer.optimizer.release()

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, limit: float) -> None:
        self.accelerator.clip_grad_norm_(self.model.parameters(), limit)

    def report(self) -> None:
        report(self.optimizer.optimizer)


def new_accelerator(**settings: Any) -> Any:
    """An Accelerator over the processes there are; Accelerate keeps one for good otherwise."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, **settings)


# ------------------------------------------------------------------------------------------ FSDP


class Sharded(Loop):
    """FSDP2: `fully_shard` on each layer and on the whole, which exchanges the parameters."""

    def wrap(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import fully_shard

        for layer in model.layers:
            fully_shard(layer)
        return fully_shard(model)

    def weights(self) -> Weights:
        return {name: param.full_tensor() for name, param in self.model.named_parameters()}  # type: ignore[attr-defined]


class AcceleratedSharded(Sharded):
    """FSDP2 by Accelerate, which prepares a model only together with its optimizer."""

    def __init__(self, model: nn.Module, built: str, build: Build) -> None:
        self.accelerator = sharding_accelerator()
        self.model, self.optimizer = self.accelerator.prepare(model, build(model))

    def next_phase(self, built: str, build: Build) -> None:
        self.release()
        self.optimizer = build(self.model)

    def release(self) -> None:
        self._plans().release()

    def _plans(self) -> lm.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, limit: float) -> None:
        self.accelerator.clip_grad_norm_(self.model.parameters(), limit)

    def report(self) -> None:
        report(self._plans())


def sharding_accelerator() -> Any:
    """An Accelerator for FSDP2, which it offers on accelerators only if it is asked to."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    accelerator = new_accelerator()
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    return accelerator


class FlatSharded(Loop):
    """FSDP1, each layer in a wrapper of its own; in float32, since it clips in nothing else."""

    options: Mapping[str, Any] = {"use_orig_params": True}
    nested = True

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch.float())

    def __init__(self, model: nn.Module, built: str, build: Build) -> None:
        super().__init__(model.float(), built, build)

    def wrap(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        policy = ModuleWrapPolicy({nn.Linear}) if self.nested else None
        device = torch.device("cpu")
        return FullyShardedDataParallel(
            model, device_id=device, auto_wrap_policy=policy, **self.options
        )

    def clip(self, limit: float) -> None:
        self.model.clip_grad_norm_(limit)

    def weights(self) -> Weights:
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(self.model):
            return {
                name.replace("_fsdp_wrapped_module.", ""): param.detach().double()
                for name, param in self.model.named_parameters()
            }


class FlatShardedWhole(FlatSharded):
    """FSDP1, all layers in one wrapper, so that some are on one process only."""

    nested = False


class Flattened(FlatSharded):
    """FSDP1 that puts one flat parameter in the place of those of a layer."""

    options: Mapping[str, Any] = {"use_orig_params": False}


# --------------------------------------------------------------------------------------- Lightning


def lightning_ddp(task: Task) -> Weights:
    """Lightning's DDP strategy; the plan is built before fit, or in configure_optimizers."""
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    def strategy() -> Any:
        environment = LightningEnvironment()
        return DDPStrategy(cluster_environment=environment, process_group_backend="gloo")

    return train_lightning(task, strategy)


def train_lightning(task: Task, strategy: Callable[[], Any]) -> Weights:
    """Train all phases of a task, each with a Trainer of its own."""
    module = lightning_module(task.model())
    for number, (build, data) in enumerate(task.phases()):
        if number:
            module.plans.release()
        trainer = lightning_trainer(strategy(), task)
        if task.built == "before":
            optimizer = build(module)
            module.build = functools.partial(lambda given: given, optimizer)
        elif task.built == "wrapper":
            module.build = functools.partial(
                lambda build, trainer: build(trainer.strategy.model), build, trainer
            )
        else:
            module.build = functools.partial(build, module)
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    return {name: param.detach().clone() for name, param in module.named_parameters()}


def lightning_module(model: Net) -> Any:
    """A LightningModule with the parameters of a model."""
    import lightning.pytorch as pl

    class Module(Net, pl.LightningModule):
        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            return loss_of(self(batch))

        def configure_optimizers(self) -> Any:
            self.plans = self.build()
            return self.plans

        def on_train_batch_end(self, *_: Any) -> None:
            report(self.plans)

    module = Module().double()
    module.layers, module.head = model.layers, model.head
    return module


def lightning_trainer(strategy: Any, task: Task) -> Any:
    """A Trainer that prints and saves nothing, and leaves the batches as they are."""
    import lightning.pytorch as pl

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=task.world,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        gradient_clip_val=task.limit,
    )


# ---------------------------------------------------------------------------------------- the table


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """How a task is trained under a wrapper, and where the plan can be built: a row for each."""

    train: Callable[[Task], Weights]
    built: tuple[str, ...] = BUILT


WRAPPERS = {
    "DDP": Wrapper(functools.partial(train, DDPLoop)),
    "DDP, static_graph": Wrapper(functools.partial(train, StaticGraph)),
    "DDP, find_unused_parameters": Wrapper(functools.partial(train, FindUnused)),
    "Lightning ddp": Wrapper(lightning_ddp),
    "accelerate": Wrapper(
        functools.partial(train, Accelerated), ("together", "separately", "wrapper", "inner")
    ),
    "FSDP2": Wrapper(functools.partial(train, Sharded), ("before", "wrapper")),
    "accelerate FSDP2": Wrapper(functools.partial(train, AcceleratedSharded), ("together",)),
    "FSDP1": Wrapper(functools.partial(train, FlatSharded)),
    "FSDP1, one wrapper": Wrapper(functools.partial(train, FlatShardedWhole)),
    "FSDP1, use_orig_params=False": Wrapper(functools.partial(train, Flattened)),
}
#: how a row says where the plan was built
SAID = {
    "before": "built before wrapping",
    "wrapper": "built on the wrapper",
    "inner": "built on the inner module",
    "together": "built, then both prepared together",
    "separately": "built, then both prepared one by one",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One place in the table."""

    wrapper: str
    built: str
    scenario: str
    clip: str


def every_cell() -> list[Cell]:
    """All cells, row by row."""
    return [
        Cell(name, built, scenario, clip)
        for name, wrapper in WRAPPERS.items()
        for built in wrapper.built
        for scenario in SCENARIOS
        for clip in CLIPS
    ]


# ------------------------------------------------------------------------------------- running them

#: a pair of processes that is silent for so long (seconds) hangs
PATIENCE = 30
#: the start of the outcome of a cell that raised an error which is not lamina's
RAISED = "FAULT: raised"


def run_cells(cells: Sequence[Cell], folder: Path, limit: int = 900) -> dict[Cell, str]:
    """The outcome of each cell, on two processes."""
    expected = {(c.scenario, c.clip): None for c in cells}
    torch.save({key: train(Loop, Task("before", *key)) for key in expected}, folder / "expected.pt")
    outcomes: dict[Cell, str] = {}
    pair = 0
    while len(outcomes) < len(cells):
        here = folder / f"pair{pair}"
        here.mkdir()
        left = [cell for cell in cells if cell not in outcomes]
        text = json.dumps([dataclasses.astuple(cell) for cell in left])
        (here / "cells.json").write_text(text)
        with contextlib.suppress(Exception):  # a pair that broke: what it got to is in its files
            run_processes(work, here, PROCESSES, limit)
        got = _joined(left, [_lines(here / f"{rank}.jsonl") for rank in range(PROCESSES)])
        outcomes |= got or {left[0]: "FAULT: the processes ended"}
        pair += 1
    return outcomes


def _lines(path: Path) -> list[str]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _joined(cells: Sequence[Cell], ranks: Sequence[Sequence[str]]) -> dict[Cell, str]:
    """The outcomes that all processes agree on; a fault says what each had."""
    joined = {}
    for number, cell in enumerate(cells[: max(map(len, ranks))]):
        each = [rank[number] if number < len(rank) else "nothing" for rank in ranks]
        joined[cell] = each[0] if len(set(each)) == 1 else f"FAULT: {' / '.join(each)}"
    return joined


def work(rank: int, folder: str) -> None:
    """One process: the outcome of each cell goes to a file, until one breaks the group."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES}
    environment |= {"LOCAL_WORLD_SIZE": PROCESSES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    os.environ.update({key: str(value) for key, value in environment.items()})
    warnings.simplefilter("ignore")
    gc.freeze()  # what was imported is looked through in no cell
    join_group(rank, folder, PROCESSES, PATIENCE)
    expected = torch.load(Path(folder).parent / "expected.pt")
    with Path(folder, f"{rank}.jsonl").open("w") as file:
        for values in json.loads(Path(folder, "cells.json").read_text()):
            outcome = outcome_of(Cell(*values), rank, expected)
            file.write(json.dumps(outcome) + "\n")
            file.flush()
            if outcome.startswith(RAISED):  # the processes may no longer be in step
                os._exit(1)
            torch.distributed.barrier()
    leave_group()


def outcome_of(cell: Cell, rank: int, expected: Mapping[Any, Weights]) -> str:
    """Train one cell in this process of the group."""
    task = Task(cell.built, cell.scenario, cell.clip, rank, PROCESSES)
    try:
        weights = WRAPPERS[cell.wrapper].train(task)
    except lm.errors.LaminaError as error:
        return f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{RAISED} {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    right = expected[cell.scenario, cell.clip]
    if weights.keys() != right.keys():
        return f"FAULT: the weights are {sorted(weights)}"
    far = max(float((weights[name] - right[name]).abs().max()) for name in right)
    return "equal" if far <= TOLERANCE else f"FAULT: differs by {far:.1e}"


# -------------------------------------------------------------------------------------- printing it


def markdown(outcomes: Mapping[Cell, str], errors: dict[str, int]) -> Iterator[str]:
    """The table, and below it what each number in it stands for."""
    rows = dict.fromkeys((cell.wrapper, cell.built) for cell in outcomes)
    scenarios = list(dict.fromkeys(cell.scenario for cell in outcomes))
    yield f"| wrapper | plan | {' | '.join(scenarios)} |"
    yield "|" + "---|" * (len(scenarios) + 2)
    for wrapper, built in rows:
        texts = []
        for scenario in scenarios:
            each = {
                cell.clip: said
                for cell, said in outcomes.items()
                if (cell.wrapper, cell.built, cell.scenario) == (wrapper, built, scenario)
            }
            texts.append(_text(each, errors))
        yield f"| {wrapper} | {SAID[built]} | {' | '.join(texts)} |"


def _text(by_clip: Mapping[str, str], errors: dict[str, int]) -> str:
    short = {clip: _short(outcome, errors) for clip, outcome in by_clip.items()}
    if len(set(short.values())) == 1:
        return next(iter(short.values()))
    return "; ".join(f"{clip}: {text}" for clip, text in short.items())


def _short(outcome: str, errors: dict[str, int]) -> str:
    return outcome if outcome == "equal" else f"[{errors.setdefault(outcome, len(errors) + 1)}]"


def main() -> None:
    """Print the table; the exit status says whether there is a fault in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wrappers", nargs="*", help="only these, by a part of their name")
    parser.add_argument("--scenario", nargs="*", choices=SCENARIOS, default=list(SCENARIOS))
    asked = parser.parse_args()
    cells = [
        cell
        for cell in every_cell()
        if cell.scenario in asked.scenario
        and (
            not asked.wrappers
            or any(part.lower() in cell.wrapper.lower() for part in asked.wrappers)
        )
    ]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run_cells(cells, Path(folder))
    errors: dict[str, int] = {}
    print("\n".join(markdown(outcomes, errors)))
    print()
    for text, number in errors.items():
        print(f"{number}. {text}")
    counts = {"equal": 0, "named error": 0, "FAULT": 0}
    for outcome in outcomes.values():
        kind = outcome if outcome == "equal" else outcome[:5] if outcome[:5] == "FAULT" else ""
        counts[kind or "named error"] += 1
    print("\n" + ", ".join(f"{kind}: {count}" for kind, count in counts.items()))
    sys.exit(counts["FAULT"] > 0)


if __name__ == "__main__":
    main()
