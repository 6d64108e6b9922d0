"""What fastdl costs beside its peers: ``pytest benchmarks --benchmark-enable``."""
