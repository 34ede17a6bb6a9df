"""Environments: a decision in, a reward out; no optimiser here."""
