"""`gptjet sweep`: wired here, written in `gptjet.benchmarks`."""

from __future__ import annotations

from gptjet.benchmarks.cli_sweep import app

__all__ = ["app"]
