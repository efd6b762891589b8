"""Measures what this project does, beside what people would otherwise use."""
