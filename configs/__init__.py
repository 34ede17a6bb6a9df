"""Shipped configs, found by name through :func:`launch.config.schema.load_config`. Data only: no code."""
