"""What `python -m tools.bench` runs, one file a kind."""
