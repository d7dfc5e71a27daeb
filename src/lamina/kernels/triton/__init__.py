"""Update rules in Triton, for what has no fused operator in torch; imported when first used."""

from __future__ import annotations

from .kernel import Triton

__all__ = ["Triton"]
