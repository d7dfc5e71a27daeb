"""Measurements of lamina beside torch, in one process: `python -m benchmarks`."""
