"""The Trainer of Lightning, with a plan."""

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lamina.integrations.lightning import PlanCallback
from scenario import (
    ACCUMULATE,
    BATCH,
    EPOCHS,
    Classifier,
    ResumableLoader,
    batches_in_step,
    eval_loader,
)

PLAN = Path(__file__).with_name("plan.toml")


class Module(Classifier, pl.LightningModule):
    def training_step(self, batch, index):
        return self(**batch)["loss"] * ACCUMULATE / batches_in_step(index)

    def validation_step(self, batch, index):
        self.log("eval_loss", self(**batch)["loss"])


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
        callbacks=[
            PlanCallback(PLAN),
            ModelCheckpoint(folder, save_last=True, every_n_train_steps=1),
        ],
    )
    path = last if last.exists() else None
    trainer.fit(module, ResumableLoader(data, BATCH), eval_loader(), ckpt_path=path)
    return module
