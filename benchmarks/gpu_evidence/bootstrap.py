"""Starts the evidence from a bare checkout: `python3 benchmarks/gpu_evidence/bootstrap.py`.

For a machine with PyTorch and transformers, without a network, an installation or `make`. It links
the rooms under the name `gptjet`, unpacks carried wheels beside them, and becomes
`python -m gptjet.benchmarks.gpu_evidence` with the flags it does not know. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_ROOMS = ("proto", "service", "kernels", "benchmarks")


def main() -> None:
    """Prepare the folder and replace this process by the evidence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", default="", help="a folder of wheels to unpack first")
    parser.add_argument("--folder", type=Path, default=_ROOT / "build" / "gpu-evidence")
    flags, evidence_flags = parser.parse_known_args()
    links, site = flags.folder / "path", flags.folder / "site"
    link_rooms(links / "gptjet")
    if flags.wheels:
        unpack_wheels(Path(flags.wheels), site)
    path = [str(links), str(site), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(entry for entry in path if entry)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    command = [sys.executable, "-m", "gptjet.benchmarks.gpu_evidence", *evidence_flags]
    sys.stdout.flush()
    os.execv(sys.executable, command)


def link_rooms(folder: Path) -> None:
    """Make `folder` a package path that holds a link to each room of this checkout."""
    folder.mkdir(parents=True, exist_ok=True)
    for room in _ROOMS:
        link = folder / room
        link.unlink(missing_ok=True)
        link.symlink_to(_ROOT / room, target_is_directory=True)


def unpack_wheels(wheels: Path, site: Path) -> None:
    """Install every wheel of the folder into `site`, offline and without its dependencies."""
    files = sorted(str(file) for file in wheels.glob("*.whl"))
    if not files:
        sys.exit(f"there are no wheels in {wheels}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site), *files]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
