"""Oracles: scalar re-writes from the papers, and torch's own optimizers."""
