"""What lamina's speed is held to: a ratio of medians of one run, met or missed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import bound
from .cases import CLIP_STEP, STEP, Case
from .compare import beside_name

PLAN, DROP_IN, FUSED = "lamina plan", "lamina drop-in", "torch fused"
UNCHECKED = "lamina plan unchecked"
BEST_OF_TORCH = ("torch default", "torch foreach", "torch compiled")
ELSEWHERE = ("pytorch_optimizer loop", "pytorch_optimizer", "pytorch_optimizer compiled")
NAIVE = ("naive", "naive with .item()")


@dataclass(frozen=True)
class Target:
    """The median of a candidate over that of the fastest it is compared with, at most `limit`."""

    case: Case
    candidate: str
    against: tuple[str, ...]
    limit: float

    def row(self, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The target with what was measured; `cases` by title."""
        row: dict[str, Any] = {
            "case": self.case.title,
            "candidate": self.candidate,
            "against": " or ".join(self.against),
            "limit": self.limit,
            "ratio": None,
            "fastest": None,
            "verdict": "not measured",
        }
        rows = cases.get(self.case.title, {}).get("rows", {})
        times = {name: rows[name]["median_ms"] for name in self.against if name in rows}
        if self.candidate not in rows or not times:
            return row
        fastest = min(times, key=lambda name: times[name])
        ratio = rows[self.candidate]["median_ms"] / times[fastest]
        row.update(ratio=round(ratio, 3), fastest=fastest)
        row["verdict"] = "met" if ratio <= self.limit else "missed"
        left_out = [name for name in self.against if name not in rows]
        if left_out:
            row["verdict"] += f" (without {', '.join(left_out)})"
        return row


def _each(case: Case, against: tuple[str, ...], limit: float) -> list[Target]:
    """A step is lamina's in three ways, of which a plan also checks every gradient."""
    return [Target(case, name, against, limit) for name in (PLAN, UNCHECKED, DROP_IN)]


IN_1000 = Case("MiniLM in 1,000 tensors", "AdamW", CLIP_STEP, 1000)
TARGETS = (
    Target(Case("MiniLM", "AdamW", CLIP_STEP, 1), PLAN, (FUSED,), 0.68),
    Target(Case("MiniLM", "AdamW", CLIP_STEP, 101), PLAN, (FUSED,), 0.68),
    Target(IN_1000, PLAN, (FUSED,), 0.68),
    *_each(Case("MiniLM", "AdamW", STEP), (FUSED,), 1.02),
    Target(Case("MiniLM", "SGD", CLIP_STEP), PLAN, (FUSED,), 0.80),
    *_each(Case("MiniLM", "RMSprop", STEP), BEST_OF_TORCH, 0.30),
    *_each(Case("MiniLM", "LAMB", STEP), ELSEWHERE, 0.35),
    *_each(Case("MiniLM", "LARS", STEP), ELSEWHERE, 0.35),
    *_each(Case("MiniLM", "LayerAdaptiveAdam", STEP), NAIVE, 0.35),
    Target(IN_1000, PLAN, (beside_name(PLAN, 1),), 1.15),
    *_each(Case("10,000 tiny tensors", "AdamW", STEP), (FUSED,), 0.80),
    *_each(Case("10 tiny tensors", "AdamW", STEP), (FUSED,), 1.50),
    *_each(Case("MiniLM", "AdamW", STEP), (bound.NAME,), 1.25),
)


def target_rows(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every target with its measured ratio, from the results of the cases."""
    by_title = {case["title"]: case for case in cases}
    return [target.row(by_title) for target in TARGETS]
