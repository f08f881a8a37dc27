"""Every broken checkpoint is one line that names the file and what is wrong with it."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.architecture import verify_architecture
from gptjet.service.models.checkpoint import Checkpoint, resolve_checkpoint

WEIGHTS = "model.safetensors"
SHARDED = {"n_layer": 3, "max_shard_size": "300KB"}


@pytest.fixture
def folder(make_gptj_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A good checkpoint of one file, to be broken."""
    return Path(shutil.copytree(make_gptj_checkpoint(), tmp_path / "model"))


@pytest.fixture
def sharded(make_gptj_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A good checkpoint of several shards, to be broken."""
    copied = Path(shutil.copytree(make_gptj_checkpoint(**SHARDED), tmp_path / "sharded"))
    assert len(list(copied.glob("model-*.safetensors"))) >= 3
    return copied


def check(folder: Path, **options: Any) -> Checkpoint:
    """Everything that is checked before a weight is read."""
    checkpoint = resolve_checkpoint(str(folder), **options)
    verify_architecture(checkpoint)
    return checkpoint


def refusal(folder: Path | str, **options: Any) -> str:
    """The one line with which `folder` is refused."""
    with pytest.raises(BackendLoadError) as caught:
        check(folder, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS)


def test_good_checkpoint_is_described_from_its_headers(folder: Path) -> None:
    checkpoint = check(folder)
    tensors = load_file(folder / WEIGHTS)
    assert checkpoint.path == folder
    assert checkpoint.name == "model"
    assert (checkpoint.model_type, checkpoint.architecture) == ("gptj", "GPTJForCausalLM")
    assert checkpoint.weight_files == (folder / WEIGHTS,)
    assert checkpoint.total_bytes == (folder / WEIGHTS).stat().st_size
    assert checkpoint.num_parameters == sum(t.numel() for t in tensors.values())
    assert not checkpoint.is_pickle


def test_shards_add_up_to_the_same_parameters_as_one_file(
    sharded: Path, make_gptj_checkpoint: Callable[..., Path]
) -> None:
    whole = check(make_gptj_checkpoint(n_layer=3))
    parts = check(sharded)
    assert len(parts.weight_files) >= 3
    assert parts.num_parameters == whole.num_parameters
    assert dict(parts.tensors) == dict(whole.tensors)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    assert f"there is no folder {tmp_path / 'nowhere'}" in refusal(tmp_path / "nowhere")


def test_file_in_place_of_a_folder_is_explained(folder: Path) -> None:
    assert "is a file: give the folder" in refusal(folder / WEIGHTS)


def test_empty_folder_is_called_empty(tmp_path: Path) -> None:
    assert "is empty" in refusal(tmp_path)


def test_missing_config_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "holds no config.json" in refusal(folder)


@pytest.mark.parametrize("text", ["{", '{"model_type": ', "\xff\xfe"])
def test_config_that_is_no_json_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json is not valid JSON" in refusal(folder)


def test_config_that_is_no_object_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")
    assert "must hold a JSON object" in refusal(folder)


def test_config_without_model_type_is_refused(folder: Path) -> None:
    edit_config(folder, model_type=None)
    assert "names no model_type" in refusal(folder)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "architecture BertForMaskedLM is not a causal language model",
        ),
        ({"model_type": "bert", "architectures": None}, "attends in both directions"),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            "model_type 't5' is not a causal language model",
        ),
        ({"model_type": "gptk"}, "model_type 'gptk' is not a causal language model"),
        ({"architectures": ["GPTJForSequenceClassification"]}, "GPTJForSequenceClassification"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ],
)
def test_wrong_architecture_is_named(folder: Path, fields: dict[str, Any], expected: str) -> None:
    edit_config(folder, **fields)
    assert expected in refusal(folder)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"n_head": 3}, "n_embd 128 is not a multiple of n_head 3"),
        ({"rotary_dim": 96}, "rotary_dim 96 must be even and 2 to 64"),
        ({"rotary_dim": 31}, "rotary_dim 31 must be even"),
        ({"rotary_dim": None}, "rotary_dim is null"),
        ({"n_layer": "two"}, "n_layer"),
    ],
)
def test_impossible_geometry_is_named(folder: Path, fields: dict[str, Any], expected: str) -> None:
    edit_config(folder, **fields)
    assert expected in refusal(folder)


def test_weights_of_another_geometry_are_named_with_both_shapes(folder: Path) -> None:
    edit_config(folder, vocab_size=300)
    message = refusal(folder)
    assert "lm_head.weight [263, 128] (the model has [300, 128])" in message
    assert "not those of GPTJForCausalLM" in message


def test_folder_without_weights_lists_what_it_found(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "weights.safetensors")
    message = refusal(folder)
    assert "holds no weights" in message
    assert "weights.safetensors" in message


@pytest.mark.parametrize("kept_bytes", [0, 5, 100, -1])
def test_truncated_file_is_named_with_both_sizes(folder: Path, kept_bytes: int) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:kept_bytes])
    message = refusal(folder)
    assert f"{folder / WEIGHTS} is truncated" in message
    assert str(len(whole[:kept_bytes])) in message
    if kept_bytes == -1:
        assert f"describes {len(whole)} bytes, the file has {len(whole) - 1}" in message


def test_truncated_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard} is truncated" in refusal(sharded)


def test_git_lfs_pointer_is_recognised(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refusal(folder)


def _with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**40) + b"x" * 100,
        _with_header(b"not json"),
        _with_header(b"[]"),
        _with_header(b'{"a": 1}'),
        _with_header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b"1234"),
        _with_header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', b"12345678"),
        _with_header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}'),
    ],
)
def test_corrupt_header_is_named(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)
    assert f"{folder / WEIGHTS} has a corrupt header" in refusal(folder)


def test_bytes_after_the_last_tensor_are_refused(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"more")
    assert f"{folder / WEIGHTS} is corrupt" in refusal(folder)


def test_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    message = refusal(sharded)
    assert "lacks 1 of" in message
    assert shard.name in message


def test_index_that_reaches_outside_the_folder_is_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    assert "no shard of this folder" in refusal(sharded)


def test_index_that_promises_an_absent_tensor_is_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["extra.weight"] = content["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(content))
    assert "names 1 tensors that no shard holds: extra.weight" in refusal(sharded)


def test_index_that_is_no_json_is_named(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json is not valid JSON" in refusal(sharded)


def test_missing_tensor_is_named(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.pop("transformer.h.1.mlp.fc_in.bias"))
    assert "missing transformer.h.1.mlp.fc_in.bias" in refusal(folder)


def test_only_a_few_of_many_missing_tensors_are_named(folder: Path) -> None:
    edit_config(folder, n_layer=4)
    message = refusal(folder)
    assert "transformer.h.2." in message
    assert "more" in message
    assert len(message) < 400


def test_unexpected_tensor_is_named(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update(adapter=torch.zeros(3)))
    assert "unexpected adapter" in refusal(folder)


def test_misshapen_tensor_is_named(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"transformer.ln_f.bias": torch.zeros(64)}))
    assert "misshapen transformer.ln_f.bias [64] (the model has [128])" in refusal(folder)


def test_integer_weights_are_refused(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}))
    assert "lm_head.weight is stored as I8" in refusal(folder)


def test_buffers_of_old_gptj_checkpoints_are_ignored_and_not_counted(folder: Path) -> None:
    before = check(folder).num_parameters
    buffers = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e9),
    }
    edit_tensors(folder, lambda t: t.update(buffers))
    assert check(folder).num_parameters == before


def test_tied_head_may_be_stored_once_or_not_at_all(
    make_causal_lm_checkpoint: Callable[..., Path],
) -> None:
    folder = make_causal_lm_checkpoint("gpt2", vocab_size=64, n_positions=32, n_embd=32, n_head=2)
    names = set(check(folder).tensors)
    assert len({"lm_head.weight", "transformer.wte.weight"} & names) == 1


def test_weights_without_the_prefix_of_the_base_model_are_found(
    make_causal_lm_checkpoint: Callable[..., Path],
) -> None:
    folder = make_causal_lm_checkpoint("gpt2", vocab_size=64, n_positions=32, n_embd=32, n_head=2)
    edit_tensors(
        folder,
        lambda t: [t.update({n.removeprefix("transformer."): t.pop(n)}) for n in list(t)],
    )
    assert "h.0.attn.c_attn.weight" in check(folder).tensors


def test_pickle_needs_the_flag_and_the_message_names_it(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert "--allow-pickle" in refusal(folder)
    checkpoint = check(folder, allow_pickle=True)
    assert checkpoint.is_pickle
    assert checkpoint.num_parameters == 0


def test_safetensors_are_preferred_where_pickles_are_allowed(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    assert not check(folder, allow_pickle=True).is_pickle


def test_truncated_pickle_is_named(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert f"{path} is truncated" in refusal(folder, allow_pickle=True)
