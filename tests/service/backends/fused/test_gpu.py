"""The fused backend over the GPU model: what is chosen where, and what is said where it cannot be.

Here the model runs on a CPU over PyTorch references; its kernels have tests of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptjet.kernels.gpu import availability
from gptjet.kernels.gpu.availability import KernelsUnavailableError
from gptjet.kernels.gpu.graphs import CaptureError
from gptjet.kernels.gpu.model import GpuModel
from gptjet.kernels.gpu.operations import reference_operations
from gptjet.service.backends.factory import load_backend
from gptjet.service.backends.fused import gpu
from gptjet.service.backends.fused.backend import FusedBackend
from gptjet.service.engine.backend import ParityStatus
from gptjet.service.engine.request import SamplingParams, new_request
from gptjet.service.engine.sampler import Sampler
from gptjet.service.models.fused.forward import TorchModel


def sample_as_the_engine(
    logits: torch.Tensor, sampling: torch.Tensor, out: torch.Tensor, **kinds: Any
) -> None:
    """The engine's sampler behind the signature of the kernel's, on the same packed parameters."""
    sampler, states, positions = Sampler(logits.shape[1]), [], []
    for row, reals in zip(sampling.tolist(), sampling.view(torch.float64).tolist(), strict=True):
        params = SamplingParams(
            temperature=reals[0],
            top_k=row[1],
            top_p=reals[2],
            min_p=reals[3],
            seed=row[4] % 2**64,
        )
        assert kinds["draws"] or params.is_greedy
        assert kinds["filters"] or params.is_greedy or (params.top_k, params.top_p) == (0, 1)
        states.append(sampler.new_state(new_request((0,), params), row[5]))
        positions.append(row[6])
    out.copy_(torch.tensor(sampler.choose(logits, states, positions)))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded on the CPU goes the way of a GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "interpret_on_cpu", True)
    monkeypatch.setattr(
        gpu, "triton_operations", lambda: reference_operations(sample_as_the_engine)
    )
    monkeypatch.setattr(availability, "check_launch", lambda _: None)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("dtype", ["auto", "int8", "int4"])
def test_gpu_model_passes_parity_with_every_weight_and_kv_type(
    dtype: str,
    kv_cache_dtype: str,
    make_gptj_checkpoint: Callable[..., Path],
    load_fused: Callable[..., Any],
) -> None:
    backend = load_fused(make_gptj_checkpoint(), dtype=dtype, kv_cache_dtype=kv_cache_dtype).backend
    assert isinstance(backend.runner.model, GpuModel)
    assert backend.spec.parity.status is ParityStatus.PASSED
    assert "; PyTorch references; " in backend.spec.parity.detail
    kv_dtype = torch.int8 if kv_cache_dtype == "int8" else torch.float16
    assert backend.runner.kv_cache.dtype is kv_dtype
    backend.warm_up()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.9},
        {"temperature": 1.2, "top_k": 7},
        {"temperature": 1.2, "top_p": 0.7, "min_p": 0.02},
        {"temperature": 1.0, "n": 3, "seed": 2**64 - 1},
    ],
)
def test_tokens_are_those_of_a_backend_that_leaves_them_to_the_sampler(
    params: dict[str, Any],
    make_gptj_checkpoint: Callable[..., Path],
    load_fused: Callable[..., Any],
    drive: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four requests that run and end together, so that both compute the same batches."""
    loaded = load_fused(make_gptj_checkpoint())
    launch = FusedBackend.decode_and_sample
    sources: list[tuple[int, ...]] = []

    def watched(self: Any, batch: Any) -> Any:
        sources.append(batch.sources)
        return launch(self, batch)

    monkeypatch.setattr(FusedBackend, "decode_and_sample", watched)
    said = []
    for on_device in (True, False):
        backend = loaded.backend
        backend._spec = dataclasses.replace(backend.spec, samples_on_device=on_device)
        driver = drive(loaded, prefix_cache=False)
        for number in range(4):
            driver.add([3 + number] * 9, max_new_tokens=14, **{"seed": number, **params})
        driver.run()
        driver.check_nothing_is_held()
        said.append(driver.tokens)
    assert said[0] == said[1]
    # All but the first step took every row's token from the step before.
    count = 4 * params.get("n", 1)
    assert sources == [(-1,) * count] + [tuple(range(count))] * 12


