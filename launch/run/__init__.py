"""A run: its folder, its objects, the learning, and what it writes."""
