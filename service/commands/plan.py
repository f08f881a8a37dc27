"""`gptjet plan`: wired here, written in `gptjet.benchmarks`."""

from __future__ import annotations

from gptjet.benchmarks.cli_plan import EXAMPLES, HELP, plan

__all__ = ["EXAMPLES", "HELP", "plan"]
