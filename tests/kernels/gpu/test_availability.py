"""What stands in the way of the kernels is named, with what mends it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from gptjet.kernels.gpu import availability
from gptjet.kernels.gpu.availability import KernelsUnavailableError, check_capability, explain


def test_card_that_nothing_is_compiled_for_is_told_what_to_use_instead() -> None:
    with pytest.raises(KernelsUnavailableError, match=r"P100 is sm_60 .* sm_70 and newer") as error:
        check_capability(60, "Tesla P100")
    assert "PyTorch computes instead" in str(error.value)
    assert "--backend huggingface" in str(error.value)


def test_known_cards_pass_and_others_are_told_that_they_are_not_tested() -> None:
    assert [check_capability(known, "x") for known in (70, 75, 80, 86, 90)] == [None] * 5
    note = check_capability(89, "NVIDIA L4")
    assert note is not None
    assert "sm_89, which the kernels are not tested for (sm_70, sm_75" in note


def test_missing_compiler_is_named_by_the_first_launch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = explain(RuntimeError("Failed to find C compiler. Please specify via CC ..."))
    assert "no C compiler" in reason
    assert "apt-get install -y gcc" in reason
    assert "`gptjet warm-cache`" in reason
    assert "TRITON_CACHE_DIR" in reason


def test_missing_headers_are_named_by_the_first_launch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(availability.sysconfig, "get_path", lambda _: str(tmp_path))
    reason = explain(subprocess.CalledProcessError(1, ["gcc", "main.c"]))
    assert f"no Python headers: {tmp_path}/Python.h is not there" in reason
    assert "-dev" in reason


def test_any_other_failure_keeps_its_own_words() -> None:
    reason = explain(RuntimeError("CUDA error: an illegal\n memory access"))
    assert reason == (
        "the first launch of a kernel failed: RuntimeError: CUDA error: an illegal memory access"
    )


def test_first_launch_that_fails_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptjet.kernels.gpu import embedding

    availability.check_launch(torch.device("cpu"))  # interpreted

    def broken(*_: Any) -> None:
        raise RuntimeError("device kernel image is invalid")

    monkeypatch.setattr(embedding, "embed", broken)
    with pytest.raises(KernelsUnavailableError, match="device kernel image is invalid"):
        availability.check_launch(torch.device("cpu"))
    monkeypatch.setattr(embedding, "embed", lambda *_: None)
    with pytest.raises(KernelsUnavailableError, match="computed nothing"):
        availability.check_launch(torch.device("cpu"))


def test_cache_is_counted_where_triton_is_told_to_keep_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert availability.inspect_toolchain().num_cached == 0
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.cubin").touch()
    (tmp_path / "c").mkdir()
    found = availability.inspect_toolchain()
    assert (found.cache, found.num_cached) == (tmp_path, 2)
