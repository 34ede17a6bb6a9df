"""The command line, the typed config and the jobs it starts."""
