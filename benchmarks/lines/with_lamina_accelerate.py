"""A loop with Accelerate, with a plan."""

from pathlib import Path

from accelerate import Accelerator, skip_first_batches
from torch.utils.data import DataLoader

import lamina as lm
from lamina.integrations.accelerate import prepare
from scenario import (
    ACCUMULATE,
    BATCH,
    EPOCHS,
    STEPS_PER_EPOCH,
    batches_in_step,
    evaluate,
    make_model,
)

PLAN = Path(__file__).with_name("plan.toml")


def train(folder, data):
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATE, cpu=True)
    loader = DataLoader(data, BATCH)
    model, optimizer, loader = prepare(accelerator, PLAN, make_model(), loader, epochs=EPOCHS)
    path = folder / "last"
    if path.exists():
        accelerator.load_state(path)
    done = lm.unwrap(optimizer).clock
    for epoch in range(done // STEPS_PER_EPOCH, EPOCHS):
        skipped = max(0, done - epoch * STEPS_PER_EPOCH) * ACCUMULATE
        batches = skip_first_batches(loader, skipped) if skipped else loader
        for index, batch in enumerate(batches, start=skipped):
            with accelerator.accumulate(model):
                scale = ACCUMULATE / batches_in_step(index)
                accelerator.backward(model(**batch)["loss"] * scale)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                accelerator.save_state(path)
        lm.report(optimizer, eval_loss=evaluate(model))
    return accelerator.unwrap_model(model)
