"""`--kv-cache-dtype`: what each can have, what is proven of it, and what it saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptjet.kernels import reference
from gptjet.kernels.batch import INT8_KV_ROWS, BlockGeometry
from gptjet.service.backends.factory import load_backend
from gptjet.service.backends.fused import kv_cache, model
from gptjet.service.backends.fused.runner import ModelRunner, Segment
from gptjet.service.backends.parity import ParityFailedError
from gptjet.service.engine.backend import ParityStatus
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.checkpoint import resolve_checkpoint
from gptjet.service.models.fused.forward import TorchModel
from gptjet.service.models.fused.weights import load_fused_weights


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch computes, as it does on a GPU."""

    def unavailable(*_: Any, **__: Any) -> None:
        raise model.NativeUnavailableError("switched off by a test")

    monkeypatch.setattr(model.CpuModel, "pack", unavailable)
    monkeypatch.setattr(model, "native_library", unavailable)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("name", ["float16", "float32", "int8"])
def test_pytorch_serves_from_a_kv_cache_of_every_dtype(
    name: str,
    make_gptj_checkpoint: Callable[..., Path],
    load_fused: Callable[..., Any],
    drive: Callable[..., Any],
) -> None:
    loaded = load_fused(make_gptj_checkpoint(), kv_cache_dtype=name)
    cache = loaded.backend._runner.kv_cache
    assert str(cache.dtype) == f"torch.{name}"
    assert cache.shape[4] == (INT8_KV_ROWS if name == "int8" else 16)
    parity = loaded.backend.spec.parity
    assert parity.status is ParityStatus.PASSED
    assert (f"; with the KV cache in {name}: " in parity.detail) == (name != "float32")
    assert f"; KV cache in {name}; torch " in parity.detail  # what `gptjet models` shows
    driver = drive(loaded)
    key = driver.add([7] * 20, n=2)  # which share, copy and free blocks
    driver.run()
    driver.check_nothing_is_held()
    assert driver.tokens[key, 0] == driver.tokens[key, 1]
    assert len(driver.tokens[key, 0]) == 16


@pytest.mark.usefixtures("no_kernels")
def test_an_int8_kv_cache_that_is_wrong_fails_the_proof(
    make_gptj_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales of the token before: what stands in the cache is finite, and wrong."""
    quantize = reference.quantize_kv

    def shifted(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        levels, scales = quantize(x)
        return levels, scales.roll(1, 1)

    monkeypatch.setattr(reference, "quantize_kv", shifted)
    folder = str(make_gptj_checkpoint(n_layer=4))
    with pytest.raises(ParityFailedError, match=r"with the KV cache in int8: .*limit 1\.00e-01"):
        load_backend("fused", folder, device="cpu", kv_cache_dtype="int8", strict_parity=True)
    stood_in = load_backend("fused", folder, device="cpu", kv_cache_dtype="int8").backend
    assert stood_in.spec.name == "huggingface"
    assert stood_in.spec.parity.status is ParityStatus.FAILED
    stood_in.close()


@pytest.mark.parametrize("name", ["float16", "int8"])
def test_cpu_kernels_refuse_what_they_do_not_have_and_say_what_they_have(
    name: str, make_gptj_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before weights are read: a large model would be minutes of waiting for a refusal."""
    monkeypatch.setattr(model, "native_library", lambda: None)
    monkeypatch.setattr(
        "gptjet.service.backends.fused.loader.load_fused_weights",
        lambda *_, **__: pytest.fail("weights were read"),
    )
    with pytest.raises(
        BackendLoadError,
        match=rf"^kv_cache_dtype {name}: the CPU kernels keep .* float32, so it may be auto or fl",
    ):
        load_backend("fused", str(make_gptj_checkpoint()), device="cpu", kv_cache_dtype=name)


def test_float32_is_what_cpu_kernels_have(
    make_gptj_checkpoint: Callable[..., Path], load_fused: Callable[..., Any]
) -> None:
    load_fused(make_gptj_checkpoint(), kv_cache_dtype="float32")


@pytest.mark.usefixtures("no_kernels")
def test_heads_too_small_for_int8_are_refused(make_gptj_checkpoint: Callable[..., Path]) -> None:
    folder = str(make_gptj_checkpoint(head_dim=32))
    with pytest.raises(
        BackendLoadError, match=r"heads of 64 features or more, in fours; .* have 32"
    ):
        load_backend("fused", folder, device="cpu", kv_cache_dtype="int8")


def test_a_computer_without_such_a_cache_says_which_it_has() -> None:
    computer = model.Computer(
        None,  # type: ignore[arg-type]
        torch.float16,
        False,
        "Some kernels",
        other_kv_dtypes=(torch.int8,),
    )
    assert model.choose_kv_dtype("auto", computer) is torch.float16
    assert model.choose_kv_dtype("int8", computer) is torch.int8
    with pytest.raises(BackendLoadError, match=r"Some kernels can have auto, float16, int8$"):
        model.choose_kv_dtype("float32", computer)


def test_unknown_names_and_backends_without_a_choice_are_refused() -> None:
    with pytest.raises(BackendLoadError, match="must be one of auto, float16, float32, int8, got"):
        load_backend("fused", "embedded", kv_cache_dtype="int4")
    with pytest.raises(BackendLoadError, match="kv_cache_dtype int8: the huggingface backend has"):
        load_backend("huggingface", "embedded", kv_cache_dtype="int8")


def test_int8_takes_17_bytes_where_float16_takes_32() -> None:
    geometry = BlockGeometry(28, 4096, 16, 256, 64, 16384, 50400, 2048)
    half = kv_cache.bytes_per_block(geometry, torch.float16)
    assert half == 16 * 448 * 1024
    assert kv_cache.bytes_per_block(geometry, torch.int8) * 32 == half * 17

    def blocks(dtype: torch.dtype) -> int:
        return kv_cache.num_kv_blocks(
            geometry, dtype, max_sequences=64, kv_cache_tokens=None, budget_bytes=1 << 32
        )

    assert (blocks(torch.float16), blocks(torch.int8)) == (585, 1101)


def test_copied_int8_blocks_carry_their_scales(make_gptj_checkpoint: Callable[..., Path]) -> None:
    checkpoint = resolve_checkpoint(str(make_gptj_checkpoint()))
    weights = load_fused_weights(checkpoint, "fp32")
    geometry = weights.geometry
    cache = kv_cache.allocate_kv_cache(
        geometry, 5, dtype=torch.int8, device=torch.device("cpu")
    ).fill_(1)
    computing = TorchModel(geometry, weights.head, weights.layers())
    runner = ModelRunner(computing, geometry, cache, max_tokens=64, max_segments=2)
    runner.run([Segment(list(range(20)), 0, [3, 1], wanted=1)])
    runner.copy_blocks([(3, 0), (1, 4)])
    original, copied = runner.decode([9, 9], [20, 20], [[3, 1], [0, 4]])
    assert torch.allclose(original, copied, atol=1e-5)
    assert original.isfinite().all()
