"""Who hears of a run: records on disk, Weights & Biases, TensorBoard."""
