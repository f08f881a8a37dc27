"""Whether a checkpoint is a causal language model that transformers knows, and has its tensors.

Everything here works on the configuration and on a model without memory (PyTorch's meta device), so
a wrong checkpoint of any size is refused in a second and before a weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.checkpoint import Checkpoint, is_ignorable_buffer
from gptjet.service.models.geometry import check_geometry
from gptjet.service.models.messages import describe_mismatch, one_line
from gptjet.service.models.quiet import quiet_transformers

_FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
# What transformers raises for fields that are missing, of a wrong type or out of their range.
_BAD_CONFIG = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ZeroDivisionError,
    StrictDataclassError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A checkpoint's model as transformers sees it.

    config          the PreTrainedConfig
    class_name      of the model ("GPTJForCausalLM")
    num_parameters  tied weights once
    """

    config: Any
    class_name: str
    num_parameters: int


def verify_architecture(checkpoint: Checkpoint) -> Architecture:
    """Build the configuration and compare every tensor with the model's own.

    Raises BackendLoadError in one line: not a causal LM, unknown to this transformers, quantised,
    or tensors missing, unexpected, misshapen or of a type that is no weight.
    """
    with quiet_transformers():
        config = build_config(checkpoint)
        model = _build_on_meta(checkpoint, config)
    if checkpoint.tensors:  # a pickle's tensors are known once it is loaded
        _check_tensors(checkpoint, model)
    return Architecture(
        config=config,
        class_name=type(model).__name__,
        num_parameters=sum(p.numel() for p in model.parameters()),
    )


def build_config(checkpoint: Checkpoint, *, allow_quantized: bool = False) -> Any:
    """transformers' configuration of a causal language model.

    `allow_quantized` takes what `gptjet quantize` wrote. Raises BackendLoadError in one line.
    """
    where = str(checkpoint.path / "config.json")
    model_type = checkpoint.model_type
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if causal is None:
        raise BackendLoadError(
            f"{where}: model_type {model_type!r} is not a causal language model that this "
            f"transformers knows"
        )
    names = {causal} if isinstance(causal, str) else set(causal)
    is_bidirectional = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if checkpoint.architecture and checkpoint.architecture not in names:
        raise BackendLoadError(
            f"{where}: architecture {checkpoint.architecture} is not a causal language model "
            f"(of model_type {model_type!r} that is {sorted(names)[0]})"
        )
    if is_bidirectional and not checkpoint.config.get("is_decoder"):
        raise BackendLoadError(
            f"{where}: model_type {model_type!r} without is_decoder attends in both directions and "
            f"is not a causal language model"
        )
    if not allow_quantized:
        _refuse_quantized(checkpoint, where)
    if checkpoint.config.get("rotary_dim", 0) is None:
        raise BackendLoadError(
            f"{where}: rotary_dim is null, which transformers does not run: write the width of a "
            f"head to turn all of it, or leave the field out for 64"
        )
    try:
        config = AutoConfig.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=False
        )
    except _BAD_CONFIG as error:
        raise BackendLoadError(f"{where}: {one_line(error)}") from error
    # A config may point transformers at another weight file than the ones that were checked.
    config.transformers_weights = None
    check_geometry(config, where)
    return config


def _refuse_quantized(checkpoint: Checkpoint, where: str) -> None:
    if not checkpoint.config.get("quantization_config"):
        return
    if checkpoint.is_quantized:
        raise BackendLoadError(
            f"{where}: the weights were quantised by `gptjet quantize`, which only the fused "
            f"backend computes: use --backend fused, or give the original checkpoint"
        )
    raise BackendLoadError(
        f"{where}: the weights are quantised (quantization_config): give the original ones"
    )


def _build_on_meta(checkpoint: Checkpoint, config: Any) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            auto: Any = AutoModelForCausalLM
            model: PreTrainedModel = auto.from_config(config, trust_remote_code=False)
    except (*_BAD_CONFIG, RuntimeError, ImportError) as error:
        raise BackendLoadError(
            f"{checkpoint.path}: transformers cannot build this {checkpoint.model_type} model: "
            f"{one_line(error)}"
        ) from error
    if getattr(model, "_is_stateful", False):
        raise BackendLoadError(
            f"{checkpoint.path}: {type(model).__name__} keeps a recurrent state instead of a "
            f"KV cache and is not served"
        )
    return model


def _check_tensors(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    expected = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    found: set[str] = set()
    unexpected: list[str] = []
    misshapen: list[str] = []
    for stored_name, info in checkpoint.tensors.items():
        name, converted = rename_source_key(
            stored_name, renamings, converters, model.base_model_prefix, expected
        )
        if name not in expected and stored_name in expected:
            name = stored_name
        if name not in expected:
            if converted is None and not is_ignorable_buffer(stored_name):
                unexpected.append(stored_name)
            continue
        found.add(name)
        if info.dtype not in _FLOAT_DTYPES:
            raise BackendLoadError(
                f"{checkpoint.path}: {stored_name} is stored as {info.dtype}; weights are served "
                f"from {', '.join(sorted(_FLOAT_DTYPES))}"
            )
        shape = tuple(expected[name].shape)
        if converted is None and info.shape != shape:
            misshapen.append(f"{stored_name} {list(info.shape)} (the model has {list(shape)})")
    missing = set() if converters else _without_tied(set(expected) - found, found, model)
    message = describe_mismatch(
        str(checkpoint.path),
        type(model).__name__,
        missing=missing,
        unexpected=unexpected,
        misshapen=misshapen,
    )
    if message:
        raise BackendLoadError(message)


def _without_tied(missing: set[str], found: set[str], model: PreTrainedModel) -> set[str]:
    """`missing` without the names that share the storage of one that was found."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    have = {target for target, source in tied.items() if source in found}
    have |= {source for target, source in tied.items() if target in found}
    return missing - have
