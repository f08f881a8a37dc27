"""transformers with a static cache: the compiled step is the eager one, or has no times."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gptjet.service.backends import measure_static


def run(capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, Any]]]:
    flags = ["--geometry", "tiny", "--device", "cpu", "--cells", "5:3", "--repeats", "2"]
    code = measure_static.main(flags)
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_compiled_step_is_checked_and_then_timed(capsys: pytest.CaptureFixture[str]) -> None:
    code, (model, parity, cell) = run(capsys)
    assert code == 0
    assert (model["kind"], model["backend"]) == ("model", "huggingface-static")
    assert parity["passed"]
    assert parity["error"] < 1e-4
    assert [len(times) for times in cell["itl_ms"]] == [2, 2]


def test_a_step_that_forgets_the_prompt_gets_no_times(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = measure_static._StaticRunner._prefill

    def forgets(self: Any, ids: Any) -> Any:
        row = prefill(self, ids)
        for layer in self._cache.layers:
            layer.values.zero_()
        return row

    monkeypatch.setattr(measure_static._StaticRunner, "_prefill", forgets)
    code, records = run(capsys)
    assert code == 1
    assert [record["kind"] for record in records] == ["model", "static_parity", "error"]
    assert records[1]["passed"] is False
