"""The sections of a visit, each run in a process of its own."""
