"""Benchmarks: ``python -m bench op|layer|model``, ``bench.backbones``, ``bench.passes``; ``bench.demo`` to look at."""
