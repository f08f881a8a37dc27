"""From a checkpoint to a served, proven `fused` backend, or to a clear refusal."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gptjet.kernels.batch import BlockGeometry
from gptjet.kernels.gpu.model import GpuModel
from gptjet.service.backends import parity
from gptjet.service.backends.device import (
    choose_device,
    choose_weight_type,
    free_bytes,
    give_back,
)
from gptjet.service.backends.factory import LoadedModel
from gptjet.service.backends.fused import gpu, proof
from gptjet.service.backends.fused.backend import FusedBackend
from gptjet.service.backends.fused.groundwork import Groundwork, open_reference
from gptjet.service.backends.fused.kv_cache import allocate_kv_cache, num_kv_blocks
from gptjet.service.backends.fused.model import (
    WEIGHT_TYPES,
    Computer,
    build_model,
    check_kv_cache_dtype,
    check_weight_type,
    choose_kv_dtype,
)
from gptjet.service.backends.fused.runner import ModelRunner
from gptjet.service.backends.threads import choose_cpu_threads
from gptjet.service.engine.backend import BackendSpec, ParityStatus, ParityVerdict
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.checkpoint import Checkpoint, resolve_checkpoint
from gptjet.service.models.fused import families
from gptjet.service.models.fused.description import Description
from gptjet.service.models.fused.weights import load_fused_weights, quantized_weight_type
from gptjet.service.models.memory import format_bytes, trim_heap
from gptjet.service.models.tokenizer import TransformersTokenizer, load_tokenizer

if TYPE_CHECKING:
    from gptjet.service.backends.factory import LoadOptions

logger = logging.getLogger(__name__)

# Tokens of a prompt chunk: how long running streams wait for a new prompt, against how often it
# reads the weights. Two cores, INT8, width 4096: 3.6 ms a token at 16, 2.5 at 64, 2.3 at 128 (a
# chunk of 0.3 s, twelve decode steps) and no less at 256. A GPU needs more tokens to be busy.
_MAX_PREFILL_TOKENS = {"cpu": 128, "cuda": 1024}
_MAX_DRAFT_TOKENS = 16
# The rest is for the pages of files and for other processes.
_KV_SHARE_OF_FREE_MEMORY = {"cpu": 0.5, "cuda": 0.9}
# Bytes of a parameter, with its share of the scales.
_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 128}
_VERSIONS = ("torch", "transformers")


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is decided before a weight is read."""

    checkpoint: Checkpoint
    class_name: str
    description: Description
    weight_type: str
    device: torch.device
    num_threads: int
    num_parameters: int
    prompts: tuple[tuple[int, ...], ...]

    @property
    def geometry(self) -> BlockGeometry:
        """Sizes of the model."""
        return self.description.geometry


def load(options: LoadOptions) -> LoadedModel:
    """Check, load and prove `options.model`.

    Where what is computed is not what transformers computes, the checkpoint is loaded again into
    the `huggingface` backend, which then carries the failed verdict; with `options.strict_parity`
    that is a ParityFailedError, as everything else that stands in the way is a BackendLoadError.
    """
    device = choose_device(options.device)
    checkpoint = resolve_checkpoint(
        options.model,
        allow_pickle=options.allow_pickle,
        local_files_only=options.local_files_only,
    )
    families.check_family(checkpoint)
    weight_type = choose_weight_type(options.dtype, device, quantized_weight_type(checkpoint))
    check_weight_type(weight_type, device)
    num_threads = choose_cpu_threads(options.cpu_threads)
    with contextlib.closing(open_reference(checkpoint, device, num_threads)) as reference:
        groundwork = reference.describe()
        check_kv_cache_dtype(options.kv_cache_dtype, groundwork.description.geometry, device)
        plan = _plan(checkpoint, groundwork, weight_type, device, num_threads)
        references = reference.record(WEIGHT_TYPES[weight_type], plan.prompts)
    tokenizer = _open_tokenizer(plan, groundwork)
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(plan.num_threads)
    try:
        served = _load_and_prove(options, plan, references, threads)
    except BaseException:
        torch.set_num_threads(threads)
        raise
    if isinstance(served, ParityVerdict):
        torch.set_num_threads(threads)
        return _fall_back(options, plan, served)
    return LoadedModel(served, tokenizer)


