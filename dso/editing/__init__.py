"""Editing weights: which ones two models differ in, what they become, and a sparse patch of them."""
