"""Measuring a steering: running a set, bias and its intervals, and the tables, figures and cards that show them."""
