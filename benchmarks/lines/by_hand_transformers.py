"""The Trainer of Transformers, by hand."""

import math
import re

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

from scenario import ACCUMULATE, BATCH, EPOCHS, STEPS, eval_data, make_model

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


class Control(TrainerCallback, ExportableState):
    def __init__(self, best=math.inf, factor=1.0):
        self.plateau = {"best": best, "factor": factor}

    def state(self):
        return {"args": self.plateau, "attributes": {}}

    def on_step_begin(self, args, state, control, model, optimizer, **_):
        begin_step(model, optimizer, state.global_step, self.plateau)

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        clip(model)

    def on_evaluate(self, args, state, control, metrics, **_):
        see_loss(self.plateau, metrics["eval_loss"])


def train(folder, data):
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATE,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        restore_callback_states_from_checkpoint=True,
        eval_strategy="epoch",
        save_strategy="steps",
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    model = make_model()
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=eval_data(),
        optimizers=(torch.optim.AdamW(make_groups(model), lr=LR, eps=1e-3), None),
        callbacks=[Control()],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
    return trainer.model
