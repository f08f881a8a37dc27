"""Laying checkpoints out: what is taken, what is refused and how, and in how much memory."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptjet.kernels.weights import DenseWeight, Int4Weight, Int8Weight, dequantize
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.checkpoint import resolve_checkpoint
from gptjet.service.models.fused.weights import FusedWeights, load_fused_weights

MIB = 2**20
Edit = Callable[..., Path]


def load(folder: Path | str, weight_type: Any = "fp32", **options: Any) -> FusedWeights:
    checkpoint = resolve_checkpoint(str(folder), allow_pickle=True)
    return load_fused_weights(checkpoint, weight_type, **options)


def refusal(folder: Path, weight_type: Any = "fp32") -> str:
    with pytest.raises(BackendLoadError) as error:
        list(load(folder, weight_type).layers())
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def edit(tmp_path: Path, make_gptj_checkpoint: Callable[..., Path]) -> Edit:
    """`edit(tensors=function of the state dict, **config fields)`: a changed copy."""

    def make(
        tensors: Callable[[dict[str, torch.Tensor]], None] | None = None,
        folder: Path | None = None,
        **fields: Any,
    ) -> Path:
        copy = tmp_path / "copy"
        shutil.copytree(folder or make_gptj_checkpoint(), copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | fields))
        if tensors is not None:
            state = load_file(copy / "model.safetensors")
            tensors(state)
            save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return make


def as_pickle(folder: Path, shards: int = 1) -> None:
    """Store the weights of a folder as PyTorch pickles instead."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for number in range(shards):
        name = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        part = {key: state[key] for key in sorted(state)[number::shards]}
        weight_map |= dict.fromkeys(part, name)
        torch.save(part, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def assert_same(one: FusedWeights, other: FusedWeights) -> None:
    assert one.geometry == other.geometry
    assert torch.equal(one.head.embedding, other.head.embedding)
    assert torch.equal(dequantize(one.head.lm_head), dequantize(other.head.lm_head))
    layers = list(zip(one.layers(), other.layers(), strict=True))
    assert len(layers) == one.geometry.num_layers
    for a, b in layers:
        assert torch.equal(a.norm_weight, b.norm_weight)
        assert torch.equal(dequantize(a.w_in), dequantize(b.w_in))
        assert torch.equal(dequantize(a.w_out), dequantize(b.w_out))


def test_rows_and_columns_of_the_two_passes_are_the_stored_matrices(
    make_gptj_checkpoint: Callable[..., Path],
) -> None:
    folder = make_gptj_checkpoint()
    state = load_file(folder / "model.safetensors")
    weights = load(folder)
    for number, layer in enumerate(weights.layers()):
        prefix = f"transformer.h.{number}."
        rows = [state[f"{prefix}attn.{name}_proj.weight"] for name in "qkv"]
        rows.append(state[prefix + "mlp.fc_in.weight"])
        columns = [state[prefix + "attn.out_proj.weight"], state[prefix + "mlp.fc_out.weight"]]
        assert isinstance(layer.w_in, DenseWeight)
        assert isinstance(layer.w_out, DenseWeight)
        assert torch.equal(layer.w_in.weight, torch.cat(rows, 0))
        assert torch.equal(layer.w_out.weight, torch.cat(columns, 1))
        assert layer.w_in.bias is not None
        assert torch.equal(layer.w_in.bias[: 3 * 128], torch.zeros(3 * 128))
        assert torch.equal(layer.w_in.bias[3 * 128 :], state[prefix + "mlp.fc_in.bias"])
        assert torch.equal(layer.norm_bias, state[prefix + "ln_1.bias"])
    assert weights.head.lm_head.bias is not None
    assert torch.equal(weights.head.lm_head.bias, state["lm_head.bias"])
    assert weights.num_parameters == sum(tensor.numel() for tensor in state.values())
    assert weights.class_name == "GPTJForCausalLM"
    assert weights.quantization is None


@pytest.mark.parametrize(
    ("weight_type", "dtype"),
    [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)],
)
def test_dtypes_of_the_file_and_of_the_weights_are_independent(
    weight_type: str, dtype: torch.dtype, make_gptj_checkpoint: Callable[..., Path]
) -> None:
    """FP16 files are the rule among Pygmalion, GPT-JT and Dolly; biases and norms are FP32."""
    for stored in ("float32", "float16", "bfloat16"):
        folder = make_gptj_checkpoint(dtype=stored)
        state = load_file(folder / "model.safetensors")
        weights = load(folder, weight_type)
        layer = next(weights.layers())
        assert isinstance(layer.w_in, DenseWeight)
        assert layer.w_in.weight.dtype == dtype
        first = state["transformer.h.0.attn.q_proj.weight"]
        assert torch.equal(layer.w_in.weight[:128], first.to(dtype))
        for vector in (layer.norm_weight, layer.w_in.bias, weights.head.lm_head.bias):
            assert vector is not None
            assert vector.dtype == torch.float32


