"""What a run will need, said without touching a weight."""
