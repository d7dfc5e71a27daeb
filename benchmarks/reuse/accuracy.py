"""The same accuracy in less time? Full fine-tuning beside a staged plan with reuse, both tuned.

Each side is tried with the same number of settings, once each, on texts that are used for nothing
else. The setting with the best accuracy there is then trained with several seeds and judged by the
held-out texts. Both train on the same texts in batches of the same form.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import lamina as lm

from .workloads import SIZE, Batch, Workload, padded, random_texts, small_encoder, text_arguments

HEAD_LR = 1e-3
#: a seed that is used in the search only
SEARCH_SEED = 100
#: texts are padded to the longest one of their group
GROUPS = 4
LIMIT = 0.6


@dataclass(frozen=True)
class Trial:
    """A setting of one side: its name, its plan, its epochs, and whether it reuses."""

    label: str
    plan: lm.Plan
    epochs: int
    reuse: bool


def full(lr: float, decay: float) -> Trial:
    """All layers train from the start."""
    rules = [lm.Rule("encoder.layer.{depth}.*", lr=lm.by_depth(decay))] if decay < 1 else []
    how = f"times {decay:g} for each layer down" if decay < 1 else "the same in all layers"
    schedule = lm.warmup("6%") >> lm.cosine(to=0.01)
    return Trial(f"lr {lr:g}, {how}", _plan(lr, rules, schedule, HEAD_LR), 3, reuse=False)


def last_layers(lr: float, layers: int) -> Trial:
    """The head alone for two epochs, then the upper half of the layers as well."""
    return _staged(f"lr {lr:g}, the upper half", lr, layers // 2, layers, (2, 0.5, 5))


def down_to_the_bottom(lr: float, layers: int) -> Trial:
    """The head alone for an epoch, then one layer after another; the embeddings stay frozen."""
    return _staged(f"lr {lr:g}, down to the bottom", lr, 0, layers, (1, 1.5 / layers, 3))


def _staged(
    label: str, lr: float, lowest: int, layers: int, epochs: tuple[float, float, int]
) -> Trial:
    """Thaw layers from the top down.

    Args:
        label: of the setting.
        lr: of the layers.
        lowest: the number of the lowest layer that trains.
        layers: how many there are.
        epochs: of the head alone, from one layer to the next, and in all.
    """
    start, every, whole = epochs
    last = "".join(map(str, range(lowest, layers)))
    rules = [
        lm.Rule("embeddings.* | encoder.*", frozen=True),
        lm.Rule(
            f"encoder.layer.{{depth}}.* & encoder.layer.[{last}].*",
            thaw=lm.top_down(every=f"{every} epochs", start=f"{start} epochs"),
        ),
    ]
    schedule = lm.constant(length=f"{start} epochs") >> lm.cosine(to=0.01)
    return Trial(label, _plan(lr, rules, schedule, 3 * HEAD_LR), whole, reuse=True)


def _plan(lr: float, rules: list[lm.Rule], schedule: Any, head_lr: float) -> lm.Plan:
    rules = [
        *rules,
        lm.Rule("classifier.*", lr=head_lr),
        lm.Rule("*.bias | type:LayerNorm", weight_decay=0),
    ]
    return lm.Plan(
        lm.AdamW, lr=lr, weight_decay=0.01, schedule=schedule, clip_norm=1.0, rules=rules
    )


def sides(layers: int) -> dict[str, list[Trial]]:
    """The settings of both sides, equally many."""
    return {
        "full fine-tuning": [full(lr, decay) for lr in (1e-4, 2e-4) for decay in (1, 0.8)],
        "staged, with reuse": [
            how(lr, layers) for lr in (2e-4, 4e-4) for how in (last_layers, down_to_the_bottom)
        ],
    }


def first_of_each(found: dict[str, list[Trial]]) -> dict[str, list[Trial]]:
    """A search with one setting for each side, to see that it works."""
    return {name: trials[:1] for name, trials in found.items()}


# --- texts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """What is trained on, and the texts of the search and of the judgement."""

    train: Workload
    search: Workload
    held_out: Workload


def reviews_texts() -> Texts:
    """The training and held-out texts of the task `reviews`, and as many others for the search."""
    import reviews
    from task_helpers.fetch import fetch
    from task_helpers.snippets import read_snippets, split

    known = reviews.HELD_OUT_TEXTS
    # The same order as in the task, so its training texts come first and are followed by new ones.
    rest, held_out = split(
        read_snippets(fetch(reviews.TEXTS) / "movie.txt"),
        reviews.TRAIN_TEXTS + known,
        known,
        reviews.SPLIT_SEED,
    )
    tokenizer = reviews._tokenizer(fetch(reviews.ENCODER) / "tokenizer.json")
    parts = rest[: reviews.TRAIN_TEXTS], rest[reviews.TRAIN_TEXTS :], held_out
    return Texts(*(_in_groups(reviews.model, reviews._encode(tokenizer, part)) for part in parts))


def small_accuracy_texts() -> Texts:
    """Random words for a small encoder."""
    return Texts(*(_in_groups(small_encoder, random_texts(64, seed)) for seed in range(3)))


def _in_groups(model: Any, items: Sequence[Any]) -> Workload:
    """Texts in groups of similar length, so that little is padding and there are few lengths."""
    ordered = sorted(items, key=lambda item: len(item.tokens))
    # A batch is of one group, so each group is a number of whole batches, but for the last texts.
    share = -(-len(ordered) // (GROUPS * SIZE)) * SIZE
    parts = [ordered[start : start + share] for start in range(0, len(ordered), share)]
    groups = [padded(part, max(len(item.tokens) for item in part)) for part in parts]
    return Workload("texts", "", model, text_arguments, groups, SIZE, (), ())


# --- training -------------------------------------------------------------------------------------


def search_and_judge(
    texts: Texts,
    tried: dict[str, list[Trial]],
    seeds: int,
    found: dict[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield what is found so far: after the search, and after each seed.

    With `found`, which an earlier run has yielded for the same settings, goes on from there.
    """
    found = found or {"search": {}, "sides": {}}
    found["seeds"] = seeds
    chosen = {}
    for name, trials in tried.items():
        if name not in found["search"]:
            found["search"][name] = [
                {"label": trial.label, **trained(trial, texts.train, texts.search, SEARCH_SEED)}
                for trial in trials
            ]
        runs = found["search"][name]
        best = max(range(len(trials)), key=lambda place: runs[place]["accuracy"])
        chosen[name] = trials[best]
        side = {"chosen": trials[best].label, "tries": len(trials), "epochs": trials[best].epochs}
        found["sides"].setdefault(name, {**side, "runs": []})
        yield found
    done = min(len(found["sides"][name]["runs"]) for name in chosen)
    for seed in range(done, seeds):
        for name, trial in chosen.items():
            run = trained(trial, texts.train, texts.held_out, seed)
            found["sides"][name]["runs"][seed:] = [run]
        found["differences"] = _differences(found["sides"])
        found["time_ratio"] = round(_ratio(found["sides"], "seconds"), 3)
        found["processor_ratio"] = round(_ratio(found["sides"], "processor_seconds"), 3)
        yield found


