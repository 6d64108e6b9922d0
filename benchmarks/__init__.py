"""fastdl beside its peers: ``pytest benchmarks --benchmark-enable``; ``python -m benchmarks.summary`` writes it up."""
