"""Writing files so that no reader sees half of one."""

from __future__ import annotations

import tempfile
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader sees the old one or the new one."""
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8"
    ) as file:
        try:
            file.write(text)
            file.close()
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
