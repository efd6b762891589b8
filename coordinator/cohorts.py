"""Cohorts: devices that share a generalist, and its rounds."""

from __future__ import annotations

import re
from pathlib import PurePath

from protos import manifest_pb2

UNNAMED = "default"


def name_of(manifest: manifest_pb2.Manifest) -> str:
    """Of the cohort of a bundle: its base's, in letters that a file's name may have."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", PurePath(manifest.base.name).name)
    return name.strip(".-")[:64] or UNNAMED