def _load_and_prove(
    options: LoadOptions,
    plan: _Plan,
    references: dict[str, list[parity.Trace]],
    torch_threads: int,
) -> FusedBackend | ParityVerdict:
    """The backend, or the verdict it failed with, its memory given back."""
    weights = load_fused_weights(
        plan.checkpoint,
        WEIGHT_TYPES[plan.weight_type],
        progress=options.progress,
        description=plan.description,
    )
    computer = build_model(
        weights,
        plan.weight_type,
        plan.device,
        num_threads=plan.num_threads,
        max_rows=options.max_sequences,
    )
    num_parameters = weights.num_parameters
    del weights
    trim_heap()
    limits = _limits(options, plan, computer)
    try:
        kv_dtype = choose_kv_dtype(options.kv_cache_dtype, computer)
        verdict = _prove(plan, computer, kv_dtype, references, limits)
        if verdict.status is not ParityStatus.PASSED:
            computer.model.close()
            return verdict
        logger.info("parity with transformers passed: %s", verdict.detail)
        runner, spec = _serve(options, plan, computer, kv_dtype, verdict, limits)
        spec = dataclasses.replace(spec, num_parameters=num_parameters)
    except BaseException:
        computer.model.close()
        raise
    if computer.is_batch_invariant and plan.device.type == "cpu":
        # The kernels have threads of their own. PyTorch's would wait for work by spinning, on the
        # same cores, and what is left for them (sampling) is small.
        torch.set_num_threads(1)
    return FusedBackend(
        runner,
        spec,
        torch_threads=torch_threads,
        prepare=_graph_recorder(options, computer, runner),
    )


def _graph_recorder(
    options: LoadOptions, computer: Computer, runner: ModelRunner
) -> Callable[[], None] | None:
    """What records the decode step as CUDA graphs, where there is one to record."""
    model = computer.model
    if not (options.cuda_graphs and isinstance(model, GpuModel) and model.device.type == "cuda"):
        return None
    return functools.partial(gpu.record_graphs, model, runner.kv_cache, progress=options.progress)


def _plan(
    checkpoint: Checkpoint,
    groundwork: Groundwork,
    weight_type: str,
    device: torch.device,
    num_threads: int,
) -> _Plan:
    description = groundwork.description
    num_parameters = _count_parameters(description)
    needed = int(num_parameters * _BYTES[weight_type])
    free = free_bytes(device)
    if needed > free:
        raise BackendLoadError(
            f"{checkpoint.path} does not fit on {device}: its weights take {format_bytes(needed)} "
            f"in {weight_type}, {format_bytes(free)} are free"
        )
    parts = groundwork.tokenizer
    if parts is not None:
        _check_vocabulary(checkpoint, parts.vocab_size, description.geometry)
    return _Plan(
        checkpoint,
        families.check_family(checkpoint).class_name,
        description,
        weight_type,
        device,
        num_threads,
        num_parameters,
        proof.choose_probes(description.geometry, num_parameters, device),
    )


def _count_parameters(description: Description) -> int:
    """But for biases and norms; `load_fused_weights` counts those too."""
    geometry = description.geometry
    hidden, inner = geometry.hidden_size, geometry.inner_size
    block = 4 * hidden * hidden + 2 * hidden * inner
    matrices = 1 if description.is_tied else 2
    return geometry.num_layers * block + matrices * geometry.vocab_size * hidden


def _open_tokenizer(plan: _Plan, groundwork: Groundwork) -> TransformersTokenizer:
    if groundwork.tokenizer is not None:
        return TransformersTokenizer.from_parts(groundwork.tokenizer)
    tokenizer = load_tokenizer(plan.checkpoint.path, local_files_only=True)
    _check_vocabulary(plan.checkpoint, tokenizer.vocab_size, plan.geometry)
    return tokenizer


def _check_vocabulary(checkpoint: Checkpoint, vocab_size: int, geometry: BlockGeometry) -> None:
    if vocab_size > geometry.vocab_size:
        raise BackendLoadError(
            f"{checkpoint.path}: the tokenizer has {vocab_size} ids and the model "
            f"{geometry.vocab_size}: they do not belong together"
        )


def _limits(options: LoadOptions, plan: _Plan, computer: Computer) -> dict[str, int]:
    """Most tokens and segments of one pass."""
    if options.deterministic and not computer.is_batch_invariant:
        # A product of one row is computed the same way whatever else there is to compute.
        return {"max_tokens": 1, "max_segments": 1}
    return {
        "max_tokens": max(_MAX_PREFILL_TOKENS[plan.device.type], options.max_sequences),
        "max_segments": options.max_sequences,
    }


