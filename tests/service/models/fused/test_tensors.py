"""Reading tensors out of a checkpoint's files: what is read, whose it is, what goes wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.checkpoint import resolve_checkpoint
from gptjet.service.models.fused.tensors import TensorFiles

EMBEDDING = "transformer.wte.weight"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_tensor_and_every_row_is_what_safetensors_reads(
    dtype: str, make_gptj_checkpoint: Callable[..., Path]
) -> None:
    checkpoint = resolve_checkpoint(str(make_gptj_checkpoint(dtype=dtype)))
    expected = load_file(checkpoint.weight_files[0])
    files = TensorFiles(checkpoint)
    with files.open(files.infos) as held:
        assert set(held) == set(expected)
        for name, tensor in held.items():
            assert torch.equal(tensor, expected[name])
        assert torch.equal(held.rows(EMBEDDING, 7, 9), expected[EMBEDDING][7:9])


def test_what_is_read_is_the_readers_own_and_goes_when_he_drops_it(
    make_gptj_checkpoint: Callable[..., Path],
) -> None:
    checkpoint = resolve_checkpoint(str(make_gptj_checkpoint(vocab_size=20_000)))
    files = TensorFiles(checkpoint)
    with files.open([EMBEDDING]) as held:
        first = held[EMBEDDING]
        first.zero_()
        assert held[EMBEDDING].any()
    first += 1  # after closing, too
    assert first.nbytes > 1 << 20  # in pages of its own
    assert first._base is None  # through which they would stay


def test_a_file_that_becomes_shorter_is_an_error(
    make_gptj_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A mapped one would end the process with SIGBUS."""
    source = make_gptj_checkpoint()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    files = TensorFiles(resolve_checkpoint(str(tmp_path)))
    with files.open(files.infos) as held:
        os.truncate(tmp_path / "model.safetensors", 20_000)
        with pytest.raises(BackendLoadError, match="become shorter than its header says"):
            dict(held)
    (tmp_path / "model.safetensors").unlink()
    with files.open(files.infos) as held, pytest.raises(BackendLoadError, match="cannot be read"):
        dict(held)
