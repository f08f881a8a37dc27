"""From a checkpoint to a served, proven `deepspeed` backend, or to a clear refusal."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
from typing import TYPE_CHECKING

import torch

from gptjet.service.backends import huggingface, parity
from gptjet.service.backends.deepspeed import guards, memory_plan, op_build
from gptjet.service.backends.deepspeed.backend import DeepSpeedBackend, InjectedStepper
from gptjet.service.backends.deepspeed.injected_model import InjectedModel
from gptjet.service.backends.deepspeed.injection import inject
from gptjet.service.backends.deepspeed.runtime import import_deepspeed
from gptjet.service.backends.deepspeed.tensor_parallel import (
    Ranks,
    follow,
    ranks_from_environment,
)
from gptjet.service.backends.device import choose_device, choose_dtype, dtype_name
from gptjet.service.backends.factory import LoadedModel
from gptjet.service.engine.backend import Backend, BackendSpec, ParityStatus, ParityVerdict
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.architecture import Architecture, verify_architecture
from gptjet.service.models.checkpoint import Checkpoint, resolve_checkpoint
from gptjet.service.models.geometry import eos_token_ids
from gptjet.service.models.tokenizer import load_tokenizer
from gptjet.service.models.transformers_loader import load_causal_lm

if TYPE_CHECKING:
    from gptjet.service.backends.deepspeed.guards import InjectedGeometry, Platform
    from gptjet.service.backends.factory import LoadOptions

logger = logging.getLogger(__name__)

_BLOCK_SIZE = 16
_VERSIONS = ("deepspeed", "torch", "transformers")


def load(options: LoadOptions, *, platform: Platform | None = None) -> LoadedModel:
    """Check, load, inject and prove `options.model`.

    `platform` stands for the GPU in tests; no setting reaches it. Where the injected model is not
    what transformers computes, the checkpoint is loaded again into the `huggingface` backend, which
    then carries the failed verdict; with `options.strict_parity` that is a BackendLoadError, as is
    everything else that stands in the way.
    """
    ranks = ranks_from_environment()
    if platform is None:
        platform = _choose_platform(options, ranks)
    import_deepspeed(platform.device)
    if not platform.is_stand_in:
        op_build.check_loadable()
    checkpoint = resolve_checkpoint(
        options.model,
        allow_pickle=options.allow_pickle,
        local_files_only=options.local_files_only,
    )
    architecture = verify_architecture(checkpoint)
    geometry = guards.check_model(
        architecture.config, max_context=options.kv_cache_tokens, tensor_parallel_size=ranks.size
    )
    tokenizer = load_tokenizer(checkpoint.path, local_files_only=True)
    if tokenizer.vocab_size > geometry.vocab_size:
        raise BackendLoadError(
            f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size} ids and the model "
            f"{geometry.vocab_size}: they do not belong together"
        )
    plan = memory_plan.plan_memory(
        geometry, platform, architecture.num_parameters, tensor_parallel_size=ranks.size
    )
    memory_plan.check_memory(plan, platform)
    logger.info("memory plan for %s: %s", platform.name, plan)
    backend = _load_and_prove(checkpoint, architecture, geometry, platform, options, ranks)
    return LoadedModel(backend, tokenizer)


def prove_and_inject(
    model: torch.nn.Module,
    geometry: InjectedGeometry,
    platform: Platform,
    ranks: Ranks | None = None,
) -> tuple[InjectedModel, ParityVerdict]:
    """Record what transformers computes, inject in place, and compare.

    On the followers of a tensor-parallel model this returns, with no verdict, once rank 0 has
    closed the model: they live in here.
    """
    here = ranks or Ranks()
    reference: list[parity.Trace] = []
    if here.is_leader:
        prompts = parity.probe_prompts(geometry.vocab_size, geometry.context)
        reference = parity.record_reference(
            parity.TransformersStepper(model), prompts, geometry.context
        )
        _free_cached_memory(platform.device)

    def check_batch(batch_size: int, held_batch: int) -> None:
        memory_plan.check_batch_fits(
            geometry, platform, batch_size, held_batch=held_batch, tensor_parallel_size=here.size
        )

    injected = inject(
        model,
        dtype=platform.dtype,
        max_context=geometry.context,
        ranks=here,
        check_batch=check_batch if here.is_leader else None,
    )
    # DeepSpeed takes its workspace with cudaMalloc, which cannot use what PyTorch holds for itself
    _free_cached_memory(platform.device)
    if not here.is_leader:
        follow(injected, injected.announcements)
        return injected, ParityVerdict()
    verdict = parity.compare(
        InjectedStepper(injected), reference, parity.tolerance(platform.dtype, geometry.layers)
    )
    return injected, dataclasses.replace(
        verdict, detail=f"{verdict.detail}; {parity.versions(*_VERSIONS)}; {platform.name}"
    )


class FollowerDoneError(Exception):
    """Rank 0 closed the model that this rank was a part of: there is nothing to serve here."""


def follow_leader(options: LoadOptions, *, platform: Platform | None = None) -> None:
    """The whole life of a rank other than 0: load, inject, repeat rank 0's steps, return.

    Raises BackendLoadError as `load` does.
    """
    with contextlib.suppress(FollowerDoneError):
        load(options, platform=platform)


def _choose_platform(options: LoadOptions, ranks: Ranks) -> Platform:
    name = f"cuda:{ranks.local_rank}" if ranks.size > 1 else options.device
    device = choose_device(name)
    dtype = choose_dtype(options.dtype, device) if device.type == "cuda" else torch.float16
    if device.type == "cuda":
        torch.cuda.set_device(device)  # DeepSpeed's kernels run on the current device
    return guards.cuda_platform(device, dtype)


def _load_and_prove(
    checkpoint: Checkpoint,
    architecture: Architecture,
    geometry: InjectedGeometry,
    platform: Platform,
    options: LoadOptions,
    ranks: Ranks,
) -> Backend:
    model = load_causal_lm(
        checkpoint,
        device=platform.device,
        dtype=platform.dtype,
        progress=options.progress,
        architecture=architecture,
    )
    injected, verdict = prove_and_inject(model, geometry, platform, ranks)
    del model
    if not ranks.is_leader:
        raise FollowerDoneError
    if verdict.status is ParityStatus.PASSED:
        logger.info("parity with transformers passed: %s", verdict.detail)
        spec = BackendSpec(
            name="deepspeed",
            model_name=checkpoint.name,
            architecture=architecture.class_name,
            num_parameters=architecture.num_parameters,
            device=str(platform.device) + (f" and {ranks.size - 1} more" if ranks.size > 1 else ""),
            dtype=dtype_name(platform.dtype),
            vocab_size=injected.vocab_size,
            max_context=geometry.context,
            max_sequences=1,
            max_batch_size=1,
            num_kv_blocks=-(-geometry.context // _BLOCK_SIZE),
            block_size=_BLOCK_SIZE,
            eos_token_ids=eos_token_ids(
                architecture.config, checkpoint.generation_config, injected.vocab_size
            ),
            parity=verdict,
        )
        return DeepSpeedBackend(injected, spec)
    # in place means used up: the injected weights go before transformers' own come back
    injected.close()
    del injected
    _free_cached_memory(platform.device)
    if options.strict_parity:
        raise parity.ParityFailedError(
            f"parity with transformers failed and --strict-parity is on: {verdict.detail}", verdict
        )
    logger.warning(
        "parity with transformers failed, serving with the huggingface backend instead: %s",
        verdict.detail,
    )
    return _fall_back(options, platform, verdict)


def _fall_back(options: LoadOptions, platform: Platform, verdict: ParityVerdict) -> Backend:
    chosen = dataclasses.replace(
        options, device=str(platform.device), dtype=dtype_name(platform.dtype)
    )
    backend = huggingface.load(chosen).backend
    detail = f"asked for deepspeed, serving huggingface: {verdict.detail}"
    parity_verdict = dataclasses.replace(verdict, detail=detail)
    return parity.WithParity(backend, dataclasses.replace(backend.spec, parity=parity_verdict))


def _free_cached_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
