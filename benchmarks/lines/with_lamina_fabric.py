"""A loop with Lightning's Fabric, with a plan."""

from pathlib import Path

from lightning.fabric import Fabric
from torch.utils.data import DataLoader

from lamina.integrations.lightning import setup
from scenario import (
    ACCUMULATE,
    BATCH,
    BATCHES,
    EPOCHS,
    STEPS_PER_EPOCH,
    batches_in_step,
    evaluate,
    make_model,
)

PLAN = Path(__file__).with_name("plan.toml")


def train(folder, data):
    fabric = Fabric(accelerator="cpu", devices=1)
    model, path, saved = make_model(), folder / "last.pt", None
    if path.exists():
        saved = fabric.load(path)
        model.load_state_dict(saved["model"])
    model, optimizer, loader = setup(
        fabric,
        PLAN,
        model,
        DataLoader(data, BATCH),
        epochs=EPOCHS,
        accumulate=ACCUMULATE,
        resume=saved and saved["optimizer"],
    )
    done = optimizer.clock
    for epoch in range(done // STEPS_PER_EPOCH, EPOCHS):
        for index, batch in enumerate(loader):
            if epoch * STEPS_PER_EPOCH + index // ACCUMULATE < done:
                continue
            fabric.backward(model(**batch)["loss"] / batches_in_step(index))
            if (index + 1) % ACCUMULATE and index + 1 < BATCHES:
                continue
            optimizer.step()
            optimizer.zero_grad()
            fabric.save(path, {"model": model, "optimizer": optimizer})
        optimizer.report(eval_loss=evaluate(model))
    return model.module
