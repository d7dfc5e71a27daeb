"""Saved optimizer state: its form, and how it is matched to a plan by name."""
