"""One training run, written for every driver: what a plan does must not depend on who calls it.

A small BERT with the parameter names of MiniLM; rates by layer, warmup and cosine, layers thawed
from the top down, gradients clipped for each part, a plateau on the validation loss, gradients
accumulated over two batches with a last step of one. Each driver trains the whole run, or stops
after some steps and goes on from what it saved, in new objects; with `resumed`, another process
has stopped, and it only goes on.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from transformers import BertConfig, BertModel

import lamina as lm

EXAMPLES, BATCH, ACCUMULATE, EPOCHS = 28, 4, 2, 3
BATCHES = math.ceil(EXAMPLES / BATCH)
STEPS_PER_EPOCH = math.ceil(BATCHES / ACCUMULATE)
STEPS = EPOCHS * STEPS_PER_EPOCH
#: how many processes train together, each with its share of every batch
WORLD = 1
#: the step after which a run is cut off: in the second epoch, with two layers still frozen
CUT = 5

# The gradient of the bias of attention's keys is 0 but for rounding, which Adam would scale up to a
# whole step without this eps: the sums of several processes round otherwise.
PLAN = lm.Plan(
    lm.AdamW,
    lr=2e-3,
    eps=1e-3,
    weight_decay=0.01,
    schedule=lm.warmup("15%") >> lm.cosine(to=0.05),
    feedback=lm.plateau("eval_loss", factor=0.5, patience=0, threshold=0.2),
    rules=[
        lm.Rule("bert.encoder.layer.{depth}.*", lr=lm.by_depth(0.8), clip_norm=0.5),
        lm.Rule("bert.encoder.layer.{depth}.*", thaw=lm.top_down(every=3)),
        lm.Rule("bert.embeddings.*", frozen=True),
        lm.Rule("*.bias | *.LayerNorm.*", weight_decay=0.0),
        lm.Rule("classifier.*", lr=lm.times(3), clip_norm=1.0),
    ],
)


class Classifier(nn.Module):
    """A BERT and a linear head, which returns the mean loss of a batch."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(16, 2)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return loss and logits."""
        logits = self.classifier(self.bert(input_ids).last_hidden_state[:, 0])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def make_model() -> Classifier:
    """Make the model with the same weights each time."""
    torch.manual_seed(0)
    return Classifier()


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Random tokens with a label that can be learned from the first of them."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(1, 50, (count, 8), generator=generator)
        self.labels = (self.tokens[:, 0] > 25).long()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def train_data() -> Texts:
    """Return the examples to train on."""
    return Texts(EXAMPLES, seed=1)


def eval_data() -> Texts:
    """Return the examples of the validation: one batch."""
    return Texts(8, seed=2)


