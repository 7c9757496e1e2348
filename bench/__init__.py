"""Benchmarks: ``python -m bench op|layer|model``, and the demonstration ``python -m bench.demo``."""
