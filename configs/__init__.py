"""Shipped configs, found by name through :func:`launch.config.load_config`. Data only: no code."""
