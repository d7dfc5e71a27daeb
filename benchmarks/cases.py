"""What is compared: which shapes, algorithm and number of groups, with and without clipping."""

from __future__ import annotations

from dataclasses import dataclass

STEP, CLIP_STEP = "step", "clip+step"


@dataclass(frozen=True)
class Case:
    """One table of the comparison.

    Args:
        shapes: a name in `SHAPES`.
        algorithm: a name in `SETTINGS`.
        what: a step, or clipping by the norm of all gradients and a step.
        groups: parameter groups, each with its own learning rate.
        beside: also lamina and torch's fastest with this number of groups.
        quick: whether it is part of `--quick`.
        compiled: whether compiled candidates take part. A compilation takes most of a minute, so
            each of them is compiled for one group of MiniLM only.
        bound: whether the bandwidth bound takes part.
        repeat: steps in a row that make up one time, their median.
        most_rounds: where a step takes long.
    """

    shapes: str
    algorithm: str
    what: str = STEP
    groups: int = 1
    beside: int | None = None
    quick: bool = False
    compiled: bool = False
    bound: bool = False
    repeat: int = 1
    most_rounds: int | None = None

    @property
    def clip(self) -> bool:
        return self.what == CLIP_STEP

    @property
    def title(self) -> str:
        return f"{self.shapes}, {self.algorithm}, {self.what}, groups: {self.groups:,}"


def _minilm(algorithm: str, what: str, groups: int = 1, *, quick: bool = False) -> Case:
    one = groups == 1
    return Case(
        "MiniLM",
        algorithm,
        what,
        groups,
        quick=quick,
        compiled=one and (what == STEP or algorithm in ("AdamW", "SGD", "RMSprop")),
        bound=one and algorithm in ("AdamW", "SGD", "RMSprop"),
    )


CASES = (
    _minilm("AdamW", STEP, quick=True),
    _minilm("AdamW", CLIP_STEP, quick=True),
    _minilm("AdamW", STEP, 26),
    _minilm("AdamW", CLIP_STEP, 26),
    _minilm("AdamW", STEP, 101),
    _minilm("AdamW", CLIP_STEP, 101, quick=True),
    _minilm("SGD", STEP),
    _minilm("SGD", CLIP_STEP, quick=True),
    _minilm("SGD", CLIP_STEP, 101),
    _minilm("RMSprop", STEP, quick=True),
    _minilm("RMSprop", CLIP_STEP),
    _minilm("RMSprop", STEP, 101),
    _minilm("LAMB", STEP, quick=True),
    _minilm("LAMB", CLIP_STEP),
    _minilm("LARS", STEP, quick=True),
    _minilm("LARS", CLIP_STEP),
    _minilm("LayerAdaptiveAdam", STEP, quick=True),
    _minilm("LayerAdaptiveAdam", CLIP_STEP),
    Case("MiniLM in 1,000 tensors", "AdamW", STEP, 1000, beside=1),
    Case("MiniLM in 1,000 tensors", "AdamW", CLIP_STEP, 1000, beside=1, quick=True),
    Case("MiniLM in 1,000 tensors", "RMSprop", STEP, 1000, beside=1),
    Case("ResNet-18", "AdamW", CLIP_STEP, 1),
    Case("ResNet-18", "AdamW", CLIP_STEP, 62),
    Case("ResNet-18", "SGD", CLIP_STEP, 1),
    Case("ResNet-18", "RMSprop", STEP, 1),
    Case("ResNet-18", "LAMB", STEP, 1),
    Case("ResNet-18", "LARS", STEP, 1),
    Case("10,000 tiny tensors", "AdamW", STEP, 1, quick=True),
    Case("10,000 tiny tensors", "AdamW", CLIP_STEP, 1),
    Case("10,000 tiny tensors", "SGD", STEP, 1),
    Case("10 tiny tensors", "AdamW", STEP, 1, quick=True, repeat=50),
    Case("10 tiny tensors", "AdamW", CLIP_STEP, 1, repeat=50),
    Case("10 tiny tensors", "SGD", STEP, 1, repeat=50),
    Case("two matrices of MiniLM", "Muon", STEP, 1, most_rounds=9),
)
