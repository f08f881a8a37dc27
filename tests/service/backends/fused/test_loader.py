"""Loading into the fused backend: what it takes, what it refuses and why, and what it proves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptjet.service.backends.factory import load_backend
from gptjet.service.backends.fused import kv_cache, loader
from gptjet.service.backends.parity import ParityFailedError
from gptjet.service.engine.backend import ParityStatus
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.quantization.run import QuantizeOptions, quantize


@pytest.fixture
def wrong_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass whose logits are off by a little more than rounding."""
    from gptjet.service.backends.fused import model

    forward = model.CpuModel.forward

    def off(self: Any, batch: Any, cache: Any) -> torch.Tensor:
        logits = forward(self, batch, cache)
        return logits + 1e-3 * logits.abs().max() * torch.arange(logits.shape[1]).sin()

    monkeypatch.setattr(model.CpuModel, "forward", off)


def test_spec_says_what_the_scheduler_needs(
    make_gptj_checkpoint: Callable[..., Path], load_fused: Callable[..., Any]
) -> None:
    spec = load_fused(make_gptj_checkpoint(), max_sequences=5).backend.spec
    assert spec.paged
    assert (spec.max_sequences, spec.max_batch_size, spec.max_prefill_batch_size) == (5, 5, 5)
    assert (spec.max_prefill_tokens, spec.max_draft_tokens) == (128, 16)
    assert (spec.device, spec.dtype, spec.block_size) == ("cpu", "float32", 16)
    assert spec.num_kv_blocks == 5 * 4  # no more than five full contexts of 64 can use
    assert spec.eos_token_ids == (256,)
    assert spec.num_parameters == sum(
        p.numel() for p in _transformers(make_gptj_checkpoint()).parameters()
    )


def _transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_passed_parity_stands_in_the_spec_with_what_was_compared(
    make_gptj_checkpoint: Callable[..., Path], load_fused: Callable[..., Any]
) -> None:
    verdict = load_fused(make_gptj_checkpoint()).backend.spec.parity
    assert verdict.status is ParityStatus.PASSED
    assert verdict.tokens_compared == verdict.tokens_agreed == 3 * 17
    assert 0 < verdict.max_relative_error < 1e-4
    assert (
        "prompts of 1, 5, 48 tokens; CPU kernels on 1 threads; KV cache in float32;"
        in verdict.detail
    )


