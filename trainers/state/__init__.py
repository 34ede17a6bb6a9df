"""The state that a run goes on from."""
