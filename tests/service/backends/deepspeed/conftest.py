"""The stand-in op installed under DeepSpeed, and small seeded models to inject it into."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

if importlib.util.find_spec("deepspeed") is None:
    collect_ignore_glob = ["test_*.py"]  # the extra is not installed

MakeModel = Callable[..., torch.nn.Module]


def _load_stand_in() -> ModuleType:
    """By path: with `--import-mode=importlib` test modules cannot import one another."""
    name = "gptjet_test_stand_in"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("stand_in.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def stand_in_module() -> ModuleType:
    return _load_stand_in()


@pytest.fixture
def install_op(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Any]]:
    """Install an object as the op DeepSpeed calls; whatever is injected is closed afterwards."""
    from gptjet.service.backends.deepspeed import injection, runtime

    runtime.import_deepspeed(torch.device("cpu"))  # quietly
    from deepspeed.ops.transformer.inference.op_binding.base import BaseOp

    def install(op: Any) -> Any:
        monkeypatch.setattr(BaseOp, "inference_module", op)
        return op

    yield install
    if injection._open_model is not None:
        injection._open_model.close()


@pytest.fixture
def op(stand_in_module: ModuleType, install_op: Callable[[Any], Any]) -> Any:
    """A fresh stand-in, installed."""
    return install_op(stand_in_module.StandInOp())


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """A seeded model of one of the families DeepSpeed injects, FP32, on the CPU."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        GPTJConfig,
        GPTJForCausalLM,
        GPTNeoConfig,
        GPTNeoForCausalLM,
    )

    def make(
        family: str = "gptj",
        *,
        layers: int = 2,
        heads: int = 2,
        head_dim: int = 16,
        context: int = 128,
        vocab: int = 97,
        seed: int = 0,
        **more: Any,
    ) -> torch.nn.Module:
        torch.manual_seed(seed)
        hidden = heads * head_dim
        more = {"bos_token_id": 0, "eos_token_id": 0, **more}
        model: Any
        if family == "gptj":
            model = GPTJForCausalLM(
                GPTJConfig(
                    n_layer=layers,
                    n_head=heads,
                    n_embd=hidden,
                    n_positions=context,
                    vocab_size=vocab,
                    **{"rotary_dim": 8, **more},
                )
            )
        elif family == "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(
                    n_layer=layers,
                    n_head=heads,
                    n_embd=hidden,
                    n_positions=context,
                    vocab_size=vocab,
                    **more,
                )
            )
        else:
            model = GPTNeoForCausalLM(
                GPTNeoConfig(
                    num_layers=layers,
                    num_heads=heads,
                    hidden_size=hidden,
                    max_position_embeddings=context,
                    vocab_size=vocab,
                    **{"attention_types": [[["global", "local"], layers // 2]], **more},
                )
            )
        with torch.no_grad():
            for parameter in model.parameters():
                # the default initialisation is so narrow that every error hides in it
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.4 / parameter.shape[-1] ** 0.5 * 2)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def greedy_reference() -> Callable[[torch.nn.Module, list[int], int], tuple[list[int], Any]]:
    """transformers' own greedy tokens and the logits [steps, V] they came from, with its cache."""

    @torch.inference_mode()
    def run(model: Any, prompt: list[int], steps: int) -> tuple[list[int], torch.Tensor]:
        out = model(torch.tensor([prompt]), use_cache=True)
        rows, tokens = [out.logits[0, -1].float()], []
        for _ in range(steps):
            tokens.append(int(rows[-1].argmax()))
            out = model(
                torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True
            )
            rows.append(out.logits[0, -1].float())
        return tokens, torch.stack(rows)

    return run
