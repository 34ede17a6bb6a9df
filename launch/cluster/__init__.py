"""Many processes on many machines: launchers, DeepSpeed, Slurm, sweeps."""
