"""Trainers: what learns a steering from the rewards of :mod:`envs`."""
