"""What `gptjet warm-cache` compiles is what a server on a card looks for, under the same key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptjet.kernels.gpu.offline import Launch
from gptjet.kernels.gpu.warm import WarmError, compile_all

SCRIPT = Path(__file__).with_name("warmed_launches.py")


def run(cache: Path, *arguments: str) -> Any:
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
    return json.loads(done.stdout.splitlines()[-1])


def test_every_launch_of_a_loaded_checkpoint_has_the_key_of_a_warmed_kernel(
    tmp_path: Path,
) -> None:
    cases = ("75:float16:float16", "75:int4:int8", "90:int8:float16")
    for case, found in zip(cases, run(tmp_path, "keys", *cases), strict=True):
        launched, warmed = found["launched"], found["warmed"]
        assert not {name for key, name in launched.items() if key not in warmed}, case
        assert set(launched.values()) == set(warmed.values()), case
        assert len(launched) > 20
        # However long a prompt is, its index arrays begin where kernels expect them.
        assert list(launched.values()).count("_rotary_write_kv_kernel") == 1, case


def test_warmed_kernel_is_launched_without_any_compiler(tmp_path: Path) -> None:
    found = run(tmp_path, "compiled")
    assert found == {
        "hits": [True],
        "loaded": ["cuda_utils", "__triton_launcher"],
        "num_launches": 1,
    }


@pytest.mark.parametrize(
    ("what", "cause", "problem", "mend"),
    [
        ("compiler", "RuntimeError", "no C compiler: ", "apt-get install -y gcc"),
        ("headers", "CalledProcessError", "no Python headers: ", "apt-get install -y python3"),
    ],
)
def test_first_launch_names_what_is_missing_and_what_mends_it(
    tmp_path: Path, what: str, cause: str, problem: str, mend: str
) -> None:
    """In the words that Triton's real errors are turned into."""
    found = run(tmp_path, "without", what)
    assert found["cause"] == cause
    assert found["told"].startswith(f"the kernels cannot be built here: {problem}")
    assert mend in found["told"]
    assert "`gptjet warm-cache`" in found["told"]


def test_kernel_that_cannot_be_compiled_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    wrong = Launch("no.such.module", "some_kernel", "{}", 75)
    with pytest.raises(WarmError, match=r"\Asome_kernel for sm_75: ModuleNotFoundError: No module"):
        compile_all([wrong], num_processes=1)


def test_launcher_that_cannot_be_built_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    with pytest.raises(WarmError, match=r"\Awhat Triton's driver is made of: CalledProcessError"):
        compile_all([], num_processes=1)


def test_compiler_that_dies_is_told_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (tmp_path / "dies.py").write_text("import os\nos.abort()\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        WarmError, match=r"a compiling process died; not compiled: .*some_kernel for sm_75"
    ):
        compile_all([Launch("dies", "some_kernel", "{}", 75)], num_processes=1)


def test_compiler_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(600)\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WarmError, match=r"no kernel was compiled in 0.5 s"):
        compile_all([Launch("hangs", "some_kernel", "{}", 75)], num_processes=1, timeout_s=0.5)
