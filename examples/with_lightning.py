"""Fine-tune MiniLM on film reviews with Lightning: python examples/with_lightning.py

The same model, texts and plan as the example task `reviews` (tasks/reviews.toml).
"""

import sys
from pathlib import Path

import lightning.pytorch as pl

from lamina.integrations.lightning import PlanCallback

sys.path.insert(0, str(Path(__file__).parent / "tasks"))
import reviews


class Module(pl.LightningModule):
    """The task `reviews` as a LightningModule; the plan brings the optimizer."""

    def __init__(self):
        super().__init__()
        self.model = reviews.model()

    def training_step(self, batch, index):
        return reviews.loss(self.model, batch)

    def validation_step(self, batch, index):
        for name, values in reviews.metrics(self.model, batch).items():
            self.log(f"val_{name}", values.mean(), batch_size=len(values), prog_bar=True)


data = reviews.data()
pl.seed_everything(0)
trainer = pl.Trainer(
    max_epochs=3,
    accelerator="cpu",
    devices=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    callbacks=[PlanCallback(reviews.PLAN, submodule="model")],
)
trainer.fit(Module(), data["train"], data["validation"])
print(f"accuracy {float(trainer.callback_metrics['val_accuracy']):.3f}")
