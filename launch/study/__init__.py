"""``dso compare CONFIG``: a steering and its rivals through one evaluation."""
