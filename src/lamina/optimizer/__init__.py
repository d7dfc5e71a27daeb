"""The optimizer that carries out a plan."""
