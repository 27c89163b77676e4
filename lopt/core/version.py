"""The version of lopt, that its metadata, files, reports and the command line name: the one place that has it."""

from __future__ import annotations

VERSION = "0.1.0"
