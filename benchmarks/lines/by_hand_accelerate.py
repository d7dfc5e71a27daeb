"""A loop with Accelerate, by hand."""

import math
import re

import torch
from accelerate import Accelerator, skip_first_batches
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from scenario import (
    ACCUMULATE,
    BATCH,
    EPOCHS,
    STEPS,
    STEPS_PER_EPOCH,
    batches_in_step,
    evaluate,
    make_model,
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


class Progress:
    def __init__(self):
        self.done, self.plateau = 0, {"best": math.inf, "factor": 1.0}

    def state_dict(self):
        return {"done": self.done, "plateau": self.plateau}

    def load_state_dict(self, state):
        self.done, self.plateau = state["done"], state["plateau"]


def train(folder, data):
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATE, cpu=True)
    model = make_model()
    optimizer = torch.optim.AdamW(make_groups(model), lr=LR, eps=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, BATCH))
    inner = accelerator.unwrap_model(model)
    path, progress = folder / "last", Progress()
    accelerator.register_for_checkpointing(progress)
    if path.exists():
        accelerator.load_state(path)
    done = progress.done
    for epoch in range(done // STEPS_PER_EPOCH, EPOCHS):
        skipped = max(0, done - epoch * STEPS_PER_EPOCH) * ACCUMULATE
        batches = skip_first_batches(loader, skipped) if skipped else loader
        for index, batch in enumerate(batches, start=skipped):
            begin_step(inner, optimizer, progress.done, progress.plateau)
            with accelerator.accumulate(model):
                scale = ACCUMULATE / batches_in_step(index)
                accelerator.backward(model(**batch)["loss"] * scale)
                if accelerator.sync_gradients:
                    clip(inner)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                progress.done += 1
                accelerator.save_state(path)
        see_loss(progress.plateau, evaluate(model))
    return inner
