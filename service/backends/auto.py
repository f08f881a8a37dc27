"""The backend for a model that nobody chose one for: the first that loads it and passes parity."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import TYPE_CHECKING

from gptjet.service.backends import parity
from gptjet.service.backends.device import choose_device, give_back
from gptjet.service.backends.factory import BACKENDS, LoadedModel
from gptjet.service.engine.backend import ParityStatus, ParityVerdict
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.checkpoint import resolve_checkpoint

if TYPE_CHECKING:
    from gptjet.service.backends.factory import LoadOptions

logger = logging.getLogger(__name__)


def load(options: LoadOptions) -> LoadedModel:
    """Load `options.model` with fused, deepspeed (on a GPU) or huggingface, in that order.

    The log and the parity verdict's detail say which, and what kept the ones before it. Under a
    launcher of several ranks there is only deepspeed, which alone shares a model between GPUs;
    where a KV cache of some dtype is asked for, there is only fused.
    Raises BackendLoadError where none serves it, with what each said; where `strict_parity` is on,
    also where one loads and differs from transformers.
    """
    device = choose_device(options.device)
    # What is wrong with the folder itself is said once, and not by every backend.
    resolve_checkpoint(
        options.model,
        allow_pickle=options.allow_pickle,
        local_files_only=options.local_files_only,
    )
    refusals: list[str] = []
    verdict = None
    for name in _candidates(device.type, options.kv_cache_dtype):
        try:
            # Strict, so that a failed one comes here and not to a fallback of its own.
            loaded = BACKENDS[name].load(dataclasses.replace(options, strict_parity=True))
        except parity.ParityFailedError as error:
            if options.strict_parity:
                raise
            verdict = error.verdict
            refusals.append(f"{name}: {error}")
        except BackendLoadError as error:
            refusals.append(f"{name}: {error}")
        else:
            return _tell(loaded, name, refusals, verdict)
        # Here and not above: until its `except` ends, an error holds what the loader held.
        give_back(device)
    if len(set(refusals)) == 1:
        raise BackendLoadError(refusals[0])
    raise BackendLoadError(f"no backend serves {options.model}: {'; '.join(refusals)}")


def _candidates(device_type: str, kv_cache_dtype: str) -> tuple[str, ...]:
    is_shared = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if kv_cache_dtype != "auto":
        if is_shared:
            raise BackendLoadError(
                f"kv_cache_dtype {kv_cache_dtype}: only the fused backend has a choice of it, and "
                f"only deepspeed shares a model between ranks"
            )
        return ("fused",)
    if is_shared:
        return ("deepspeed",)
    if device_type == "cpu":
        return ("fused", "huggingface")
    return ("fused", "deepspeed", "huggingface")


def _tell(
    loaded: LoadedModel, name: str, refusals: list[str], failed: ParityVerdict | None
) -> LoadedModel:
    """The model, with what was chosen and why in the log and in its verdict.

    Where a faster backend failed parity, the one that stands in carries that verdict.
    """
    reasons = "".join(f"; not {refusal}" for refusal in refusals)
    choice = f"auto chose {name}{reasons}"
    # The default fell short of what the machine was asked for: somebody should see why.
    logger.log(logging.INFO if not refusals else logging.WARNING, "%s", choice)
    own = loaded.backend.spec.parity
    verdict = failed if failed is not None and own.status is ParityStatus.NOT_RUN else own
    detail = "; ".join(part for part in (choice, own.detail) if part)
    spec = dataclasses.replace(
        loaded.backend.spec, parity=dataclasses.replace(verdict, detail=detail)
    )
    return LoadedModel(parity.WithParity(loaded.backend, spec), loaded.tokenizer)