def _prove(
    plan: _Plan,
    computer: Computer,
    kv_dtype: torch.dtype,
    references: dict[str, list[parity.Trace]],
    limits: dict[str, int],
) -> ParityVerdict:
    def runner_with(dtype: torch.dtype) -> ModelRunner:
        return proof.probe_runner(
            computer, plan.geometry, plan.device, plan.prompts, kv_dtype=dtype, **limits
        )

    compute = computer.kv_dtype
    verdict = proof.judge(runner_with(compute), references, plan.weight_type, compute)
    if kv_dtype is not compute and verdict.status is ParityStatus.PASSED:
        stored = proof.judge_kv_cache(runner_with(kv_dtype), references, plan.weight_type, compute)
        verdict = dataclasses.replace(
            verdict, status=stored.status, detail=f"{verdict.detail}; {stored.detail}"
        )
    lengths = ", ".join(str(len(prompt)) for prompt in plan.prompts)
    return dataclasses.replace(
        verdict,
        detail=f"{verdict.detail}; prompts of {lengths} tokens; {computer.description}; "
        f"KV cache in {str(kv_dtype).removeprefix('torch.')}; {parity.versions(*_VERSIONS)}",
    )


def _serve(
    options: LoadOptions,
    plan: _Plan,
    computer: Computer,
    kv_dtype: torch.dtype,
    verdict: ParityVerdict,
    limits: dict[str, int],
) -> tuple[ModelRunner, BackendSpec]:
    """Give the KV cache what memory is left after the probes have run."""
    geometry, device = plan.geometry, plan.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
    max_prefill_tokens = _MAX_PREFILL_TOKENS[device.type]
    # A step's logits, and the sampler's copies of them.
    reserve = 3 * 4 * geometry.vocab_size * max(max_prefill_tokens, options.max_sequences)
    if isinstance(computer.model, GpuModel):
        reserve += computer.model.reserved_bytes(
            limits["max_tokens"], graphs_wanted=options.cuda_graphs
        )
    blocks = num_kv_blocks(
        geometry,
        kv_dtype,
        max_sequences=options.max_sequences,
        kv_cache_tokens=options.kv_cache_tokens,
        budget_bytes=int((free_bytes(device) - reserve) * _KV_SHARE_OF_FREE_MEMORY[device.type]),
    )
    cache = allocate_kv_cache(geometry, blocks, dtype=kv_dtype, device=device)
    spec = BackendSpec(
        name="fused",
        model_name=plan.checkpoint.name,
        architecture=plan.class_name,
        num_parameters=plan.num_parameters,
        device=str(device),
        dtype=plan.weight_type,
        vocab_size=geometry.vocab_size,
        max_context=geometry.max_context,
        max_sequences=options.max_sequences,
        max_batch_size=options.max_sequences,
        max_prefill_batch_size=options.max_sequences,
        num_kv_blocks=blocks,
        paged=True,
        max_prefill_tokens=max_prefill_tokens,
        max_draft_tokens=_MAX_DRAFT_TOKENS,
        # One segment a pass is for the sake of determinism: then a step is many passes.
        samples_on_device=isinstance(computer.model, GpuModel) and not options.deterministic,
        eos_token_ids=plan.description.eos_token_ids,
        parity=verdict,
    )
    return ModelRunner(computer.model, geometry, cache, **limits), spec


def _fall_back(options: LoadOptions, plan: _Plan, verdict: ParityVerdict) -> LoadedModel:
    give_back(plan.device)
    if options.strict_parity:
        raise parity.ParityFailedError(
            f"parity with transformers failed and --strict-parity is on: {verdict.detail}", verdict
        )
    if plan.checkpoint.is_quantized:
        raise parity.ParityFailedError(
            f"parity with transformers failed, and no other backend computes a quantised "
            f"checkpoint: {verdict.detail}",
            verdict,
        )
    logger.warning(
        "parity with transformers failed, serving with the huggingface backend instead: %s",
        verdict.detail,
    )
    is_float = plan.weight_type in ("float32", "float16", "bfloat16")
    chosen = dataclasses.replace(
        options,
        device=str(plan.device),
        dtype=plan.weight_type if is_float else "auto",
        kv_cache_dtype="auto",
    )
    from gptjet.service.backends import huggingface

    loaded = huggingface.load(chosen)
    detail = f"asked for fused, serving huggingface: {verdict.detail}"
    spec = dataclasses.replace(
        loaded.backend.spec, parity=dataclasses.replace(verdict, detail=detail)
    )
    return LoadedModel(parity.WithParity(loaded.backend, spec), loaded.tokenizer)
