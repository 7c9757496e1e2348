"""Benchmarks: ``python -m bench op|layer|model``, ``bench.backbones``, ``bench.passes``; the demonstration ``bench.demo``."""
