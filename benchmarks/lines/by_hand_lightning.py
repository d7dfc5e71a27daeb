"""The Trainer of Lightning, by hand."""

import math
import re

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.utils import clip_grad_norm_

from scenario import (
    ACCUMULATE,
    BATCH,
    EPOCHS,
    STEPS,
    Classifier,
    ResumableLoader,
    batches_in_step,
    eval_loader,
)

LR, LAYERS, THAW_EVERY = 2e-3, 3, 3
WARMUP = math.ceil(0.15 * STEPS)


def make_groups(model):
    groups = {}
    for name, param in model.named_parameters():
        if name.startswith("bert.embeddings."):
            param.requires_grad_(False)
            continue
        layer = re.search(r"layer\.(\d+)\.", name)
        rate = LR * (0.8 ** (LAYERS - 1 - int(layer[1])) if layer else 3)
        decay = 0.0 if name.endswith(".bias") or ".LayerNorm." in name else 0.01
        groups.setdefault((rate, decay), []).append(param)
    return [
        {"params": params, "base_lr": rate, "weight_decay": decay}
        for (rate, decay), params in groups.items()
    ]


def begin_step(model, optimizer, step, plateau):
    if step < WARMUP:
        factor = step / WARMUP
    else:
        progress = (step - WARMUP) / (STEPS - WARMUP)
        factor = 0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor * plateau["factor"]
    for index, layer in enumerate(model.bert.encoder.layer):
        layer.requires_grad_(step >= THAW_EVERY * (LAYERS - index))


def clip(model):
    clip_grad_norm_(model.bert.encoder.layer.parameters(), 0.5)
    clip_grad_norm_(model.classifier.parameters(), 1.0)


def see_loss(plateau, loss):
    if loss < plateau["best"] * (1 - 0.2):
        plateau["best"] = loss
    else:
        plateau["factor"] *= 0.5


class Module(Classifier, pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.plateau = {"best": math.inf, "factor": 1.0}

    def configure_optimizers(self):
        return torch.optim.AdamW(make_groups(self), lr=LR, eps=1e-3)

    def on_train_batch_start(self, batch, index):
        begin_step(self, self.optimizers(), self.global_step, self.plateau)

    def training_step(self, batch, index):
        return self(**batch)["loss"] * ACCUMULATE / batches_in_step(index)

    def configure_gradient_clipping(self, optimizer, **_):
        clip(self)

    def validation_step(self, batch, index):
        self.log("eval_loss", self(**batch)["loss"])

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            see_loss(self.plateau, float(self.trainer.callback_metrics["eval_loss"]))

    def on_save_checkpoint(self, checkpoint):
        checkpoint["plateau"] = self.plateau

    def on_load_checkpoint(self, checkpoint):
        self.plateau = checkpoint["plateau"]


def train(folder, data):
    torch.manual_seed(0)
    module, last = Module(), folder / "last.ckpt"
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accumulate_grad_batches=ACCUMULATE,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)],
    )
    path = last if last.exists() else None
    trainer.fit(module, ResumableLoader(data, BATCH), eval_loader(), ckpt_path=path)
    return module
