"""The coordinator: runs rounds in which devices exchange the generalist, and nothing else."""
