"""Helpers that know nothing of optimizers: text, numbers, tensors, a grammar, warnings."""
