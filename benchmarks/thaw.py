"""A training step of MiniLM at each stage of a top-down thaw, beside all of it trainable."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import lamina as lm

from .measure import interleave

sys.path.append(str(Path(__file__).parents[1] / "examples" / "tasks"))
from reviews import ENCODER
from task_helpers.encoder import load_classifier
from task_helpers.fetch import fetch

ALL = "all trainable"
#: steps between two stages: many more than are measured
EVERY = 1000
TEXTS, TOKENS = 16, 48


class Stage:
    """A model of its own, at one stage of a plan."""

    def __init__(self, plan: lm.Plan, stage: int, device: str) -> None:
        torch.manual_seed(0)
        self.model = load_classifier(fetch(ENCODER)).to(device).train()
        self.optimizer = plan.build(self.model, steps=20 * EVERY)
        state = self.optimizer.state_dict()
        for group in state["param_groups"]:
            group["clock"] = stage * EVERY
        self.optimizer.load_state_dict(state)
        self.tokens = torch.randint(1000, 20_000, (TEXTS, TOKENS), device=device)
        self.mask = torch.ones_like(self.tokens)
        self.labels = torch.arange(TEXTS, device=device) % 2

    def step(self) -> None:
        logits = self.model(self.tokens, self.mask)
        functional.cross_entropy(logits, self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def trainable(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def state_bytes(self) -> int:
        tensors = (t for entry in self.optimizer.state.values() for t in entry.values())
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def stages(device: str) -> dict[str, Stage]:
    """The head alone, then one more layer at each stage, then the embeddings too."""
    common: dict[str, Any] = {"lr": 1e-6, "clip_norm": 1.0}
    rules = [
        lm.Rule("encoder.layer.{depth}.*", thaw=lm.top_down(every=EVERY)),
        lm.Rule("embeddings.*", thaw=7 * EVERY),
    ]
    plan = lm.Plan(lm.AdamW, **common, rules=rules)
    names = ["head", *(f"top {n}" for n in range(1, 7)), "top 6 and embeddings"]
    found = {ALL: Stage(lm.Plan(lm.AdamW, **common), 0, device)}
    found[f"{ALL} again"] = Stage(lm.Plan(lm.AdamW, **common), 0, device)
    return found | {name: Stage(plan, k, device) for k, name in enumerate(names)}


def thaw_rows(rounds: int, device: str) -> list[dict[str, Any]]:
    """Print the table of all stages and return it for the file."""
    found = stages(device)
    steps: dict[str, Callable[[], None]] = {name: stage.step for name, stage in found.items()}
    times = interleave(steps, lambda: None, rounds)
    title = f"MiniLM, AdamW, forward + backward + clip + step, {TEXTS} texts of {TOKENS} tokens"
    print(f"\n{title}\n  {'stage':<22} {'ms':>8} {'ratio':>7} {'trains':>12} {'state, MB':>10}")
    rows = {}
    for name, stage in found.items():
        ratio = times[name].ratio(times[ALL])
        megabytes = stage.state_bytes / 1e6
        print(
            f"  {name:<22} {times[name].median:8.1f} {ratio:7.3f} {stage.trainable:12,} "
            f"{megabytes:10.1f}"
        )
        rows[name] = {
            "median_ms": times[name].median,
            "ratio": ratio,
            "trainable": stage.trainable,
            "state_bytes": stage.state_bytes,
            "rounds_ms": list(times[name].rounds),
        }
    return [{"title": title, "base": ALL, "candidates": rows}]