def trained(trial: Trial, train: Workload, judged_by: Workload, seed: int) -> dict[str, float]:
    """Train once; the accuracy, and the seconds of the training alone."""
    torch.manual_seed(seed)
    model = train.model().train()
    length = train.steps_per_epoch
    batches = [train.epoch(epoch, seed) for epoch in range(trial.epochs)]
    optimizer = trial.plan.build(model, epochs=trial.epochs, steps_per_epoch=length)
    clock, processor = time.perf_counter(), time.process_time()
    reused = lm.reuse(model, optimizer) if trial.reuse else None
    for epoch in batches:
        for batch in epoch:
            train.loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    if reused is not None:
        reused.close()
    spent = time.perf_counter() - clock, time.process_time() - processor
    return {
        "accuracy": round(accuracy(model, judged_by), 4),
        "seconds": round(spent[0], 2),
        "processor_seconds": round(spent[1], 2),
    }


@torch.no_grad()
def accuracy(model: nn.Module, workload: Workload) -> float:
    """The share of the examples whose class is found."""
    model.eval()
    right = [_right(model, workload, batch) for batch in workload.epoch(0)]
    return float(torch.cat(right).float().mean())


def _right(model: nn.Module, workload: Workload, batch: Batch) -> torch.Tensor:
    found: torch.Tensor = model(*workload.arguments(batch)).argmax(1) == batch["labels"]
    return found


def _differences(found: dict[str, Any]) -> list[float]:
    """The accuracy of the staged plan minus that of full fine-tuning, seed by seed."""
    base, other = (side["runs"] for side in found.values())
    return [
        round(mine["accuracy"] - theirs["accuracy"], 4)
        for mine, theirs in zip(other, base, strict=True)
    ]


def _ratio(found: dict[str, Any], key: str) -> float:
    """The median of the ratios of time, seed by seed."""
    base, other = (side["runs"] for side in found.values())
    return statistics.median(
        mine[key] / theirs[key] for mine, theirs in zip(other, base, strict=True)
    )
