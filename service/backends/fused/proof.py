"""The parity gate of the fused backend: probes of transformers' forward, before and after loading.

The reference (see `reference`) runs first, one matrix at a time, so no two models are ever held. It
computes in float32 whatever the fused path computes in. Of INT8 and INT4 weights it takes the
values that they stand for: what is judged is our computing. What quantising itself costs is another
question, which `gptjet quantize` answers in perplexity; where it is done on loading, it is bounded
here too. So it is with a KV cache of less than what is computed in: first the computing, then the
cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from gptjet.kernels.batch import BLOCK_SIZE, BlockGeometry
from gptjet.service.backends import parity
from gptjet.service.backends.fused.kv_cache import allocate_kv_cache
from gptjet.service.backends.fused.runner import ModelRunner, Segment
from gptjet.service.engine.backend import ParityStatus, ParityVerdict

if TYPE_CHECKING:
    from gptjet.service.backends.fused.model import Computer

# Of the probes, on a CPU: some seconds of two slow cores. A GPU runs all of them.
_CPU_FLOP = 2e11
_FLOAT_DTYPES = ("float32", "float16", "bfloat16")


def choose_probes(
    geometry: BlockGeometry, num_parameters: int, device: torch.device
) -> tuple[tuple[int, ...], ...]:
    """Probe prompts; of a large model on a CPU only the shorter ones, by their arithmetic."""
    max_tokens = None if device.type == "cuda" else int(_CPU_FLOP / (2 * num_parameters))
    return parity.probe_prompts(geometry.vocab_size, geometry.max_context, max_tokens)


# The CPU kernels multiply INT8 and INT4 weights by activations of 16 bits, half a unit of which is
# 2^-16 of the largest in a row; a typical activation is a fraction of that.
_INTEGER_ROUNDOFF = 2.0**-15
# Against the weights before they were quantised. Rounding to nearest moved the logits of the
# embedded checkpoint by 0.015 (INT8) and 0.22 (INT4), of random ones by up to twice that; at 1.0
# they would say nothing of the model any more. A finer bound is for a file's own recipe.
_QUANTIZING_LIMIT = {"int8": 0.25, "int4": 1.0}

# The same of an INT8 KV cache, against a float one. It moved the logits of the embedded checkpoint
# by 0.009 (and its perplexity by 0.003 %), of random ones of 2 to 8 layers by 0.011 to 0.018; the
# scales of another token, by 0.5 to 0.7.
_INT8_KV_LIMIT = 0.1


def judge(
    runner: ModelRunner,
    references: Mapping[str, list[parity.Trace]],
    weight_type: str,
    compute_dtype: torch.dtype,
) -> ParityVerdict:
    """Hold the fused path to every reference; the verdict on the served weights has the last word.

    Its limit is what rounding explains in the dtype that is computed in (parity.tolerance); for
    INT8 and INT4 on a CPU, by the same formula, what 16-bit activations explain. Greedy choices
    must be equal but for ties within twice the limit.
    """
    layers = runner.geometry.num_layers
    limit = _limit(weight_type, compute_dtype, layers)
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


def _limit(weight_type: str, compute_dtype: torch.dtype, layers: int) -> float:
    if weight_type in _FLOAT_DTYPES or compute_dtype is not torch.float32:
        return parity.tolerance(compute_dtype, layers)
    return parity.rounding_tolerance(_INTEGER_ROUNDOFF, layers)


def judge_kv_cache(
    runner: ModelRunner,
    references: Mapping[str, list[parity.Trace]],
    weight_type: str,
    compute_dtype: torch.dtype,
) -> ParityVerdict:
    """Hold a path that `judge` has passed, on the KV cache of another dtype that it will have.

    A float one may add the roundings of its own dtype; INT8 is bounded as quantised weights are.
    """
    dtype, layers = runner.kv_cache.dtype, runner.geometry.num_layers
    if dtype == torch.int8:
        limit = _INT8_KV_LIMIT
    else:
        limit = max(_limit(weight_type, compute_dtype, layers), parity.tolerance(dtype, layers))
    verdict = parity.compare(FusedStepper(runner), references["weights"], limit)
    name = str(dtype).removeprefix("torch.")
    return replace(verdict, detail=f"with the KV cache in {name}: {verdict.detail}")


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
    *,
    kv_dtype: torch.dtype,
    **limits: Any,
) -> ModelRunner:
    """A runner with a KV cache just large enough for the probes."""
    longest = max(len(prompt) for prompt in prompts) + parity.probe_steps(geometry.max_context)
    cache = allocate_kv_cache(geometry, -(-longest // BLOCK_SIZE), dtype=kv_dtype, device=device)
    return ModelRunner(computer.model, geometry, cache, **limits)
