"""The parity gate of the fused backend: probes of transformers' forward, before and after loading.

The reference runs first, one block at a time, so the process never holds two models. It computes
in float32 whatever the fused path computes in. Of INT8 and INT4 weights it takes the values that
they stand for: what is judged is our computing. What quantising itself costs is another question,
which `gptjet quantize` answers in perplexity; here it is bounded too (see `QUANTIZATION_LIMIT`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from gptjet.kernels.batch import BLOCK_SIZE, BlockGeometry
from gptjet.service.backends import layerwise, parity
from gptjet.service.backends.fused.kv_cache import allocate_kv_cache
from gptjet.service.backends.fused.runner import ModelRunner, Segment
from gptjet.service.engine.backend import ParityStatus, ParityVerdict

if TYPE_CHECKING:
    from gptjet.service.backends.fused.model import Computer
    from gptjet.service.backends.layerwise import WeightSource

# Of the probes, on a CPU: some seconds of two slow cores. A GPU runs all of them.
_CPU_FLOP = 4e11
_FLOAT_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def choose_probes(
    geometry: BlockGeometry, num_parameters: int, device: torch.device
) -> tuple[tuple[int, ...], ...]:
    """Probe prompts; of a large model on a CPU only the shorter ones, by their arithmetic."""
    max_tokens = None if device.type == "cuda" else int(_CPU_FLOP / (2 * num_parameters))
    return parity.probe_prompts(geometry.vocab_size, geometry.max_context, max_tokens)


def record_reference(
    source: WeightSource,
    prompts: Sequence[Sequence[int]],
    geometry: BlockGeometry,
    device: torch.device,
) -> list[parity.Trace]:
    """What transformers' blocks compute for the probes from these weights."""
    return parity.record_forced(
        functools.partial(_last_logits, source, device),
        prompts,
        geometry.vocab_size,
        geometry.max_context,
    )


def _last_logits(
    source: WeightSource,
    device: torch.device,
    sequences: list[tuple[int, ...]],
    wanted: list[int],
) -> list[torch.Tensor]:
    return layerwise.last_logits(source, sequences, wanted, device)


# Relative errors of logits, as parity.tolerance has them for floats; see `judge`.
_INTEGER_LIMIT = 0.05
_QUANTIZING_LIMIT = {"int8": 0.25, "int4": 1.0}


def judge(
    runner: ModelRunner,
    references: Mapping[str, list[parity.Trace]],
    weight_type: str,
    num_layers: int,
) -> ParityVerdict:
    """Hold the fused path to every reference; the verdict on the served weights has the last word.

    Float types are held to parity.tolerance, and their greedy choices must be equal.
    """
    dtype = _FLOAT_DTYPES.get(weight_type)
    limit = _INTEGER_LIMIT if dtype is None else parity.tolerance(dtype, num_layers)
    verdict = parity.compare(FusedStepper(runner), references["weights"], limit)
    floats = references.get("floats")
    if floats is None:
        return verdict
    quantized = parity.compare(FusedStepper(runner), floats, _QUANTIZING_LIMIT[weight_type])
    detail = f"{verdict.detail}; against the float weights: {quantized.detail}"
    is_bad = ParityStatus.FAILED in (verdict.status, quantized.status)
    return replace(
        verdict, status=ParityStatus.FAILED if is_bad else ParityStatus.PASSED, detail=detail
    )


class FusedStepper:
    """A ModelRunner behind `parity.StepModel`, on KV blocks in no order."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        count = runner.kv_cache.shape[2]
        self._blocks = torch.randperm(
            count, generator=torch.Generator().manual_seed(count)
        ).tolist()
        self._length = 0

    def start(self, token_ids: Sequence[int], num_steps: int) -> torch.Tensor:
        """See StepModel."""
        del num_steps  # the cache is made for the longest probe
        self._length = len(token_ids)
        return self._runner.run([Segment(token_ids, 0, self._blocks, wanted=1)])[0]

    def step(self, token_id: int) -> torch.Tensor:
        """See StepModel."""
        row = self._runner.decode([token_id], [self._length], [self._blocks])[0]
        self._length += 1
        return row

    def finish(self) -> None:
        """See StepModel."""
        self._length = 0


def probe_runner(
    computer: Computer,
    geometry: BlockGeometry,
    device: torch.device,
    prompts: Sequence[Sequence[int]],
    **limits: Any,
) -> ModelRunner:
    """A runner with a KV cache just large enough for the probes."""
    longest = max(len(prompt) for prompt in prompts) + parity.probe_steps(geometry.max_context)
    cache = allocate_kv_cache(
        geometry, -(-longest // BLOCK_SIZE), dtype=computer.kv_dtype, device=device
    )
    return ModelRunner(computer.model, geometry, cache, **limits)
