"""Loading transformers' own model with little host memory, and without its chatter."""

from __future__ import annotations

import sys
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.architecture import Architecture, verify_architecture
from gptjet.service.models.checkpoint import Checkpoint, is_ignorable_buffer
from gptjet.service.models.messages import describe_mismatch, one_line
from gptjet.service.models.quiet import quiet_transformers


def load_causal_lm(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool = True,
    architecture: Architecture | None = None,
) -> PreTrainedModel:
    """transformers' model of `checkpoint` in eval mode on `device`, its weights as `dtype`.

    The model is built without memory and each tensor goes from the mapped file straight to its
    device (transformers' `device_map`, which is accelerate's), so the host never holds a second
    copy: on a GPU it holds a few tensors, and on a CPU in the file's own dtype not even one, for
    the weights are the mapped file, which must not be changed in place while it serves.

    Raises BackendLoadError; `architecture` saves verifying twice.
    """
    architecture = architecture or verify_architecture(checkpoint)
    auto: Any = AutoModelForCausalLM
    try:
        with quiet_transformers(show_progress=progress and sys.stderr.isatty()):
            model, report = auto.from_pretrained(
                checkpoint.path,
                config=architecture.config,
                dtype=dtype,
                device_map={"": device},
                use_safetensors=not checkpoint.is_pickle,
                weights_only=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except torch.OutOfMemoryError as error:
        raise BackendLoadError(
            f"{checkpoint.path} does not fit on {device}: {one_line(error)}"
        ) from error
    except MemoryError as error:
        raise BackendLoadError(f"{checkpoint.path} does not fit in host memory") from error
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise BackendLoadError(
            f"{checkpoint.path}: transformers could not load it: {one_line(error)}"
        ) from error
    _check_report(checkpoint, model, report)
    loaded: PreTrainedModel = model.eval()
    return loaded


def _check_report(checkpoint: Checkpoint, model: PreTrainedModel, report: dict[str, Any]) -> None:
    # transformers fills a missing tensor with random numbers and says so in a log. `report` is the
    # last word where names could not be compared beforehand: pickles and converted layouts.
    message = describe_mismatch(
        str(checkpoint.path),
        type(model).__name__,
        missing=report["missing_keys"],
        unexpected=[name for name in report["unexpected_keys"] if not is_ignorable_buffer(name)],
        misshapen=[str(entry[0]) for entry in report["mismatched_keys"]],
    )
    if message:
        raise BackendLoadError(message)