def train_loader() -> DataLoader[Any]:
    """Return the batches of an epoch, always in the same order."""
    return DataLoader(train_data(), BATCH // WORLD)


def in_order() -> DistributedSampler[Any] | None:
    """Return what gives each process its share of every batch, where nobody else does that."""
    return DistributedSampler(train_data(), shuffle=False) if WORLD > 1 else None


class ResumableLoader(DataLoader[Any]):
    """A loader that goes on where it was, as Lightning wants it for a resume within an epoch."""

    position = 0

    def __iter__(self) -> Iterator[Any]:
        first, self.position = self.position, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= first:
                self.position = (index + 1) % BATCHES
                yield batch

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of this epoch were given out."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next epoch after these batches."""
        self.position = state["position"]


def eval_loader() -> DataLoader[Any]:
    """Return the one batch of the validation."""
    return DataLoader(eval_data(), 8)


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    """Return the validation loss."""
    model.eval()
    (batch,) = eval_loader()
    loss = float(model(**batch)["loss"])
    model.train()
    return loss


def batches_in_step(index: int) -> int:
    """Return how many batches make the optimizer step that a batch of an epoch belongs to."""
    first = index - index % ACCUMULATE
    return min(ACCUMULATE, BATCHES - first)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the weights of the classifier, put together where they are sharded."""
    whole: dict[str, torch.Tensor] = {}
    for name, param in model.named_parameters():
        tensor = param.full_tensor() if hasattr(param, "full_tensor") else param
        whole[name] = tensor.detach().clone()
    return whole


class Outcome:
    """What a driver ended with: its weights, and the lr of each group in each step."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.rates: dict[int, dict[str, float]] = {}


class Cut(Exception):
    """The run was cut off, as by a kill."""


# --------------------------------------------------------------------------------------- drivers


def applied(optimizer: lm.Optimizer) -> dict[str, float]:
    """Return the lr of each group in the step just done."""
    return {f"lr/{name}": float(hyper["lr"]) for name, hyper in optimizer.applied.items()}


def plain(folder: Path, cut: int | None = None, resumed: bool = False) -> Outcome:
    """A loop of one's own."""
    outcome = Outcome()
    position, state = 0, None
    if resumed:
        position, cut = cut or 0, None
        state = torch.load(folder / "plain.pt", weights_only=True)
    while True:
        model = make_model()
        saved = None
        if state is not None:
            model.load_state_dict(state["model"])
            saved = state["optimizer"]
        optimizer = PLAN.build(model, steps=STEPS, steps_per_epoch=STEPS_PER_EPOCH, resume=saved)
        try:
            for epoch in range(position // STEPS_PER_EPOCH, EPOCHS):
                for index, batch in enumerate(train_loader()):
                    step = epoch * STEPS_PER_EPOCH + index // ACCUMULATE
                    if step < position:
                        continue
                    loss = model(**batch)["loss"] / batches_in_step(index)
                    loss.backward()
                    if (index + 1) % ACCUMULATE and index + 1 < BATCHES:
                        continue
                    optimizer.step()
                    optimizer.zero_grad()
                    outcome.rates[step] = applied(optimizer)
                    if cut == step + 1:
                        torch.save(
                            {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
                            folder / "plain.pt",
                        )
                        raise Cut
                optimizer.report(eval_loss=evaluate(model))
        except Cut:
            position, cut = cut or 0, None
            state = torch.load(folder / "plain.pt", weights_only=True)
            continue
        outcome.weights = weights(model)
        return outcome


def distributed(folder: Path, sharded: bool) -> Outcome:
    """A loop of one's own on several processes: DDP, or FSDP2."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    outcome = Outcome()
    model: Any = make_model()
    optimizer = PLAN.build(model, steps=STEPS, steps_per_epoch=STEPS_PER_EPOCH)
    if sharded:
        for layer in model.bert.encoder.layer:
            fully_shard(layer)
        wrapped: Any = fully_shard(model)
    else:
        wrapped = DistributedDataParallel(model)
    loader = DataLoader(train_data(), BATCH // WORLD, sampler=in_order())
    for epoch in range(EPOCHS):
        for index, batch in enumerate(loader):
            (wrapped(**batch)["loss"] / batches_in_step(index)).backward()
            if (index + 1) % ACCUMULATE and index + 1 < BATCHES:
                continue
            optimizer.step()
            optimizer.zero_grad()
            outcome.rates[epoch * STEPS_PER_EPOCH + index // ACCUMULATE] = applied(optimizer)
        optimizer.report(eval_loss=evaluate(wrapped))
    outcome.weights = weights(model)
    return outcome


def ddp(folder: Path, cut: int | None = None) -> Outcome:
    """A loop of one's own with DDP."""
    return distributed(folder, sharded=False)


def fsdp2(folder: Path, cut: int | None = None) -> Outcome:
    """A loop of one's own with FSDP2."""
    return distributed(folder, sharded=True)


def transformers_trainer(
    folder: Path, cut: int | None = None, resumed: bool = False, sharded: str = ""
) -> Outcome:
    """The Trainer of Transformers; sharded by FSDP2, it saves `sharded` of the state dicts."""
    import transformers

    from lamina.integrations.transformers import use_plan

    class Stop(transformers.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == cut:
                if WORLD > 1:  # no process goes on before all of the checkpoint is written
                    torch.distributed.barrier()
                raise Cut

    def make() -> transformers.Trainer:
        arguments = transformers.TrainingArguments(
            output_dir=str(folder / "trainer"),
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH // WORLD,
            per_device_eval_batch_size=8 // WORLD,
            gradient_accumulation_steps=ACCUMULATE,
            train_sampling_strategy="sequential",
            eval_strategy="epoch",
            logging_steps=1,
            save_strategy="steps" if cut else "no",
            save_steps=1,
            report_to=[],
            log_level="error",
            use_cpu=True,
            disable_tqdm=True,
            fsdp=bool(sharded) or None,
            fsdp_config={
                "version": 2,
                "transformer_layer_cls_to_wrap": ["BertLayer"],
                "state_dict_type": f"{sharded}_STATE_DICT",
            }
            if sharded
            else None,
        )
        trainer = transformers.Trainer(
            make_model(), arguments, train_dataset=train_data(), eval_dataset=eval_data()
        )
        if sharded:
            force_fsdp(trainer.accelerator, arguments.fsdp_plugin_args)
            trainer.is_fsdp_enabled = True
        use_plan(trainer, PLAN)
        return trainer

    trainer = make()
    if cut:
        if not resumed:
            trainer.add_callback(Stop())
            with contextlib.suppress(Cut):
                trainer.train()
            trainer = make()
        trainer.train(resume_from_checkpoint=str(folder / "trainer" / f"checkpoint-{cut}"))
    else:
        trainer.train()
    outcome = Outcome()
    outcome.weights = weights(trainer.model)
    for entry in trainer.state.log_history:
        if "learning_rate" in entry:
            outcome.rates[entry["step"] - 1] = {
                name: value for name, value in entry.items() if name.startswith("lr/")
            }
    return outcome


def transformers_sharded(folder: Path, cut: int | None = None) -> Outcome:
    """The same with FSDP2, and checkpoints of which each process writes a part."""
    return transformers_trainer(folder, cut, sharded="SHARDED")


def transformers_gathered(folder: Path, cut: int | None = None) -> Outcome:
    """The same with FSDP2, and checkpoints in one file."""
    return transformers_trainer(folder, cut, sharded="FULL")


def force_fsdp(accelerator: Any, plugin: dict[str, Any]) -> None:
    """Make Accelerate use FSDP, which it offers on accelerators only."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin)
    # Each `AcceleratorState()` copies what the shared state says, so that both must say it.
    for state in (accelerator.state.__dict__, PartialState._shared_state):
        state["distributed_type"] = DistributedType.FSDP


def lightning_strategy(sharded: str) -> Any:
    """Return DDP or FSDP2 over `WORLD` processes, which the tests have started."""
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    environment = LightningEnvironment()
    if sharded:
        strategy = ModelParallelStrategy(
            data_parallel_size=WORLD,
            tensor_parallel_size=1,
            save_distributed_checkpoint=sharded == "SHARDED",
            process_group_backend="gloo",
        )
        strategy.cluster_environment = environment
        return strategy
    return DDPStrategy(cluster_environment=environment, process_group_backend="gloo")


def shard_layers(module: Any) -> None:
    """Shard a module of Lightning by FSDP2, once."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(module, FSDPModule):
        return
    mesh = module.device_mesh["data_parallel"]
    for layer in module.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)


def lightning_trainer(
    folder: Path, cut: int | None = None, resumed: bool = False, sharded: str = ""
) -> Outcome:
    """The Trainer of Lightning, which divides a loss by `accumulate` in the last step too.

    Sharded by FSDP2, its checkpoints are a folder (`sharded="SHARDED"`) or one file.
    """
    import lightning.pytorch as pl

    from lamina.integrations.lightning import PlanCallback

    outcome = Outcome()

    class Module(Classifier, pl.LightningModule):
        def configure_model(self) -> None:
            if sharded:
                shard_layers(self)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self(**batch)["loss"] * ACCUMULATE / batches_in_step(batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("eval_loss", self(**batch)["loss"], sync_dist=True)

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            optimizer = plan.optimizer
            if optimizer.clock and optimizer.clock - 1 not in outcome.rates:
                outcome.rates[optimizer.clock - 1] = applied(optimizer)
            if cut == optimizer.clock and not trainer.ckpt_path:
                trainer.save_checkpoint(folder / "lightning.ckpt")
                raise Cut

    def make() -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        callback = PlanCallback(PLAN)
        trainer = pl.Trainer(
            max_epochs=EPOCHS,
            accumulate_grad_batches=ACCUMULATE,
            accelerator="cpu",
            devices=WORLD,
            strategy=lightning_strategy(sharded) if WORLD > 1 else "auto",
            use_distributed_sampler=False,  # it would shuffle
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[callback, Watch()],
        )
        return trainer, Module(), callback

    def loader() -> ResumableLoader:
        return ResumableLoader(train_data(), BATCH // WORLD, sampler=in_order())

    trainer, module, plan = make()
    resume = None
    if cut:
        if not resumed:
            with contextlib.suppress(Cut):
                trainer.fit(module, loader(), eval_loader())
            trainer, module, plan = make()
        resume = folder / "lightning.ckpt"
    trainer.fit(module, loader(), eval_loader(), ckpt_path=resume)
    outcome.weights = weights(module)
    return outcome


def lightning_sharded(folder: Path, cut: int | None = None) -> Outcome:
    """The same with FSDP2, and checkpoints of which each process writes a part."""
    return lightning_trainer(folder, cut, sharded="SHARDED")


def lightning_gathered(folder: Path, cut: int | None = None) -> Outcome:
    """The same with FSDP2, and checkpoints in one file."""
    return lightning_trainer(folder, cut, sharded="FULL")


def accelerate_loop(
    folder: Path, cut: int | None = None, resumed: bool = False, sharded: str = ""
) -> Outcome:
    """A loop with Accelerate, which divides a loss by `accumulate` in the last step too."""
    from accelerate import Accelerator, skip_first_batches
    from accelerate.state import AcceleratorState

    from lamina.integrations.accelerate import prepare

    outcome = Outcome()
    position = 0
    if resumed:
        position, cut = cut or 0, None
    while True:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATE, cpu=True)
        if sharded:
            force_fsdp(accelerator, {"fsdp_version": 2, "state_dict_type": f"{sharded}_STATE_DICT"})
        model, optimizer, loader = prepare(
            accelerator, PLAN, make_model(), train_loader(), epochs=EPOCHS
        )
        if position:
            accelerator.load_state(folder / "accelerate")
        try:
            for epoch in range(position // STEPS_PER_EPOCH, EPOCHS):
                skipped = max(0, position - epoch * STEPS_PER_EPOCH) * ACCUMULATE
                batches = skip_first_batches(loader, skipped) if skipped else loader
                for index, batch in enumerate(batches, start=skipped):
                    with accelerator.accumulate(model):
                        scale = ACCUMULATE / batches_in_step(index)
                        accelerator.backward(model(**batch)["loss"] * scale)
                        optimizer.step()
                        optimizer.zero_grad()
                    if not accelerator.sync_gradients:
                        continue
                    own = lm.unwrap(optimizer)
                    outcome.rates[own.clock - 1] = applied(own)
                    if cut == own.clock:
                        accelerator.save_state(folder / "accelerate")
                        raise Cut
                lm.report(optimizer, eval_loss=evaluate(model))
        except Cut:
            position, cut = cut or 0, None
            continue
        outcome.weights = weights(accelerator.unwrap_model(model))
        return outcome


def accelerate_sharded(folder: Path, cut: int | None = None) -> Outcome:
    """The same with FSDP2."""
    return accelerate_loop(folder, cut, sharded="SHARDED")


def accelerate_gathered(folder: Path, cut: int | None = None) -> Outcome:
    """The same with FSDP2, and checkpoints in one file."""
    return accelerate_loop(folder, cut, sharded="FULL")


def fabric_loop(folder: Path, cut: int | None = None, resumed: bool = False) -> Outcome:
    """A loop with Lightning's Fabric."""
    from lightning.fabric import Fabric

    from lamina.integrations.lightning import setup

    outcome = Outcome()
    position, saved = 0, None
    if resumed:
        position, cut = cut or 0, None
        saved = Fabric(accelerator="cpu", devices=1).load(folder / "fabric.pt")
    while True:
        fabric = Fabric(accelerator="cpu", devices=1)
        start = make_model()
        if saved is not None:
            start.load_state_dict(saved["model"])
        model, optimizer, loader = setup(
            fabric,
            PLAN,
            start,
            train_loader(),
            epochs=EPOCHS,
            accumulate=ACCUMULATE,
            resume=saved["optimizer"] if saved else None,
        )
        try:
            for epoch in range(position // STEPS_PER_EPOCH, EPOCHS):
                for index, batch in enumerate(loader):
                    step = epoch * STEPS_PER_EPOCH + index // ACCUMULATE
                    if step < position:
                        continue
                    fabric.backward(model(**batch)["loss"] / batches_in_step(index))
                    if (index + 1) % ACCUMULATE and index + 1 < BATCHES:
                        continue
                    optimizer.step()
                    optimizer.zero_grad()
                    outcome.rates[step] = applied(optimizer)
                    if cut == step + 1:
                        fabric.save(folder / "fabric.pt", {"model": model, "optimizer": optimizer})
                        raise Cut
                optimizer.report(eval_loss=evaluate(model))
        except Cut:
            position, cut = cut or 0, None
            saved = fabric.load(folder / "fabric.pt")
            continue
        outcome.weights = weights(start)
        return outcome


def lamina_run(folder: Path, cut: int | None = None, resumed: bool = False) -> Outcome:
    """The engine behind `lamina run`, which reports its validation as `val_loss`."""
    from types import ModuleType

    from lamina.training.engine import prepare_run

    left = (cut * ACCUMULATE - cut // STEPS_PER_EPOCH) if cut and not resumed else -1

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal left
        if left == 0:
            left = -1
            raise Cut
        left -= model.training
        return model(**batch)["loss"]

    task: Any = ModuleType("scenario_task")
    task.__file__ = __file__
    task.model, task.loss = make_model, loss
    task.data = lambda: {"train": train_loader(), "validation": eval_loader()}
    task.metrics = lambda model, batch: {"loss": model(**batch)["loss"].expand(8)}
    task.PLAN = PLAN.to_toml().replace("eval_loss", "val_loss")
    settings = {"epochs": EPOCHS, "accumulate": ACCUMULATE, "cpu": True, "out": folder / "run"}
    if cut:
        if not resumed:
            first = prepare_run(task, save_every="1 steps", **settings)
            with contextlib.suppress(Cut), first as session:
                session.train()
        settings = {"resume": folder / "run", "cpu": True}
    with prepare_run(task, **settings) as session:
        session.train()
    outcome = Outcome()
    outcome.weights = weights(session.model)
    for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["kind"] == "step":
            outcome.rates[row["step"]] = {f"lr/{name}": lr for name, lr in row["lr"].items()}
    return outcome


def differences(one: Outcome, other: Outcome) -> Iterator[tuple[str, float]]:
    """Yield the largest difference of each weight, over its largest value.

    Values below 0.001 count as that: what begins at 0 and has no gradient but rounding is noise.
    """
    assert one.weights.keys() == other.weights.keys()
    for name, value in one.weights.items():
        gap = (value - other.weights[name]).abs().max() / value.abs().max().clamp(min=1e-3)
        yield name, float(gap)


DRIVERS = {
    "plain": plain,
    "transformers": transformers_trainer,
    "lightning": lightning_trainer,
    "accelerate": accelerate_loop,
    "fabric": fabric_loop,
    "lamina run": lamina_run,
}

#: those that train on several processes
PARALLEL = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "transformers": transformers_trainer,
    "transformers fsdp2": transformers_sharded,
    "transformers fsdp2 gathered": transformers_gathered,
    "lightning": lightning_trainer,
    "lightning fsdp2": lightning_sharded,
    "lightning fsdp2 gathered": lightning_gathered,
    "accelerate": accelerate_loop,
    "accelerate fsdp2": accelerate_sharded,
    "accelerate fsdp2 gathered": accelerate_gathered,
}
