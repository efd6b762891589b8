"""`python -m edge_runtime` is the `comigs` command."""

from edge_runtime.cli import main

main()
