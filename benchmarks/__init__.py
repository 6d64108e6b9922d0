"""Speed beside peers: ``pytest benchmarks --benchmark-enable``, ``python -m benchmarks.summary``."""
