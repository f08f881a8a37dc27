"""Parity and times of single kernels: what is red has no time, and what is missing is no proof."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gptjet.benchmarks.gpu_evidence import kernel_measure
from gptjet.benchmarks.gpu_evidence.kernel_measure import (
    DOT_ROWS,
    ROWS,
    build_parser,
    check_cases,
    main,
    measure_bandwidth,
    proofs_of,
    time_cases,
)
from gptjet.kernels import reference
from gptjet.kernels.gpu import gemv_launch
from gptjet.kernels.gpu.compile_case import GPT_J_6B, MODULES

CPU = torch.device("cpu")


class Made:
    """A launch whose error is known."""

    num_bytes = 1000
    copies = 3

    def __init__(self, difference: float | Exception) -> None:
        self.difference = difference
        self.launched: list[int] = []

    def launch(self, copy: int) -> None:
        self.launched.append(copy)

    def error(self) -> tuple[float, float]:
        if isinstance(self.difference, Exception):
            raise self.difference
        return self.difference, 0.5


class Case:
    subject, kernel, rows, is_timed = "kernels/int8", "embed", 1, True

    def __init__(self, name: str, difference: float | Exception) -> None:
        self.name = name
        self.made = Made(difference)
        self.make: Callable[..., Made] = lambda *_: self.made


def cases() -> list[Case]:
    return [
        Case("good", 0.5),
        Case("wrong", 0.6),
        Case("nan", float("nan")),
        Case("broken", RuntimeError("no such\n instruction")),
    ]


def test_a_launch_that_differs_is_nan_or_breaks_is_red_and_the_others_go_on() -> None:
    records = list(check_cases([*cases()[1:], *cases()[:1]], CPU))
    assert [(r["case"], r["passed"]) for r in records] == [
        ("wrong", False),
        ("nan", False),
        ("broken", False),
        ("good", True),
    ]
    assert records[1]["difference"] is None  # JSON has no NaN
    assert records[2]["message"] == "RuntimeError: no such instruction"


def test_a_red_kernel_gets_no_time_and_is_not_launched_for_one() -> None:
    made = cases()
    records = list(time_cases(made, CPU, copy_gb_s=2.0))
    assert [r["red"] for r in records] == [False, True, True, True]
    assert all("us" not in r and "share_of_copy" not in r for r in records[1:])
    assert made[0].made.launched == [0, 1, 2]  # every copy in turn, so that none is in a cache
    assert made[1].made.launched == []
    assert records[0]["gb_s"] == pytest.approx(1000 / (records[0]["us"] / 1e6) / 1e9, abs=0.01)


def test_a_share_is_of_the_copy_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_measure, "device_seconds", lambda work, device: 3 * 1e-6)
    (record,) = time_cases(cases()[:1], CPU, copy_gb_s=2.0)
    assert (record["us"], record["gb_s"], record["share_of_copy"]) == (1.0, 1.0, 0.5)


def test_a_subject_is_proven_by_all_of_its_cases_and_not_by_some() -> None:
    records = list(check_cases(cases()[:1], CPU))
    (whole,) = proofs_of(records, {"kernels/int8": 1})
    assert (whole["subject"], whole["passed"], whole["cases"]) == ("kernels/int8", True, 1)
    (some,) = proofs_of(records, {"kernels/int8": 2})
    assert some["passed"] is False
    assert proofs_of([], {"kernels/int4": 3})[0]["passed"] is False
    (red,) = proofs_of(list(check_cases(cases()[:2], CPU)), {"kernels/int8": 2})
    assert red["passed"] is False


def test_bandwidth_counts_what_is_read_and_what_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel_measure, "device_seconds", lambda work, device: 4e-3)
    record = measure_bandwidth(CPU)
    assert record["copy_gb_s"] == round(2 * record["copied_bytes"] / 1e-3 / 1e9, 2)
    assert record["matrix_tflops"] == round(2 * record["matrix_size"] ** 3 / 1e-3 / 1e12, 3)


@pytest.fixture
def kernel_cases() -> Any:
    pytest.importorskip("triton")
    from gptjet.benchmarks.gpu_evidence import kernel_cases

    return kernel_cases


def test_every_kernel_is_a_case_in_every_weight_type_and_for_1_to_8_rows(
    kernel_cases: Any,
) -> None:
    dot_rows = DOT_ROWS["gpt-j-6b"]
    listed = list(kernel_cases.kernel_cases(GPT_J_6B, ROWS["gpt-j-6b"], dot_rows))
    names = {(case.kernel, case.name) for case in listed}
    assert len(names) == len(listed)
    for dtype in ("float16", "int8", "int4"):
        for weight, kernel in (("w_in", "layer_norm_linear"), ("w_out", "gelu_linear_residual")):
            for rows in range(1, 9):
                assert (kernel, f"{weight} {dtype}, rows {rows}") in names
        for weight in ("w_in", "w_out", "lm_head"):
            for count in dot_rows:
                assert ("dot_linear", f"{weight} {dtype}, rows {count}") in names
    timed = {(case.name, case.rows) for case in listed if case.is_timed}
    for dtype in ("int8", "int4"):
        assert {(f"w_in {dtype}, rows {count}", count) for count in (16, 64)} <= timed
    contexts = next(name for _, name in names if name.startswith("float16 KV, contexts"))
    assert contexts.endswith("1, 15, 16, 17, 1024, 2047, 2048")
    # A kernel module and its launcher are named alike, but for these.
    launchers = {"dequantize": "dequantize_rows", "embedding": "embed", "sampling": "sample"}
    launchers["rotary_kv"] = "rotary_write_kv"
    assert {case.kernel for case in listed} == {launchers.get(name, name) for name in MODULES}


@pytest.mark.parametrize(("capability", "is_there"), [(75, False), (80, True), (90, True)])
def test_dot_linear_is_a_case_from_sm_80_on(
    kernel_cases: Any, monkeypatch: pytest.MonkeyPatch, capability: int, is_there: bool
) -> None:
    del kernel_cases
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gemv_launch, "capability_of", lambda device: capability)
    kernels = {case.kernel for case in kernel_measure._cases("gpt-j-6b", "cuda")}
    assert ("dot_linear" in kernels) == is_there


def test_a_dot_linear_that_reads_another_weight_is_found(
    kernel_cases: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = kernel_cases.kernel_cases(kernel_cases.TINY, (), (9,))
    (case,) = [c for c in listed if (c.kernel, c.name) == ("dot_linear", "w_out int4, rows 9")]
    (right,) = check_cases([case], CPU)
    linear = reference.linear
    monkeypatch.setattr(reference, "linear", lambda x, weight: linear(-x, weight))
    (wrong,) = check_cases([case], CPU)
    assert (right["passed"], wrong["passed"]) == (True, False)


def test_a_kernel_that_turns_wrongly_is_found(
    kernel_cases: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is turned the other way, which is as far from it as such a kernel would be."""
    listed = kernel_cases.kernel_cases(kernel_cases.TINY, (1,))
    (case,) = [c for c in listed if (c.kernel, c.name) == ("rotary_write_kv", "float16 KV")]
    (right,) = check_cases([case], CPU)
    turn = reference.rotary
    monkeypatch.setattr(reference, "rotary", lambda x, cos, sin: turn(x, cos, -sin))
    (wrong,) = check_cases([case], CPU)
    assert (right["passed"], wrong["passed"]) == (True, False)


@pytest.mark.parametrize("kv", ["float16", "int8"])
def test_a_copy_that_leaves_a_block_out_is_found(
    kernel_cases: Any, monkeypatch: pytest.MonkeyPatch, kv: str
) -> None:
    from gptjet.benchmarks.gpu_evidence import launches

    listed = kernel_cases.kernel_cases(kernel_cases.TINY, ())
    (case,) = [c for c in listed if (c.kernel, c.name) == ("copy_blocks", f"{kv} KV")]
    (right,) = check_cases([case], CPU)
    copy = launches.copy_blocks
    monkeypatch.setattr(launches, "copy_blocks", lambda cache, pairs: copy(cache, pairs[:-1]))
    (wrong,) = check_cases([case], CPU)
    assert (right["passed"], wrong["passed"]) == (True, False)


def test_device_that_is_not_there_is_unavailable_and_not_failed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["speed", "--device", "cuda"]) == 2
    assert '"unavailable": true' in capsys.readouterr().out
    assert build_parser().parse_args(["parity"]).geometry == "gpt-j-6b"
