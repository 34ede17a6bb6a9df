"""What `python -m launch.bench` runs, one file a kind."""
