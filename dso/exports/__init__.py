"""A steering in a form that other programs load: merged into a checkpoint's weights, or as an adapter."""
