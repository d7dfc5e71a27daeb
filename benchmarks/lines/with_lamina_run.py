"""A task for `lamina run with_lamina_run.py --epochs 3 --accumulate 2 --save-every "1 steps"`."""

from pathlib import Path

from torch.utils.data import DataLoader

from scenario import BATCH, eval_loader, make_model, train_data

PLAN = Path(__file__).with_name("plan.toml").read_text().replace("eval_loss", "val_loss")


def model():
    return make_model()


def data():
    return {"train": DataLoader(train_data(), BATCH), "validation": eval_loader()}


def loss(model, batch):
    return model(**batch)["loss"]


def metrics(model, batch):
    return {"loss": loss(model, batch).expand(len(batch["labels"]))}