def test_int8_and_int4_are_rounded_to_nearest_on_the_fly(
    make_gptj_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptjet.service.models.fused import layout

    folder = make_gptj_checkpoint()
    exact = [dequantize(layer.w_out) for layer in load(folder).layers()]
    # slices smaller than a matrix must not show
    monkeypatch.setattr(layout, "_SLICE_ELEMENTS", 5000)
    for weight_type, kind, levels in (("int8", Int8Weight, 127), ("int4", Int4Weight, 7)):
        weights = load(folder, weight_type)
        assert isinstance(weights.head.lm_head, kind)
        for layer, values in zip(weights.layers(), exact, strict=True):
            assert isinstance(layer.w_in, kind)
            assert isinstance(layer.w_out, kind)
            error = (dequantize(layer.w_out) - values).abs()
            step = values.abs().amax(1, keepdim=True) / levels
            assert (error <= 0.51 * step).all()
            assert error.max() > 0.3 * step.min()


def test_shards_pickles_and_bare_names_give_the_same_weights(
    make_gptj_checkpoint: Callable[..., Path], edit: Edit, tmp_path: Path
) -> None:
    whole = make_gptj_checkpoint()
    sharded = make_gptj_checkpoint(max_shard_size="200KB")
    assert len(resolve_checkpoint(str(sharded)).weight_files) > 3
    assert_same(load(whole), load(sharded))
    for shards in (1, 3):
        pickled = tmp_path / f"pickle-{shards}"
        shutil.copytree(whole, pickled)
        as_pickle(pickled, shards)
        assert_same(load(whole), load(pickled))

    def strip(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            state[name.removeprefix("transformer.")] = state.pop(name)

    assert_same(load(whole), load(edit(strip)))


def test_buffers_of_old_checkpoints_are_ignored(
    make_gptj_checkpoint: Callable[..., Path], edit: Edit
) -> None:
    def add(state: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
            state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)

    assert_same(load(make_gptj_checkpoint()), load(edit(add)))


@pytest.mark.parametrize("kept", ["transformer.wte.weight", "lm_head.weight"])
def test_tied_embeddings_are_read_from_whichever_is_stored(kept: str, edit: Edit) -> None:
    dropped = {"transformer.wte.weight", "lm_head.weight"} - {kept}

    def tie(state: dict[str, torch.Tensor]) -> None:
        for name in dropped:
            del state[name]

    folder = edit(tie, tie_word_embeddings=True)
    stored = load_file(folder / "model.safetensors")
    for weight_type in ("fp32", "fp16"):
        weights = load(folder, weight_type)
        assert isinstance(weights.head.lm_head, DenseWeight)
        assert weights.head.lm_head.weight.data_ptr() == weights.head.embedding.data_ptr()
        assert torch.equal(
            weights.head.embedding.float(), stored[kept].to(weights.head.embedding.dtype).float()
        )
    assert weights.num_parameters == sum(tensor.numel() for tensor in stored.values())
    assert isinstance(load(folder, "int8").head.lm_head, Int8Weight)


def test_tied_with_both_stored_keeps_both_as_transformers_does(
    edit: Edit, run_fused: Any, run_transformers: Any
) -> None:
    folder = edit(tie_word_embeddings=True)
    expected, _ = run_transformers(folder, [1, 2, 3], 5)
    assert run_fused(folder).greedy([1, 2, 3], 5)[0] == expected


def test_missing_misshapen_and_unexpected_tensors_are_each_named(edit: Edit) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        del state["transformer.h.1.mlp.fc_out.bias"]
        state["transformer.h.0.ln_1.weight"] = torch.zeros(5)
        state["score.weight"] = torch.zeros(1)

    message = refusal(edit(spoil))
    assert "not those of GPTJForCausalLM" in message
    assert "missing transformer.h.1.mlp.fc_out.bias" in message
    assert "misshapen transformer.h.0.ln_1.weight [5] (the model has [128])" in message
    assert "unexpected transformer.score.weight" in message


def test_tensors_of_pickles_are_checked_too(
    edit: Edit,
) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        del state["lm_head.bias"]

    folder = edit(spoil)
    as_pickle(folder)
    assert "missing lm_head.bias" in refusal(folder)
    torch.save(["no", "tensors"], folder / "pytorch_model.bin")
    assert "holds a list, not tensors by name" in refusal(folder)
    torch.save({"step": 3}, folder / "pytorch_model.bin")
    assert "holds step, which is no tensor" in refusal(folder)


def test_integer_weights_are_refused(edit: Edit) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["lm_head.bias"] = state["lm_head.bias"].to(torch.int8)

    assert "lm_head.bias is stored as I8" in refusal(edit(spoil))


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("transformer.wte.weight", "transformer.wte.weight"),
        ("lm_head.bias", "lm_head.bias"),
        ("transformer.h.1.mlp.fc_out.weight", "transformer.h.1.attn.out_proj or mlp.fc_out"),
        ("transformer.h.0.attn.k_proj.weight", "transformer.h.0.attn or mlp.fc_in"),
    ],
)
@pytest.mark.parametrize("weight_type", ["fp32", "int8", "int4"])
def test_values_that_are_not_finite_are_refused_by_name(
    name: str, where: str, weight_type: str, edit: Edit
) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state[name].view(-1)[7] = float("nan")

    assert f"{where} holds a value that is not finite" in refusal(edit(spoil), weight_type)


