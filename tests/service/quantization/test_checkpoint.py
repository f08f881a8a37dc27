"""What `gptjet quantize` writes: read back exactly, and refused by name where it is not whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gptjet.kernels.weights import dequantize
from gptjet.service.backends.factory import load_backend
from gptjet.service.engine.backend import ParityStatus
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.architecture import verify_architecture
from gptjet.service.models.checkpoint import resolve_checkpoint
from gptjet.service.models.fused import recipe as recipes
from gptjet.service.models.fused.weights import load_fused_weights, quantized_weight_type
from gptjet.service.models.tokenizer import load_tokenizer
from gptjet.service.quantization.convert import CalibrationSet, write_quantized
from gptjet.service.quantization.run import QuantizeOptions, quantize

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def make_quantized(
    make_gptj_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Make:
    """`make_quantized(bits=4, method="rtn", max_shard_bytes=..., seed=0)`"""
    written: dict[tuple[tuple[str, Any], ...], Path] = {}

    def make(seed: int = 0, **options: Any) -> Path:
        key = (("seed", seed), *sorted(options.items()))
        if key not in written:
            folder = tmp_path_factory.mktemp("quantized") / "out"
            run(
                QuantizeOptions(
                    model=str(make_gptj_checkpoint(seed=seed)),
                    output=folder,
                    evaluate=False,
                    calibration_tokens=300,
                    **options,
                )
            )
            written[key] = folder
        return written[key]

    return make


def run(options: QuantizeOptions) -> Any:
    return quantize(options, lambda name, total: lambda count: None)


@pytest.fixture
def int4(make_quantized: Make, tmp_path: Path) -> Path:
    """A good INT4 checkpoint of one file, to be broken."""
    return Path(shutil.copytree(make_quantized(bits=4, method="rtn"), tmp_path / "int4"))


def refusal(folder: Path, weight_type: str = "int4") -> str:
    with pytest.raises(BackendLoadError) as error:
        list(load_fused_weights(resolve_checkpoint(str(folder)), weight_type).layers())  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors and put the checksum right, as a wrong writer would."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)
    edit_config(
        folder,
        lambda config: config["quantization_config"]["sha256"].update(
            {path.name: recipes.file_sha256(path)}
        ),
    )


@pytest.mark.parametrize(("bits", "weight_type"), [(8, "int8"), (4, "int4")])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 200_000])
def test_rounded_to_nearest_is_read_back_as_quantised_on_the_fly(
    bits: int,
    weight_type: Any,
    max_shard_bytes: int,
    make_quantized: Make,
    make_gptj_checkpoint: Callable[..., Path],
) -> None:
    folder = make_quantized(bits=bits, method="rtn", max_shard_bytes=max_shard_bytes)
    written = resolve_checkpoint(str(folder))
    assert (len(written.weight_files) > 1) is (max_shard_bytes < 10**9)
    assert quantized_weight_type(written) == weight_type
    got = load_fused_weights(written, weight_type)
    source = resolve_checkpoint(str(make_gptj_checkpoint()))
    expected = load_fused_weights(source, weight_type)
    assert got.geometry == expected.geometry
    assert got.num_parameters == expected.num_parameters
    assert got.class_name == "GPTJForCausalLM"
    assert torch.equal(got.head.embedding, expected.head.embedding)
    assert torch.equal(got.head.norm_bias, expected.head.norm_bias)
    pairs = [(got.head.lm_head, expected.head.lm_head)]
    for a, b in zip(got.layers(), expected.layers(), strict=True):
        pairs += [(a.w_in, b.w_in), (a.w_out, b.w_out)]
        assert torch.equal(a.norm_weight, b.norm_weight)
    for a, b in pairs:
        assert type(a) is type(b)
        assert torch.equal(dequantize(a), dequantize(b))
        assert a.bias is not None
        assert b.bias is not None
        assert torch.equal(a.bias, b.bias)
    assert len(pairs) == 5


def test_gptq_gives_other_levels_and_the_same_output_every_time(
    make_quantized: Make, make_gptj_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    first = make_quantized(bits=4, method="gptq")
    again = tmp_path / "again"
    run(
        QuantizeOptions(
            model=str(make_gptj_checkpoint(seed=0)),
            output=again,
            evaluate=False,
            calibration_tokens=300,
        )
    )
    files = [load_file(folder / "model.safetensors") for folder in (first, again)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    nearest = load_file(make_quantized(bits=4, method="rtn") / "model.safetensors")
    assert not torch.equal(files[0]["layers.0.w_in.packed"], nearest["layers.0.w_in.packed"])
    list(load_fused_weights(resolve_checkpoint(str(first)), "int4").layers())


def test_codegen_is_quantised_in_the_same_layout(
    make_causal_lm_checkpoint: Callable[..., Path], make_gptj_checkpoint: Make, tmp_path: Path
) -> None:
    source = make_causal_lm_checkpoint(
        "codegen", n_layer=1, n_embd=128, n_head=4, rotary_dim=16, vocab_size=263, n_positions=64
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(make_gptj_checkpoint() / name, source / name)
    run(QuantizeOptions(model=str(source), output=tmp_path / "out", bits=8, evaluate=False))
    got = load_fused_weights(resolve_checkpoint(str(tmp_path / "out")), "int8")
    expected = load_fused_weights(resolve_checkpoint(str(source)), "int8")
    assert got.class_name == "CodeGenForCausalLM"
    for a, b in zip(got.layers(), expected.layers(), strict=True):
        assert torch.equal(dequantize(a.w_in), dequantize(b.w_in))


def test_recipe_stands_in_the_config_and_in_every_file(
    make_quantized: Make, make_gptj_checkpoint: Callable[..., Path]
) -> None:
    folder = make_quantized(bits=4, method="gptq", max_shard_bytes=100_000)
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored["method"]) == ("gptjet", "gptq")
    assert (stored["bits"], stored["group"]) == (4, 128)
    assert stored["calibration"]["text"] == "the checkpoint's own text"
    assert stored["calibration"]["tokens"] >= 300
    source = json.loads((make_gptj_checkpoint(seed=0) / "config.json").read_text())
    assert stored["source"]["config_sha256"] == recipes.config_sha256(source)
    assert stored["versions"]["torch"] == torch.__version__
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert stored.pop("sha256") == {path.name: recipes.file_sha256(path) for path in files}
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert json.loads(file.metadata()["gptjet_recipe"]) == stored
        assert path.stat().st_mode == (folder / "config.json").stat().st_mode
    weights = load_fused_weights(resolve_checkpoint(str(folder)), "int4")
    assert weights.quantization == stored


def test_tokenizer_comes_along(make_quantized: Make) -> None:
    tokenizer = load_tokenizer(make_quantized(bits=8))
    assert tokenizer.encode("abc") == [97, 98, 99]


def test_asking_for_another_weight_type_names_what_is_there(int4: Path) -> None:
    for weight_type in ("int8", "fp32"):
        assert f"holds int4 weights and {weight_type} was asked for" in refusal(int4, weight_type)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("group", 64, "group is 64; this gptjet computes 128 with 4 bits"),
        ("bits", 3, "bits is 3; this gptjet computes 4 and 8"),
        ("bits", 8, "group is 128; this gptjet computes None with 8 bits"),
        ("format_version", 2, "format_version is 2; this gptjet reads 1"),
        ("method", "awq", "was made otherwise: method 'rtn' (config.json has 'awq')"),
        ("geometry", 3, "geometry is no object"),
    ],
)
def test_recipes_that_are_not_ours_or_not_the_files_are_refused_by_field(
    field: str, value: Any, problem: str, int4: Path
) -> None:
    edit_config(int4, lambda config: config["quantization_config"].update({field: value}))
    assert problem in refusal(int4)


@pytest.mark.parametrize("field", ["bits", "geometry", "sha256"])
def test_recipe_without_a_field_is_refused_naming_it(field: str, int4: Path) -> None:
    edit_config(int4, lambda config: config["quantization_config"].pop(field))
    assert f"lacks {field}" in refusal(int4)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"n_layer": 3}, "num_layers 2 (config.json has 3)"),
        ({"n_head": 4, "rotary_dim": 32}, "num_heads 2 (config.json has 4)"),
        ({"rotary_dim": 16}, "rotary_dim 32 (config.json has 16)"),
        ({"vocab_size": 300}, "vocab_size 263 (config.json has 300)"),
    ],
)
def test_weights_of_another_model_are_refused_naming_the_size(
    fields: dict[str, Any], problem: str, int4: Path
) -> None:
    edit_config(int4, lambda config: config.update(fields))
    message = refusal(int4)
    assert "quantised for another model" in message
    assert problem in message


def test_flipped_byte_is_found(int4: Path) -> None:
    path = int4 / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 4
    path.write_bytes(content)
    assert "model.safetensors is corrupt, or of another run" in refusal(int4)


def test_file_of_another_run_is_refused(int4: Path, make_quantized: Make) -> None:
    """Of the same geometry and recipe, but other weights; and of another number of bits."""
    other = make_quantized(seed=5, bits=4, method="rtn")
    shutil.copy(other / "model.safetensors", int4 / "model.safetensors")
    assert "of another run of `gptjet quantize`" in refusal(int4)
    shutil.copy(make_quantized(bits=8) / "model.safetensors", int4 / "model.safetensors")
    message = refusal(int4)
    assert "was made otherwise: " in message
    assert "bits 8 (config.json has 4)" in message


def test_one_shard_of_another_run_is_refused_by_its_name(
    make_quantized: Make, tmp_path: Path
) -> None:
    options = {"bits": 4, "method": "rtn", "max_shard_bytes": 100_000}
    folder = Path(shutil.copytree(make_quantized(**options), tmp_path / "mixed"))
    name = sorted(folder.glob("*.safetensors"))[1].name
    shutil.copy(make_quantized(seed=5, **options) / name, folder / name)
    assert name in refusal(folder)


def test_float_file_under_a_quantised_config_is_refused(
    int4: Path, make_gptj_checkpoint: Callable[..., Path]
) -> None:
    shutil.copy(make_gptj_checkpoint() / "model.safetensors", int4 / "model.safetensors")
    assert "holds no recipe of `gptjet quantize`" in refusal(int4)


def test_file_that_the_config_does_not_list_is_refused(int4: Path) -> None:
    edit_config(int4, lambda config: config["quantization_config"].update(sha256={}))
    assert "not among the files that config.json lists" in refusal(int4)


def test_missing_misshapen_and_unexpected_tensors_are_each_named(int4: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["layers.1.w_out.bias"]
        tensors["layers.0.w_in.scale"] = tensors["layers.0.w_in.scale"].float()
        tensors["layers.2.norm.bias"] = torch.zeros(3)

    edit_weights(int4, spoil)
    message = refusal(int4)
    assert "not those of an INT4 GPTJForCausalLM" in message
    assert "missing layers.1.w_out.bias" in message
    assert "misshapen layers.0.w_in.scale F32 [896, 1] (the model has F16 [896, 1])" in message
    assert "unexpected layers.2.norm.bias" in message


def test_scale_that_is_not_finite_is_refused_by_name(int4: Path) -> None:
    edit_weights(int4, lambda tensors: tensors["layers.1.w_in.scale"].fill_(torch.inf))
    assert "layers.1.w_in.scale holds a value that is not finite" in refusal(int4)


def test_other_backends_say_which_one_computes_it(int4: Path) -> None:
    with pytest.raises(BackendLoadError, match=r"quantised by `gptjet quantize`.*--backend fused"):
        verify_architecture(resolve_checkpoint(str(int4)))
    with pytest.raises(BackendLoadError, match="--backend fused"):
        load_backend("huggingface", str(int4), progress=False)


@pytest.mark.parametrize(("bits", "weight_type"), [(8, "int8"), (4, "int4")])
def test_fused_backend_serves_it_in_its_own_type_and_proves_it(
    bits: int, weight_type: str, make_quantized: Make
) -> None:
    backend = load_backend("fused", str(make_quantized(bits=bits)), device="cpu", progress=False)
    spec = backend.backend.spec
    backend.backend.close()
    assert (spec.name, spec.dtype) == ("fused", weight_type)
    assert spec.parity.status is ParityStatus.PASSED


def test_gptq_without_calibration_or_with_8_bits_is_an_error(
    make_gptj_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = resolve_checkpoint(str(make_gptj_checkpoint()))
    calibration = CalibrationSet("text", "0", [[1, 2]])
    for bits, given in ((4, None), (8, calibration)):
        weights = load_fused_weights(checkpoint, "fp32")
        with pytest.raises(ValueError, match="gptq is for 4 bits and needs calibration"):
            write_quantized(
                checkpoint, weights, tmp_path, bits=bits, method="gptq", calibration=given
            )


@pytest.mark.parametrize(("bits", "bar"), [(8, 0.005), (4, 0.02)])
def test_embedded_checkpoint_keeps_its_perplexity(bits: int, bar: float, tmp_path: Path) -> None:
    """The bars of the published quality, on a part of the held-out rows."""
    report = run(
        QuantizeOptions(
            model="embedded",
            output=tmp_path / "out",
            bits=bits,
            text_tokens=2500,
            calibration_tokens=2000,
        )
    )
    assert report.delta is not None
    assert abs(report.delta) < bar
    assert report.before is not None
    assert report.before.num_tokens > 2000
    assert report.output_bytes < (0.42 if bits == 4 else 0.62) * report.source_bytes
