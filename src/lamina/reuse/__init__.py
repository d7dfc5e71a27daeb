"""Reuse the outputs of what is frozen, with the same bits; see docs/reuse.md."""

from __future__ import annotations

from .session import Session
from .store import Store


def reuse(model, optimizer, *, memory=2 * 2**30):
    return Session(model, optimizer, Store(memory))
