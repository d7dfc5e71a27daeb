"""A first plan for a model, written by looking at its modules and shapes."""

from __future__ import annotations

from .plan import StarterPlan, starter_plan

__all__ = ["StarterPlan", "starter_plan"]
