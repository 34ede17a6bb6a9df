"""What a steering is compared with, one file a method (:mod:`dso.baselines.registry` lists them)."""
