"""A loop of one's own, by hand."""

import math
import re

import torch
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
    model = make_model()
    optimizer = torch.optim.AdamW(make_groups(model), lr=LR, eps=1e-3)
    path, done, plateau = folder / "last.pt", 0, {"best": math.inf, "factor": 1.0}
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done, plateau = saved["done"], saved["plateau"]
    for epoch in range(done // STEPS_PER_EPOCH, EPOCHS):
        for index, batch in enumerate(DataLoader(data, BATCH)):
            step = epoch * STEPS_PER_EPOCH + index // ACCUMULATE
            if step < done:
                continue
            begin_step(model, optimizer, step, plateau)
            (model(**batch)["loss"] / batches_in_step(index)).backward()
            if (index + 1) % ACCUMULATE and index + 1 < BATCHES:
                continue
            clip(model)
            optimizer.step()
            optimizer.zero_grad()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "done": step + 1, "plateau": plateau}, path)
        see_loss(plateau, evaluate(model))
    return model
