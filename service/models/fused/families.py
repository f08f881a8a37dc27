"""Whose checkpoints the fused engine computes: GPT-J's block, by whatever name it is stored.

GPT-JT, Pygmalion, Dolly v1 and GPT4All-J are GPTJForCausalLM with other vocabularies and dtypes.
CodeGen is the same block with q, v and k in one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gptjet.kernels.batch import BlockGeometry
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.checkpoint import Checkpoint

PREFIX = "transformer."
EMBEDDING = "transformer.wte.weight"
LM_HEAD = "lm_head.weight"
LM_HEAD_BIAS = "lm_head.bias"
NORM_WEIGHT = "transformer.ln_f.weight"
NORM_BIAS = "transformer.ln_f.bias"

# CodeGen was trained on four TPU cores, and its qkv_proj still holds what each had, one after the
# other (mp_num in transformers' modeling_codegen).
CODEGEN_GROUPS = 4
# Both are GPT-2's tanh approximation.
_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")
# Fields that would make it another model, and the only value that is computed.
_FIXED_FIELDS: dict[str, Any] = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "rotary": True,
    "scale_attn_weights": True,
}

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Family:
    """One way of storing the block.

    projections  names of q, k and v, or of the one that holds all three, less "transformer.h.0."
    split        (tensors by those names, in that order) -> q, k, v, each [hidden, hidden]
    """

    class_name: str
    projections: tuple[str, ...]
    split: Callable[[list[torch.Tensor]], list[torch.Tensor]]


def _split_codegen(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of qkv_proj [3 * hidden, hidden]: each group holds its q, its v and its k, in that order."""
    (stored,) = tensors
    hidden = stored.shape[1]
    query, value, key = stored.view(CODEGEN_GROUPS, 3, -1, hidden).unbind(1)
    return [part.reshape(hidden, hidden) for part in (query, key, value)]


FAMILIES: dict[str, Family] = {
    "gptj": Family(
        "GPTJForCausalLM",
        ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"),
        list,
    ),
    "codegen": Family("CodeGenForCausalLM", ("attn.qkv_proj.weight",), _split_codegen),
}


def check_family(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint. Raises BackendLoadError where it is of none."""
    family = FAMILIES.get(checkpoint.model_type)
    if family is None or checkpoint.architecture not in ("", family.class_name):
        names = " and ".join(entry.class_name for entry in FAMILIES.values())
        raise BackendLoadError(
            f"{checkpoint.path}: {checkpoint.architecture or checkpoint.model_type} is not of the "
            f"GPT-J family: the fused engine computes {names}; use --backend huggingface"
        )
    return family


def block_geometry(checkpoint: Checkpoint, config: Any) -> BlockGeometry:
    """Sizes out of a transformers config of the family.

    Raises BackendLoadError naming the field that asks for another computation than this engine's.
    """
    where = checkpoint.path / "config.json"
    if config.activation_function not in _ACTIVATIONS:
        raise BackendLoadError(
            f"{where}: activation_function is {config.activation_function!r}; the fused engine "
            f"computes {' and '.join(_ACTIVATIONS)}: use --backend huggingface"
        )
    for name, value in _FIXED_FIELDS.items():
        stored = checkpoint.config.get(name, value)
        if stored != value:
            raise BackendLoadError(
                f"{where}: {name} is {stored!r}; the fused engine computes {value!r} only"
            )
    hidden, heads = int(config.n_embd), int(config.n_head)
    if config.model_type == "codegen" and heads % CODEGEN_GROUPS:
        raise BackendLoadError(
            f"{where}: n_head is {heads}; CodeGen keeps its heads in {CODEGEN_GROUPS} groups, so "
            f"it must be a multiple of that"
        )
    sizes = {
        "n_layer": int(config.n_layer),
        "n_inner": 4 * hidden if config.n_inner is None else int(config.n_inner),
        "vocab_size": int(config.vocab_size),
        "n_positions": int(config.n_positions),
    }
    for name, size in sizes.items():
        if size < 1:
            raise BackendLoadError(f"{where}: {name} is {size}, it must be 1 or more")
    if not config.layer_norm_epsilon > 0:
        raise BackendLoadError(
            f"{where}: layer_norm_epsilon is {config.layer_norm_epsilon}, it must be positive"
        )
    return BlockGeometry(
        num_layers=sizes["n_layer"],
        hidden_size=hidden,
        num_heads=heads,
        head_dim=hidden // heads,
        rotary_dim=int(config.rotary_dim),
        inner_size=sizes["n_inner"],
        vocab_size=sizes["vocab_size"],
        max_context=sizes["n_positions"],
        layer_norm_eps=float(config.layer_norm_epsilon),
    )


def head_shapes(geometry: BlockGeometry) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what stands outside the blocks."""
    vocab, hidden = geometry.vocab_size, geometry.hidden_size
    return {
        EMBEDDING: (vocab, hidden),
        NORM_WEIGHT: (hidden,),
        NORM_BIAS: (hidden,),
        LM_HEAD: (vocab, hidden),
        LM_HEAD_BIAS: (vocab,),
    }


def layer_shapes(family: Family, geometry: BlockGeometry, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one block's tensors."""
    hidden, inner = geometry.hidden_size, geometry.inner_size
    rows = 3 * hidden // len(family.projections)
    shapes: dict[str, tuple[int, ...]] = {
        "ln_1.weight": (hidden,),
        "ln_1.bias": (hidden,),
        **dict.fromkeys(family.projections, (rows, hidden)),
        "attn.out_proj.weight": (hidden, hidden),
        "mlp.fc_in.weight": (inner, hidden),
        "mlp.fc_in.bias": (inner,),
        "mlp.fc_out.weight": (hidden, inner),
        "mlp.fc_out.bias": (hidden,),
    }
    return {f"{PREFIX}h.{layer}.{name}": shape for name, shape in shapes.items()}


def tied(present: Iterable[str], is_tied: bool) -> dict[str, str]:
    """Which of embedding and lm_head is read under the other's name: {name: stored name}.

    As transformers ties them: both stored, both kept, whatever tie_word_embeddings says.
    """
    if not is_tied:
        return {}
    names = set(present)
    if LM_HEAD not in names:
        return {LM_HEAD: EMBEDDING}
    return {} if EMBEDDING in names else {EMBEDDING: LM_HEAD}
