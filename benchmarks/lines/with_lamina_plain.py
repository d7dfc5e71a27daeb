"""A loop of one's own, with a plan."""

from pathlib import Path

import torch
from torch.utils.data import DataLoader

import lamina as lm
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

PLAN = lm.Plan.from_toml(Path(__file__).with_name("plan.toml"))


def train(folder, data):
    model = make_model()
    path, saved = folder / "last.pt", None
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
    optimizer = PLAN.build(
        model,
        epochs=EPOCHS,
        steps_per_epoch=STEPS_PER_EPOCH,
        resume=saved and saved["optimizer"],
    )
    done = optimizer.clock
    for epoch in range(done // STEPS_PER_EPOCH, EPOCHS):
        for index, batch in enumerate(DataLoader(data, BATCH)):
            if epoch * STEPS_PER_EPOCH + index // ACCUMULATE < done:
                continue
            (model(**batch)["loss"] / batches_in_step(index)).backward()
            if (index + 1) % ACCUMULATE and index + 1 < BATCHES:
                continue
            optimizer.step()
            optimizer.zero_grad()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        optimizer.report(eval_loss=evaluate(model))
    return model
