"""`python -m coordinator serve ...` is `comigs serve ...`."""

from edge_runtime.cli import main

if __name__ == "__main__":
    main()
