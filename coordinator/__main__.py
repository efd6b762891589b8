"""`python -m coordinator serve ...` is `comigs serve ...`."""

from edge_runtime.cli import main

main()
