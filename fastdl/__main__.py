"""``python -m fastdl``: the command line."""

from fastdl.cli import main

main()
