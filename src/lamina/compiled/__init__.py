"""Loops compiled by Numba, for the CPU; without Numba nothing in here is used."""
