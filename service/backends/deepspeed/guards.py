"""What must hold before DeepSpeed's kernels may run: they check nothing themselves.

Each check raises BackendLoadError in one line that names the limit, what was given, and a way out.
The limits come from the CUDA sources of DeepSpeed 0.19.8; the file is named beside each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gptjet.service.backends.device import dtype_name
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.geometry import context_length

USE_INSTEAD = "use --backend huggingface"

# Classes that DeepSpeed 0.19.8 has injection policies for and whose parity is in our tests.
FAMILIES = {"gptj": "GPTJForCausalLM", "gpt2": "GPT2LMHeadModel", "gpt_neo": "GPTNeoForCausalLM"}

_MIN_CAPABILITY = (6, 0)  # op_builder/transformer_inference.py: Pascal and newer
_FP16_PACK = 8  # transform.cu moves 16 bytes at a time
_MAX_HIDDEN = 8192  # transform.cu: one block of hidden / 8 threads, at most 1024
# gelu.cu computes the tanh form whatever the model says.
_TANH_GELU = frozenset({"gelu_new", "gelu_fast", "gelu_pytorch_tanh"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """What the kernels would run on.

    free_bytes   memory there now; called again where it may have changed
    is_stand_in  the kernels are a test's own, not CUDA's; no setting reaches this
    """

    device: torch.device
    dtype: torch.dtype
    name: str
    capability: tuple[int, int] | None
    free_bytes: Callable[[], int]
    is_stand_in: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class InjectedGeometry:
    """Sizes of a model that DeepSpeed's kernels can do. `rotary_dim` is 0 for learnt positions."""

    family: str
    layers: int
    heads: int
    hidden: int
    head_dim: int
    rotary_dim: int
    context: int
    vocab_size: int


def cuda_platform(device: torch.device, dtype: torch.dtype) -> Platform:
    """The GPU `device`, refused where it is none, too old, or the precision is not FP16."""
    if device.type != "cuda":
        raise BackendLoadError(
            f"the deepspeed backend runs on an NVIDIA GPU and the device is {device}: DeepSpeed's "
            "inference kernels exist for CUDA only; use --backend huggingface, or --backend fused"
        )
    platform = Platform(
        device=device,
        dtype=dtype,
        name=torch.cuda.get_device_name(device),
        capability=torch.cuda.get_device_capability(device),
        free_bytes=lambda: int(torch.cuda.mem_get_info(device)[0]),
    )
    check_platform(platform)
    return platform


def check_platform(platform: Platform) -> None:
    """Refuse FP32 (and all but FP16) on a GPU, and a card older than Pascal."""
    if platform.is_stand_in:
        return
    capability = platform.capability or (0, 0)
    if capability < _MIN_CAPABILITY:
        raise BackendLoadError(
            f"{platform.name} has compute capability {capability[0]}.{capability[1]}; DeepSpeed's "
            f"kernels need {_MIN_CAPABILITY[0]}.{_MIN_CAPABILITY[1]} (Pascal) or newer; "
            f"{USE_INSTEAD}"
        )
    if platform.dtype is torch.float32:
        raise BackendLoadError(
            "the deepspeed backend does not run in float32: DeepSpeed's FP32 rotary kernel "
            "overwrites x before it computes y from it and GPT-J's output is wrong; give --dtype "
            f"float16, or {USE_INSTEAD}"
        )
    if platform.dtype is not torch.float16:
        raise BackendLoadError(
            f"the deepspeed backend runs in float16, not {dtype_name(platform.dtype)}; give "
            f"--dtype float16, or {USE_INSTEAD}"
        )


def check_model(
    config: Any, *, max_context: int | None = None, tensor_parallel_size: int = 1
) -> InjectedGeometry:
    """Sizes of a model the kernels compute correctly, `context` being what is to be served.

    Raises BackendLoadError for a family without kernels and for every size or setting on which
    DeepSpeed's kernels are known to differ from transformers.
    """
    family = str(config.model_type)
    if family not in FAMILIES:
        raise BackendLoadError(
            f"DeepSpeed has no kernels for model_type {family!r} that were compared with "
            f"transformers (there are {', '.join(sorted(FAMILIES))}); {USE_INSTEAD}"
        )
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    width = hidden // heads
    rotary_dim = int(config.rotary_dim) if family == "gptj" else 0
    limit = context_length(config) or 0
    context = min(limit, max_context) if max_context else limit
    _refuse_unless(
        width % _FP16_PACK == 0,
        f"a head is {width} wide; the FP16 kernels move {_FP16_PACK} values at once, so it must be "
        f"a multiple of {_FP16_PACK}",
    )
    _refuse_unless(
        rotary_dim % _FP16_PACK == 0,
        f"rotary_dim is {rotary_dim}; the FP16 kernels turn {_FP16_PACK} values at once, so it "
        f"must be a multiple of {_FP16_PACK}",
    )
    _refuse_unless(
        hidden <= _MAX_HIDDEN * tensor_parallel_size,
        f"n_embd is {hidden}; the FP16 rotary kernel starts one thread per 8 values and a block "
        f"has 1024, so it must be at most {_MAX_HIDDEN} a GPU",
    )
    _refuse_unless(
        heads % tensor_parallel_size == 0,
        f"{heads} heads do not divide over {tensor_parallel_size} GPUs",
    )
    _check_mlp(config, family, hidden)
    _check_attention(config, family, context)
    return InjectedGeometry(
        family=family,
        layers=int(config.num_hidden_layers),
        heads=heads,
        hidden=hidden,
        head_dim=width,
        rotary_dim=rotary_dim,
        context=context,
        vocab_size=int(config.vocab_size),
    )


def _check_mlp(config: Any, family: str, hidden: int) -> None:
    name = "intermediate_size" if family == "gpt_neo" else "n_inner"
    inner = getattr(config, name, None) or 4 * hidden
    _refuse_unless(
        inner == 4 * hidden,
        f"{name} is {inner}; DeepSpeed lays its buffers out for 4 x {hidden} = {4 * hidden}",
    )
    activation = str(getattr(config, "activation_function", "gelu_new"))
    _refuse_unless(
        activation in _TANH_GELU,
        f"activation_function is {activation}; DeepSpeed computes the tanh form of GELU "
        f"({', '.join(sorted(_TANH_GELU))}) whatever the model says",
    )


def _check_attention(config: Any, family: str, context: int) -> None:
    if family == "gpt2":
        _refuse_unless(
            bool(config.scale_attn_weights), "scale_attn_weights is off; DeepSpeed always scales"
        )
        _refuse_unless(
            not config.scale_attn_by_inverse_layer_idx,
            "scale_attn_by_inverse_layer_idx is on; DeepSpeed reads it from the wrong "
            "configuration and leaves it off",
        )
        _refuse_unless(not getattr(config, "add_cross_attention", False), "it has cross-attention")
    if family == "gpt_neo" and "local" in config.attention_layers:
        window = int(config.window_size)
        # softmax.cu numbers the row of a decode step one too high, so the window loses its oldest
        # token as soon as it is full; up to window_size - 1 tokens nothing differs.
        _refuse_unless(
            context < window,
            f"its local attention sees {window} tokens and the context is {context}: DeepSpeed's "
            "decode step drops one of them once the window is full; --kv-cache-tokens "
            f"{window - 1} serves the part that is right",
        )


def _refuse_unless(condition: bool, reason: str) -> None:
    if not condition:
        raise BackendLoadError(
            f"DeepSpeed's kernels cannot run this model: {reason}; {USE_INSTEAD}"
        )
