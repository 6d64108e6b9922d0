"""The parts of a visit to a GPU; ``benchmarks/gpu_report.py`` puts them together."""
