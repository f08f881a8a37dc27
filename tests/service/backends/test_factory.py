"""The table of backends: what it knows, and what it costs to import."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptjet.service.backends.factory import BACKENDS, load_backend
from gptjet.service.backends.mock_settings import settings_of
from gptjet.service.engine.backend import Phase, ScheduledBatch
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.engine.request import SamplingParams, new_request
from gptjet.service.engine.sequence import Sequence
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


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("embedded", (0, 0)),
        ("mock", (0, 0)),
        ("mock:decode_ms=5", (0, 5)),
        ("mock:prefill_ms=20.5, decode_ms=0", (20.5, 0)),
    ],
)
def test_the_mocks_delays_stand_in_its_models_name(
    model: str, expected: tuple[float, float]
) -> None:
    settings = settings_of(model)
    assert (settings.prefill_ms, settings.decode_ms) == expected


def test_a_mock_with_delays_sleeps_that_long_in_its_steps() -> None:
    backend = load_backend("mock", "mock:prefill_ms=30,decode_ms=10").backend
    request = new_request((ord("a"),), SamplingParams())
    nothing: Any = None
    sequence = Sequence(1, request, 0, nothing, nothing)
    started = time.monotonic()
    backend.prefill(ScheduledBatch(Phase.PREFILL, (sequence,)))
    prefilled = time.monotonic()
    sequence.output_token_ids.append(ord("b"))
    backend.decode(ScheduledBatch(Phase.DECODE, (sequence,)))
    # A sleep is never shorter than asked for; how much longer is the machine's business.
    assert prefilled - started >= 0.030
    assert time.monotonic() - prefilled >= 0.010


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            "mock:prefil_ms=3",
            "'prefil_ms=3' is no setting of the mock: give some of prefill_ms, decode_ms",
        ),
        ("mock:", "'' is no setting"),
        ("mock:decode_ms", "'decode_ms' is no setting"),
        ("mock:fail_at_step=-1", "fail_at_step must be a whole number from 0 to 1000000000"),
        ("mock:fail_at_step=2.5", "fail_at_step must be a whole number"),
        ("mock:decode_ms=fast", "decode_ms must be 0 to 60000 ms, got 'fast'"),
        ("mock:decode_ms=-1", "got '-1'"),
        ("mock:decode_ms=nan", "got 'nan'"),
        ("mock:prefill_ms=1,decode_ms=60001", "decode_ms must be 0 to 60000 ms"),
    ],
)
def test_a_delay_that_cannot_be_is_refused_by_name(model: str, words: str) -> None:
    with pytest.raises(BackendLoadError, match=re.escape(words)):
        load_backend("mock", model)


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
