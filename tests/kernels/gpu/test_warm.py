"""What `gptjet warm-cache` compiles is what a server on a card looks for, under the same key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("warmed_launches.py")


def run(cache: Path, *arguments: str) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize(
    ("capability", "weight_type", "kv_dtype"),
    [("75", "float16", "float16"), ("75", "int4", "int8"), ("90", "int8", "float16")],
)
def test_every_launch_of_a_loaded_checkpoint_has_the_key_of_a_warmed_kernel(
    tmp_path: Path, capability: str, weight_type: str, kv_dtype: str
) -> None:
    found = run(tmp_path, "keys", capability, weight_type, kv_dtype)
    launched, warmed = found["launched"], found["warmed"]
    missing = {name for key, name in launched.items() if key not in warmed}
    assert not missing
    assert set(launched.values()) == set(warmed.values())
    assert len(launched) > 20


def test_warmed_kernel_is_launched_without_any_compiler(tmp_path: Path) -> None:
    found = run(tmp_path, "compiled")
    assert found == {
        "hits": [True],
        "loaded": ["cuda_utils", "__triton_launcher"],
        "num_launches": 1,
    }