@pytest.mark.usefixtures("on_cpu")
def test_deterministic_backend_computes_row_by_row_and_leaves_tokens_to_the_sampler(
    make_gptj_checkpoint: Callable[..., Path], load_fused: Callable[..., Any]
) -> None:
    assert load_fused(make_gptj_checkpoint()).backend.spec.samples_on_device
    assert not load_fused(make_gptj_checkpoint(), deterministic=True).backend.spec.samples_on_device


@pytest.mark.usefixtures("on_cpu")
def test_int8_kv_cache_takes_about_half_the_memory(
    make_gptj_checkpoint: Callable[..., Path], load_fused: Callable[..., Any]
) -> None:
    sizes = [
        load_fused(
            make_gptj_checkpoint(), kv_cache_dtype=name, kv_cache_tokens=128
        ).backend.runner.kv_cache.nbytes
        for name in ("auto", "int8")
    ]
    assert sizes[1] * 32 == sizes[0] * 17


@pytest.mark.usefixtures("on_cpu")
def test_wrong_kernels_fail_parity(
    make_gptj_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = GpuModel.forward

    def off(self: Any, batch: Any, cache: Any) -> torch.Tensor:
        logits = forward(self, batch, cache)
        return logits + 0.03 * logits.abs().max() * torch.arange(logits.shape[1]).sin()

    monkeypatch.setattr(GpuModel, "forward", off)
    spec = load_backend("fused", str(make_gptj_checkpoint()), device="cpu").backend.spec
    assert (spec.name, spec.parity.status) == ("huggingface", ParityStatus.FAILED)


@pytest.mark.usefixtures("on_cpu")
def test_kernels_that_do_not_run_leave_the_work_to_pytorch_and_say_why(
    make_gptj_checkpoint: Callable[..., Path],
    load_fused: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def unavailable(_: torch.device) -> None:
        raise KernelsUnavailableError("the kernels cannot be built here: no C compiler (...)")

    monkeypatch.setattr(availability, "check_launch", unavailable)
    backend = load_fused(make_gptj_checkpoint()).backend
    assert isinstance(backend.runner.model, TorchModel)
    assert "PyTorch computes instead of the GPU kernels: the kernels cannot" in caplog.text
    assert "GPU kernels cannot be used (the kernels cannot be built" in backend.spec.parity.detail


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((6, 1), "sm_61 and the kernels are for sm_70"), ((8, 0), "weights, not bfloat16")],
)
def test_cards_and_weights_that_the_kernels_are_not_for_are_named(
    capability: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    with pytest.raises(KernelsUnavailableError, match=reason):
        gpu.load_operations("float16" if capability < (7, 0) else "bfloat16", torch.device("cuda"))


def test_card_that_is_not_tested_and_an_empty_cache_are_said_before_the_first_launch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    monkeypatch.setattr(availability, "check_launch", lambda _: None)
    monkeypatch.setattr(gpu, "triton_operations", reference_operations)
    gpu.load_operations("float16", torch.device("cuda"))
    tested, cached = (record.getMessage() for record in caplog.records)
    assert tested.startswith("NVIDIA L4 is sm_89, which the kernels are not tested for")
    assert cached.startswith(f"{tmp_path} has no compiled kernels: the first start compiles them")
    assert "`gptjet warm-cache --arch sm_89`" in cached
    caplog.clear()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.cubin").touch()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    gpu.load_operations("float16", torch.device("cuda"))
    assert caplog.records == []


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("fails", [False, True])
def test_graphs_are_recorded_at_warm_up_or_the_log_says_why_not(
    fails: bool,
    make_gptj_checkpoint: Callable[..., Path],
    load_fused: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Recorder:
        def __init__(self, _: torch.device) -> None: ...

        def record(self, launch: Callable[[], None]) -> Callable[[], None]:
            if fails:
                raise CaptureError("RuntimeError: operation not permitted")
            launch()
            return launch

    monkeypatch.setattr(gpu, "CudaRecorder", Recorder)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 30, 1 << 30))
    caplog.set_level("INFO")
    runner = load_fused(make_gptj_checkpoint(), max_sequences=12).backend.runner
    gpu.record_graphs(runner.model, runner.kv_cache, progress=False)
    if fails:
        assert "CUDA graphs could not be recorded: RuntimeError: operation not" in caplog.text
        assert runner.model.recorded_buckets == ()
    else:
        assert "recorded CUDA graphs of 1, 2, 4, 8, 12 rows" in caplog.text
        assert runner.model.recorded_buckets == (1, 2, 4, 8, 12)
    assert runner.decode([1], [0], [[0]]).isfinite().all()
