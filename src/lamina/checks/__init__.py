"""Checks of a live model against its plan."""
