"""A loop with Lightning's Fabric, by hand."""

import math
import re

import torch
from lightning.fabric import Fabric
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from scenario import (
    ACCUMULATE,
    BATCH,
    BATCHES,
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


def train(folder, data):
    fabric = Fabric(accelerator="cpu", devices=1)
    model = make_model()
    optimizer = torch.optim.AdamW(make_groups(model), lr=LR, eps=1e-3)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(data, BATCH))
    path, done, plateau = folder / "last.pt", 0, {"best": math.inf, "factor": 1.0}
    if path.exists():
        saved = fabric.load(path, {"model": model, "optimizer": optimizer})
        done, plateau = saved["done"], saved["plateau"]
    for epoch in range(done // STEPS_PER_EPOCH, EPOCHS):
        for index, batch in enumerate(loader):
            step = epoch * STEPS_PER_EPOCH + index // ACCUMULATE
            if step < done:
                continue
            begin_step(model, optimizer, step, plateau)
            fabric.backward(model(**batch)["loss"] / batches_in_step(index))
            if (index + 1) % ACCUMULATE and index + 1 < BATCHES:
                continue
            clip(model)
            optimizer.step()
            optimizer.zero_grad()
            state = {"model": model, "optimizer": optimizer}
            fabric.save(path, {**state, "done": step + 1, "plateau": plateau})
        see_loss(plateau, evaluate(model))
    return model.module
