"""Benchmarks: ``python -m bench op|layer|model``, ``bench.backbones``, ``bench.passes``, and ``python -m bench.demo``."""
