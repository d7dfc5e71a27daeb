"""Third-party optimizers as parts of a plan."""
