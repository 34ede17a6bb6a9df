"""Decisions: the data model, its files and splits, and the matcher that reads answers. Sets are in ``sets``."""
