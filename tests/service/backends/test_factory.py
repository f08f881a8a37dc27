"""The table of backends: what it knows, and what it costs to import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gptjet.service.backends.factory import BACKENDS, load_backend
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.engine.tokenizer import ByteTokenizer


def test_importing_the_table_imports_no_torch() -> None:
    script = (
        "import sys; from gptjet.service.backends.factory import BACKENDS; "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), len(BACKENDS) > 1)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[] True\n"


def test_unknown_backend_lists_the_known() -> None:
    with pytest.raises(BackendLoadError, match=r"unknown backend 'tpu': there are auto, fused, mo"):
        load_backend("tpu", "embedded")


@pytest.mark.parametrize("name", BACKENDS)
def test_every_description_fits_one_line_of_help(name: str) -> None:
    description = BACKENDS[name].description
    assert 10 < len(description) <= 120
    assert "\n" not in description


def test_mock_needs_no_model() -> None:
    loaded = load_backend("mock", "anything", max_sequences=3, kv_cache_tokens=160)
    assert isinstance(loaded.tokenizer, ByteTokenizer)
    assert loaded.backend.spec.name == "mock"
    assert loaded.backend.spec.max_sequences == 3
    assert loaded.backend.spec.num_kv_blocks == 10


def test_huggingface_comes_with_the_tokenizer_of_its_checkpoint(
    make_gptj_checkpoint: Callable[..., Path],
) -> None:
    folder = make_gptj_checkpoint()
    loaded = load_backend("huggingface", str(folder), max_sequences=2)
    assert loaded.backend.spec.model_name == folder.name
    assert loaded.backend.spec.max_sequences == 2
    assert loaded.tokenizer.encode("Héllo") == list("Héllo".encode())
    assert loaded.tokenizer.eos_token_id == 256


@pytest.mark.parametrize("option", ["max_sequences", "kv_cache_tokens"])
def test_limits_below_one_are_refused_by_name(option: str) -> None:
    with pytest.raises(BackendLoadError, match=f"{option} must be 1 or more, got 0"):
        load_backend("mock", "mock", **{option: 0})


def test_folder_without_a_tokenizer_is_refused(
    make_causal_lm_checkpoint: Callable[..., Path],
) -> None:
    folder = make_causal_lm_checkpoint("gpt2", vocab_size=64, n_positions=32, n_embd=32, n_head=2)
    with pytest.raises(BackendLoadError, match="tokenizer"):
        load_backend("huggingface", str(folder))