@pytest.mark.usefixtures("wrong_kernels")
def test_failed_parity_serves_transformers_instead_and_says_so(
    make_gptj_checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    spec = load_backend("fused", str(make_gptj_checkpoint()), device="cpu").backend.spec
    assert spec.name == "huggingface"
    assert spec.parity.status is ParityStatus.FAILED
    assert spec.parity.detail.startswith("asked for fused, serving huggingface: ")
    assert "serving with the huggingface backend instead" in caplog.text


@pytest.mark.usefixtures("wrong_kernels")
def test_failed_parity_is_refused_where_it_must_be(
    make_gptj_checkpoint: Callable[..., Path],
) -> None:
    with pytest.raises(
        ParityFailedError, match=r"--strict-parity is on.*\(limit 1\.00e-04\)"
    ) as caught:
        load_backend("fused", str(make_gptj_checkpoint()), device="cpu", strict_parity=True)
    assert caught.value.verdict.max_relative_error > 1e-4


def test_wrong_rotary_fails_parity(
    make_gptj_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one wrong sign in the kernels would."""
    from gptjet.kernels.cpu import model

    tables = model.rotary_tables
    monkeypatch.setattr(
        model, "rotary_tables", lambda *sizes: (tables(*sizes)[0], -tables(*sizes)[1])
    )
    with pytest.raises(ParityFailedError, match="differ outright"):
        load_backend("fused", str(make_gptj_checkpoint()), device="cpu", strict_parity=True)


@pytest.mark.parametrize(("dtype", "limit"), [("int8", 0.25), ("int4", 1.0)])
def test_quantized_on_loading_is_held_to_its_own_values_and_to_the_float_ones(
    dtype: str,
    limit: float,
    make_gptj_checkpoint: Callable[..., Path],
    load_fused: Callable[..., Any],
    computer: str,
) -> None:
    spec = load_fused(make_gptj_checkpoint(), dtype=dtype).backend.spec
    assert spec.dtype == dtype
    assert spec.parity.status is ParityStatus.PASSED
    # 16-bit activations, two layers: far nearer than the quantised weights are to the float ones
    assert spec.parity.max_relative_error < 8 * 2**-15 * 2
    assert "against the float weights: " in spec.parity.detail
    assert f"(limit {limit:.2e})" in spec.parity.detail


def test_quantization_that_ruins_the_model_fails_parity(
    make_gptj_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptjet.service.models.fused import layout

    quantize = layout.quantize_int8
    monkeypatch.setattr(layout, "quantize_int8", lambda rows: quantize(rows.roll(1, 0)))
    with pytest.raises(ParityFailedError, match="against the float weights"):
        load_backend(
            "fused", str(make_gptj_checkpoint()), device="cpu", dtype="int8", strict_parity=True
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_on_a_cpu_is_refused(
    dtype: str, make_gptj_checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(BackendLoadError, match=r"give float32|computes float32, int8, int4"):
        load_backend("fused", str(make_gptj_checkpoint()), device="cpu", dtype=dtype)


def test_checkpoint_stored_in_half_precision_is_computed_in_single(
    make_gptj_checkpoint: Callable[..., Path], load_fused: Callable[..., Any]
) -> None:
    spec = load_fused(make_gptj_checkpoint(dtype="float16")).backend.spec
    assert (spec.dtype, spec.parity.status) == ("float32", ParityStatus.PASSED)


def test_sharded_and_pickled_weights_are_loaded(
    make_gptj_checkpoint: Callable[..., Path], load_fused: Callable[..., Any], tmp_path: Path
) -> None:
    sharded = make_gptj_checkpoint(max_shard_size="300KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert load_fused(sharded).backend.spec.parity.status is ParityStatus.PASSED
    pickled = tmp_path / "pickled"
    shutil.copytree(make_gptj_checkpoint(), pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(_transformers(make_gptj_checkpoint()).state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(BackendLoadError, match="--allow-pickle"):
        load_fused(pickled)
    spec = load_fused(pickled, allow_pickle=True).backend.spec
    assert spec.parity.status is ParityStatus.PASSED


def test_model_of_another_family_is_refused_before_a_weight_is_read(
    make_causal_lm_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_causal_lm_checkpoint("gpt2", vocab_size=64, n_positions=32, n_embd=32, n_head=2)
    monkeypatch.setattr(loader, "load_fused_weights", None)
    with pytest.raises(BackendLoadError, match="not of the GPT-J family"):
        load_backend("fused", str(folder), device="cpu")


def test_missing_tensor_is_named(make_gptj_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(make_gptj_checkpoint(), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.mlp.fc_in.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackendLoadError, match=r"missing transformer\.h\.1\.mlp\.fc_in\.weight"):
        load_backend("fused", str(folder), device="cpu")


def test_tokenizer_of_another_model_is_refused(make_gptj_checkpoint: Callable[..., Path]) -> None:
    folder = make_gptj_checkpoint(vocab_size=200)
    with pytest.raises(BackendLoadError, match="257 ids and the model 200"):
        load_backend("fused", str(folder), device="cpu")


def test_weights_that_do_not_fit_are_refused_with_the_numbers(
    make_gptj_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "free_bytes", lambda _: 100_000)
    with pytest.raises(BackendLoadError, match=r"take 1\.\d MiB in float32, 97\.7 KiB are free"):
        load_backend("fused", str(make_gptj_checkpoint()), device="cpu")


def test_kv_cache_that_does_not_fit_is_refused_with_the_numbers(
    make_gptj_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([1 << 30, 4 << 20])  # before the weights, and after the probes
    monkeypatch.setattr(loader, "free_bytes", lambda _: next(answers))
    with pytest.raises(
        BackendLoadError,
        match=r"the KV cache does not fit: 1008 tokens take 2\.0 MiB, .* share .* is 1\.\d MiB",
    ):
        load_backend("fused", str(make_gptj_checkpoint()), device="cpu", kv_cache_tokens=1000)


def test_kv_cache_takes_what_was_asked_for_or_what_fits() -> None:
    from gptjet.kernels.batch import BlockGeometry

    geometry = BlockGeometry(2, 64, 2, 32, 16, 256, 100, 100)
    size = 2 * 2 * 2 * 16 * 32 * 4
    assert kv_cache.bytes_per_block(geometry, torch.float32) == size

    def blocks(budget: int, tokens: int | None = None) -> int:
        return kv_cache.num_kv_blocks(
            geometry,
            torch.float32,
            max_sequences=3,
            kv_cache_tokens=tokens,
            budget_bytes=budget,
        )

    assert blocks(1 << 40) == 3 * 7  # three contexts of 100 tokens are 7 blocks each
    assert blocks(5 * size + 1) == 5
    assert blocks(1 << 40, 33) == 3
    assert blocks(1 << 40, 10_000) == 3 * 7
    with pytest.raises(BackendLoadError, match=r"16 tokens take 16\.0 KiB, .* is 16\.0 KiB"):
        blocks(size - 1)
    with pytest.raises(BackendLoadError, match="the weights is 0 B"):
        blocks(-5)


def test_large_models_are_probed_with_fewer_prompts_on_a_cpu() -> None:
    from gptjet.kernels.batch import BlockGeometry
    from gptjet.service.backends.fused.proof import choose_probes

    geometry = BlockGeometry(28, 4096, 16, 256, 64, 16384, 50400, 2048)

    def lengths(num_parameters: int, device: str) -> list[int]:
        probes = choose_probes(geometry, num_parameters, torch.device(device))
        return [len(probe) for probe in probes]

    assert lengths(5_000_000, "cpu") == [1, 5, 64, 300, 2032]
    assert lengths(400_000_000, "cpu") == [1, 5, 64]
    assert lengths(6_000_000_000, "cpu") == [1, 5]
    assert lengths(6_000_000_000, "cuda") == [1, 5, 64, 300, 2032]


def test_machine_without_a_compiler_computes_with_pytorch_and_says_why(
    make_gptj_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    script = (
        "import sys; from gptjet.service.backends.factory import load_backend\n"
        "spec = load_backend('fused', sys.argv[1], device='cpu', cpu_threads=1).backend.spec\n"
        "print(spec.name, spec.parity.status, spec.parity.detail)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(make_gptj_checkpoint())],
        env=dict(os.environ) | {"CC": "/nonexistent", "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("fused passed ")
    assert "there are no kernels for this CPU (no C compiler: CC is '/nonexistent'" in result.stdout


def test_kernels_leave_pytorch_one_thread_and_pytorch_gets_them_all_without(
    make_gptj_checkpoint: Callable[..., Path], load_fused: Callable[..., Any], computer: str
) -> None:
    load_fused(make_gptj_checkpoint(), cpu_threads=2)
    assert torch.get_num_threads() == (1 if computer == "kernels" else 2)


def test_unused_kv_cache_takes_no_memory(
    make_gptj_checkpoint: Callable[..., Path], load_fused: Callable[..., Any]
) -> None:
    """512 MiB of it, of which the system gives the pages that are written."""

    def resident_bytes() -> int:
        (line,) = [
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmRSS")
        ]
        return int(line.split()[1]) * 1024

    folder = make_gptj_checkpoint(n_positions=2048)
    load_fused(folder, kv_cache_tokens=16).backend.warm_up()
    before = resident_bytes()
    backend = load_fused(folder, max_sequences=128).backend
    backend.warm_up()
    assert backend.runner.kv_cache.nbytes >= 512 * 2**20
    assert resident_bytes() - before < 128 * 2**20


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_folder_chooses_its_type_and_refuses_another(
    bits: int,
    make_gptj_checkpoint: Callable[..., Path],
    load_fused: Callable[..., Any],
    computer: str,
    tmp_path: Path,
) -> None:
    options = QuantizeOptions(
        model=str(make_gptj_checkpoint()),
        output=tmp_path / "quantized",
        bits=bits,
        method="rtn",
        evaluate=False,
    )
    quantize(options, lambda name, size: lambda part: None)
    spec = load_fused(options.output).backend.spec
    assert spec.dtype == f"int{bits}"
    assert spec.parity.status is ParityStatus.PASSED
    assert "against the float weights" not in spec.parity.detail  # there are none
    original = load_fused(make_gptj_checkpoint(), dtype=f"int{bits}").backend.spec
    assert spec.num_parameters == original.num_parameters
    other = "int4" if bits == 8 else "int8"
    for dtype in (other, "float32"):
        with pytest.raises(BackendLoadError, match=rf"{dtype} contradicts.* int{bits} already"):
            load_backend("fused", str(options.output), device="cpu", dtype=dtype)
    with pytest.raises(BackendLoadError, match="only the fused backend"):
        load_backend("huggingface", str(options.output), device="cpu")


def test_broken_recipe_of_a_quantized_folder_is_named(
    make_gptj_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "quantized"
    options = QuantizeOptions(
        model=str(make_gptj_checkpoint()), output=folder, bits=8, method="rtn", evaluate=False
    )
    quantize(options, lambda name, size: lambda part: None)
    config = json.loads((folder / "config.json").read_text())
    for field in ("bits", "weight_type"):
        del config["quantization_config"][field]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackendLoadError, match="quantization_config lacks bits"):
        load_backend("fused", str(folder), device="cpu")


@pytest.mark.usefixtures("wrong_kernels")
def test_failed_parity_of_a_quantized_folder_has_nothing_to_fall_back_to(
    make_gptj_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    options = QuantizeOptions(
        model=str(make_gptj_checkpoint()),
        output=tmp_path / "quantized",
        bits=8,
        method="rtn",
        evaluate=False,
    )
    quantize(options, lambda name, size: lambda part: None)
    with pytest.raises(ParityFailedError, match="no other backend computes a quantised"):
        load_backend("fused", str(options.output), device="cpu")
