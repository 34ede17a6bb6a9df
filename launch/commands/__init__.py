"""The commands of ``dso``."""
