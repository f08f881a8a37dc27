"""Fused backends of small random checkpoints, and what transformers says of the same."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gptjet.service.backends import parity
from gptjet.service.backends.factory import LoadedModel, load_backend
from gptjet.service.backends.fused import gpu, model, proof
from gptjet.service.engine.config import EngineConfig
from gptjet.service.engine.engine import Engine
from gptjet.service.engine.request import RequestOutput, SamplingParams, new_request

if TYPE_CHECKING:
    from gptjet.kernels.gpu.operations import Operations


class Reference:
    """transformers' own model of a folder, loaded its plainest way."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """Greedy tokens after the prompt, end-of-text like any other."""
        self.model.generation_config.eos_token_id = None
        with torch.inference_mode():
            output = self.model.generate(
                torch.tensor([list(prompt)]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[N, V] of a whole sequence in one pass."""
        with torch.inference_mode():
            rows: torch.Tensor = self.model(torch.tensor([list(token_ids)])).logits[0]
        return rows.clone()

    def logprobs(self, prompt: Sequence[int], candidate: Sequence[int]) -> torch.Tensor:
        """[C] of the candidate's tokens."""
        rows = self.logits([*prompt, *candidate])[len(prompt) - 1 : -1].log_softmax(-1)
        return rows.gather(1, torch.tensor(list(candidate)).unsqueeze(1)).squeeze(1)


@pytest.fixture(params=["kernels", "torch"])
def computer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which model computes: the CPU kernels, or PyTorch where no compiler is found.

    A test may ask for "interpreted" too: the GPU kernels, in float16, by Triton's interpreter.
    """
    if request.param == "torch":

        def unavailable(*_: Any, **__: Any) -> None:
            raise model.NativeUnavailableError("switched off by a test")

        monkeypatch.setattr(model.CpuModel, "pack", unavailable)
    if request.param == "interpreted":
        request.getfixturevalue("quick_interpreter")
        monkeypatch.setattr(gpu, "interpret_on_cpu", True)
        monkeypatch.setattr(gpu, "triton_operations", _interpreted_operations)
        # A pass takes a good part of a second. The gate has tests of its own.
        monkeypatch.setattr(proof, "choose_probes", lambda *_: ((5, 6, 7),))
        monkeypatch.setattr(parity, "_STEPS", 2)
    return str(request.param)


def _interpreted_operations() -> Operations:
    """The kernels in as few programs as there can be: the interpreter's time goes by programs."""
    from gptjet.kernels.gpu.operations import triton_operations
    from gptjet.kernels.gpu.tuning import Tile

    def whole(kernel: Any, weight_at: int) -> Any:
        def run(*arguments: Any, **options: Any) -> None:
            outputs, inputs = arguments[weight_at].shape
            block_k = 1 << (inputs - 1).bit_length()
            block_n = min(256, 2**17 // block_k)  # of eight rows, a tensor of 2**20
            tile = Tile(block_n, block_k, 4, 1, 1, tiles_per_program=-(-outputs // block_n))
            kernel(*arguments, tile=tile, **options)

        return run

    kernels = triton_operations()
    return dataclasses.replace(
        kernels,
        layer_norm_linear=whole(kernels.layer_norm_linear, 4),
        gelu_linear_residual=whole(kernels.gelu_linear_residual, 3),
    )


@pytest.fixture
def load_fused() -> Iterator[Callable[..., LoadedModel]]:
    """`load_fused(folder, **options)`: on the CPU; refuses to fall back; closed after the test."""
    loaded: list[LoadedModel] = []

    def load(folder: Path, **options: Any) -> LoadedModel:
        options = {"device": "cpu", "cpu_threads": 1, "strict_parity": True, **options}
        loaded.append(load_backend("fused", str(folder), **options))
        assert loaded[-1].backend.spec.name == "fused"
        return loaded[-1]

    threads = torch.get_num_threads()
    yield load
    torch.set_num_threads(threads)
    for one in loaded:
        one.backend.close()


@pytest.fixture(scope="session")
def make_codegen_checkpoint(
    make_causal_lm_checkpoint: Callable[..., Path], make_gptj_checkpoint: Callable[..., Path]
) -> Callable[..., Path]:
    """A random CodeGen with the byte tokenizer of the GPT-J checkpoints."""

    def make(**fields: Any) -> Path:
        sizes = {"n_embd": 128, "n_head": 4, "n_layer": 2, "rotary_dim": 16, "n_positions": 64}
        ids = {"vocab_size": 263, "bos_token_id": 256, "eos_token_id": 256}
        folder = make_causal_lm_checkpoint("codegen", **(sizes | ids | fields))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(make_gptj_checkpoint() / name, folder / name)
        return folder

    return make


class Driver:
    """An Engine over a loaded model that checks the block manager after every step."""

    def __init__(self, loaded: LoadedModel, **config: Any) -> None:
        self.engine = Engine(loaded.backend, loaded.tokenizer, EngineConfig(**config))
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.outputs: list[tuple[int, RequestOutput]] = []
        self.num_preemptions = 0
        preempt = self.engine.scheduler.preempt

        def counted(sequence: Any) -> None:
            self.num_preemptions += 1
            preempt(sequence)

        self.engine.scheduler.preempt = counted  # type: ignore[method-assign]

    def add(self, prompt: Sequence[int], *, seed: int | None = None, **params: Any) -> int:
        options = {"max_new_tokens": 16, "ignore_eos": True, "seed": seed, **params}
        return self.engine.add(new_request(tuple(prompt), SamplingParams(**options)))

    def step(self) -> None:
        for key, output in self.engine.step():
            assert output.error is None, output.error
            self.outputs.append((key, output))
            if not output.is_prompt:
                self.tokens.setdefault((key, output.index), []).extend(output.token_ids)
        self.engine.scheduler.block_manager.check_invariants()

    def run(self, steps: int | None = None) -> None:
        while self.engine.has_work and steps != 0:
            self.step()
            steps = None if steps is None else steps - 1

    def preempt(self, key: int) -> None:
        """Take the request's blocks away, as the scheduler does where there are too few."""
        scheduler = self.engine.scheduler
        ids = {s.sequence_id for s in self.engine._requests[key].sequences}
        (sequence,) = [s for s in scheduler.running if s.sequence_id in ids]
        scheduler.preempt(sequence)

    def check_nothing_is_held(self) -> None:
        """Every block is free or merely cached once all requests are done."""
        manager = self.engine.scheduler.block_manager
        assert not self.engine.has_work
        manager.check_invariants()
        assert manager.num_free_blocks == manager.num_blocks


def prompts_for(context: int) -> list[list[int]]:
    """Prompts of one token, odd lengths, and one token short of the context."""
    generator = torch.Generator().manual_seed(context)
    lengths = [1, 7, 2 * (context // 5) + 1, context - 1]
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="session")
def reference_of() -> Callable[[Path], Reference]:
    """`reference_of(folder)`: its Reference, made once a session."""
    return functools.cache(Reference)


@pytest.fixture
def check_greedy(
    computer: str, reference_of: Callable[[Path], Reference]
) -> Callable[[Path, Sequence[int], Sequence[int]], None]:
    """`check_greedy(folder, prompt, tokens)`: they are what transformers says in float32.

    Of a computer in float16, each must be the likeliest after those before it, but for ties within
    what rounding explains (twice parity's limit), and nearly all must be the likeliest.
    """

    def check(folder: Path, prompt: Sequence[int], tokens: Sequence[int]) -> None:
        if not tokens:
            return
        reference = reference_of(folder)
        if computer != "interpreted":
            assert list(tokens) == reference.generate(prompt, len(tokens))
            return
        rows = reference.logits([*prompt, *tokens])[len(prompt) - 1 : -1]
        rows = rows - rows.mean(1, keepdim=True)
        best = rows.amax(1)
        chosen = rows.gather(1, torch.tensor(list(tokens)).unsqueeze(1)).squeeze(1)
        layers = int(reference.model.config.n_layer)
        limit = 2 * parity.tolerance(torch.float16, layers) * rows.abs().amax(1)
        assert (best - chosen <= limit).all()
        assert int((best != chosen).sum()) <= 1 + len(tokens) // 20

    return check


@pytest.fixture
def drive() -> type[Driver]:
    """`drive(loaded, **engine_config)`: a Driver."""
    return Driver


@pytest.fixture
def prompts() -> Callable[[int], list[list[int]]]:
    """`prompts(context)`: see prompts_for."""
    return prompts_for
