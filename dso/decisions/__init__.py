"""Decisions: the data model, its files and splits, and the matcher that reads free-form answers. Sets: ``sets``."""