def test_values_beyond_float16_are_refused_for_fp16_and_fine_for_fp32(edit: Edit) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["transformer.h.0.mlp.fc_in.weight"][0, 0] = 1e6

    folder = edit(spoil)
    assert "beyond 65504" in refusal(folder, "fp16")
    list(load(folder, "fp32").layers())
    list(load(folder, "bf16").layers())


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"rotary": False}, "rotary is False"),
        ({"rotary_dim": 7}, "rotary_dim 7 must be even"),
        ({"n_inner": 0}, "n_inner is 0"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon is 0.0"),
        ({"n_positions": 0}, "n_positions is 0"),
        ({"n_head": 3}, "n_embd 128 is not a multiple of n_head 3"),
        ({"quantization_config": {"quant_method": "bnb"}}, "the weights are quantised"),
    ],
)
def test_unusual_configurations_are_refused_by_name(
    fields: dict[str, Any], problem: str, edit: Edit
) -> None:
    assert problem in refusal(edit(**fields))


def test_codegen_heads_that_do_not_fill_its_groups_are_refused(
    make_causal_lm_checkpoint: Callable[..., Path], edit: Edit
) -> None:
    folder = make_causal_lm_checkpoint(
        "codegen", n_layer=1, n_embd=96, n_head=4, rotary_dim=8, vocab_size=50
    )
    assert "n_head is 6; CodeGen keeps its heads in 4 groups" in refusal(
        edit(folder=folder, n_head=6)
    )


def test_other_architectures_are_refused_saying_what_is_computed(
    make_causal_lm_checkpoint: Callable[..., Path],
) -> None:
    folder = make_causal_lm_checkpoint("gpt2", n_layer=1, n_embd=32, n_head=2, vocab_size=50)
    message = refusal(folder)
    assert "GPT2LMHeadModel is not of the GPT-J family" in message
    assert "GPTJForCausalLM and CodeGenForCausalLM" in message
    assert "--backend huggingface" in message


def test_unknown_weight_type_is_refused(make_gptj_checkpoint: Callable[..., Path]) -> None:
    assert "unknown weight type 'fp8': there are fp32" in refusal(make_gptj_checkpoint(), "fp8")


def test_layers_are_given_once(make_gptj_checkpoint: Callable[..., Path]) -> None:
    weights = load(make_gptj_checkpoint())
    weights.layers()
    with pytest.raises(RuntimeError, match="read already"):
        weights.layers()


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stderr", "progress", "shown"),
    [(Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)],
)
def test_progress_bar_is_drawn_on_a_terminal_where_it_is_wanted(
    make_gptj_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    stderr: io.StringIO,
    progress: bool,
    shown: bool,
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    list(load(make_gptj_checkpoint(), progress=progress).layers())
    assert ("loading fp32 weights" in stderr.getvalue()) is shown


# The resident peak counts pages of mapped files too, so it is the stricter measure.
MEASURE = """
import sys
from pathlib import Path
import torch
from gptjet.service.models.checkpoint import resolve_checkpoint
from gptjet.service.models.fused.forward import TorchModel
from gptjet.service.models.fused.weights import load_fused_weights

def kib(field):
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0])

folder, warm, weight_type = sys.argv[1:]
small = load_fused_weights(resolve_checkpoint(warm, allow_pickle=True), weight_type)
TorchModel(small.geometry, small.head, small.layers())  # imports and thread pools
checkpoint = resolve_checkpoint(folder, allow_pickle=True)
resident = kib("VmRSS")
weights = load_fused_weights(checkpoint, weight_type)
model = TorchModel(weights.geometry, weights.head, weights.layers())
print(model.nbytes, (kib("VmHWM") - resident) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("weight_type", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_loading_peaks_below_the_model_and_one_shard(
    weight_type: str, kind: str, make_gptj_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """237 MiB of FP32, in shards of at most 64 MiB or in one pickle."""
    sizes = {"head_dim": 256, "n_head": 4, "n_layer": 4, "rotary_dim": 64, "vocab_size": 4099}
    if kind == "safetensors":
        folder = make_gptj_checkpoint(max_shard_size="64MB", **sizes)
        shard = max(p.stat().st_size for p in resolve_checkpoint(str(folder)).weight_files)
        assert shard < 65 * MIB
    else:
        folder = tmp_path / "pickle"
        shutil.copytree(make_gptj_checkpoint(**sizes), folder)
        as_pickle(folder)
        # A layer of it is mapped at a time, whatever the file's size (237 MiB here), beside the
        # copies that are made of it; the pages of the last one may not have gone yet.
        shard = 2 * 64 * MIB
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(make_gptj_checkpoint()), weight_type],
        capture_output=True,
        text=True,
        check=True,
        timeout=280,
    )
    model_bytes, resident = map(int, result.stdout.split())
    # 48 MiB: slices in float32 beside what they become, and what the allocator keeps of them
    assert resident < model_bytes + shard + 48 * MIB
