"""`--backend auto`: the first that loads and passes, and a line that says which and why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptjet.service.backends import auto, factory
from gptjet.service.backends.factory import BackendEntry, LoadedModel, LoadOptions, load_backend
from gptjet.service.backends.mock import MockBackend
from gptjet.service.backends.parity import ParityFailedError, WithParity
from gptjet.service.engine.backend import ParityStatus, ParityVerdict
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.engine.tokenizer import ByteTokenizer

Outcome = ParityVerdict | Exception
PASSED = ParityVerdict(status=ParityStatus.PASSED, detail="all equal")
FAILED = ParityVerdict(status=ParityStatus.FAILED, detail="3 differ outright")


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Outcome]:
    """What each backend's loader does; those not set refuse."""
    found: dict[str, Outcome] = {}

    def entry(name: str) -> BackendEntry:
        def load(options: LoadOptions) -> LoadedModel:
            assert options.strict_parity
            outcome = found.get(name, BackendLoadError(f"{name} cannot"))
            if isinstance(outcome, Exception):
                raise outcome
            backend = MockBackend()
            spec = replace(backend.spec, name=name, parity=outcome)
            return LoadedModel(WithParity(backend, spec), ByteTokenizer())

        return BackendEntry(name, load)

    for name in ("fused", "deepspeed", "huggingface"):
        monkeypatch.setitem(factory.BACKENDS, name, entry(name))
    return found


def load_auto(**options: Any) -> Any:
    return load_backend("auto", "embedded", **{"device": "cpu", **options}).backend.spec


def test_fused_is_first_and_the_detail_says_that_auto_chose_it(
    outcomes: dict[str, Outcome], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gptjet.service.backends.auto")
    outcomes |= {"fused": PASSED, "huggingface": ParityVerdict()}
    spec = load_auto()
    assert spec.name == "fused"
    assert spec.parity == replace(PASSED, detail="auto chose fused; all equal")
    assert caplog.messages == ["auto chose fused"]


def test_refusal_of_a_faster_one_is_reported(outcomes: dict[str, Outcome]) -> None:
    outcomes["huggingface"] = ParityVerdict()
    spec = load_auto()
    assert spec.name == "huggingface"
    assert spec.parity.status is ParityStatus.NOT_RUN
    assert spec.parity.detail == "auto chose huggingface; not fused: fused cannot"


def test_one_that_stands_in_for_a_failed_one_carries_its_verdict(
    outcomes: dict[str, Outcome],
) -> None:
    outcomes |= {"fused": ParityFailedError("it differs", FAILED), "huggingface": ParityVerdict()}
    parity = load_auto().parity
    assert parity.status is ParityStatus.FAILED
    assert parity.detail == "auto chose huggingface; not fused: it differs"


def test_strict_parity_refuses_where_the_first_that_loads_differs(
    outcomes: dict[str, Outcome],
) -> None:
    outcomes |= {"fused": ParityFailedError("it differs", FAILED), "huggingface": ParityVerdict()}
    with pytest.raises(ParityFailedError, match="it differs"):
        load_auto(strict_parity=True)


def test_deepspeed_is_tried_on_a_gpu_only(
    outcomes: dict[str, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes |= {"deepspeed": PASSED, "huggingface": ParityVerdict()}
    assert load_auto().name == "huggingface"
    monkeypatch.setattr(auto, "choose_device", lambda _: torch.device("cuda", 0))
    assert load_auto().name == "deepspeed"


def test_ranks_of_a_launcher_share_a_model_in_deepspeed(
    outcomes: dict[str, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes |= {"fused": PASSED, "deepspeed": PASSED}
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert load_auto().name == "deepspeed"


def test_where_none_serves_it_each_says_why(outcomes: dict[str, Outcome]) -> None:
    with pytest.raises(
        BackendLoadError, match="no backend serves embedded: fused: fused cannot; huggingface: hug"
    ):
        load_auto()


def test_wrong_folder_is_refused_once(outcomes: dict[str, Outcome]) -> None:
    with pytest.raises(BackendLoadError, match=r"^there is no folder /nowhere$"):
        load_backend("auto", "/nowhere", device="cpu")


def test_another_family_is_served_by_transformers(
    make_causal_lm_checkpoint: Callable[..., Path], make_gptj_checkpoint: Callable[..., Path]
) -> None:
    """The real ones."""
    import shutil

    folder = make_causal_lm_checkpoint("gpt2", vocab_size=300, n_positions=32, n_embd=32, n_head=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(make_gptj_checkpoint() / name, folder / name)
    spec = load_backend("auto", str(folder), device="cpu").backend.spec
    assert spec.name == "huggingface"
    assert "not of the GPT-J family" in spec.parity.detail


def test_a_kv_cache_dtype_is_asked_of_fused_alone(
    outcomes: dict[str, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other backend would serve, and with a cache that nobody asked for."""
    outcomes |= {"huggingface": PASSED}
    with pytest.raises(BackendLoadError, match=r"^fused: fused cannot$"):
        load_auto(kv_cache_dtype="int8")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BackendLoadError, match="only deepspeed shares a model between ranks"):
        load_auto(kv_cache_dtype="int8")
