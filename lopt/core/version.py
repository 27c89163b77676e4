"""The version of lopt that is installed, which files, reports and the command line name; importing it costs nothing."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("lopt")
except PackageNotFoundError:  # the sources are on the path, but not installed
    VERSION = "0+unknown"
