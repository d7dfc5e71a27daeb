"""A plan resolved for one model: groups, windows, origins, findings, and `values_at`."""
