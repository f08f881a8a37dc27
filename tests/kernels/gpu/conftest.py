"""Kernels run through Triton's interpreter: set before anything imports one of their modules."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
