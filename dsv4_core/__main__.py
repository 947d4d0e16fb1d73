"""``python -m dsv4_core``: the command line, as torchrun starts it."""

from dsv4_core.cli import main

main()
