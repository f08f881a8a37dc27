"""transformers' own forward pass with one block of the model in memory.

The reference of the parity gate where the model itself would not fit beside the fast one. The
blocks, masks, caches and positions are transformers' code; only the loop over the layers is turned
inside out: every probe goes through one block, whose weights are then given back, and on to the
next.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import accelerate
import torch
from transformers import AutoModel, DynamicCache, GPTJConfig

from gptjet.kernels.batch import BlockGeometry
from gptjet.kernels.reference import dequantize_rows
from gptjet.kernels.weights import DenseWeight, LayerWeights, Weight
from gptjet.service.models.checkpoint import Checkpoint
from gptjet.service.models.fused import families
from gptjet.service.models.fused.tensors import TensorFiles
from gptjet.service.models.fused.weights import FusedWeights
from gptjet.service.models.quiet import quiet_transformers

# Tokens of one pass, so that eager attention stays small.
_CHUNK = 256
# Rows of the vocabulary that are float32 at a time.
_HEAD_ROWS = 8192
_DEQUANTIZED_ROWS = 1024


class WeightSource(Protocol):
    """Weights by the names that transformers gives them, a piece at a time.

    config  of the model whose block computes
    """

    config: Any

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows [T, hidden] of the embedding."""
        ...

    def layers(self) -> Iterator[Mapping[str, torch.Tensor]]:
        """Each block's tensors by their names in it; valid until the next is asked for."""
        ...

    def final_norm(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias [hidden] of the last LayerNorm."""
        ...

    def head(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Weight [rows, hidden] and bias [rows] of lm_head, some rows at a time."""
        ...


@torch.inference_mode()
def last_logits(
    source: WeightSource,
    sequences: Sequence[Sequence[int]],
    wanted: Sequence[int],
    device: torch.device,
) -> list[torch.Tensor]:
    """Logits [wanted[i], V] float32 on the CPU, of the last positions of each sequence."""
    model = _one_block(source.config)
    buffers = {name: buffer.to(device) for name, buffer in model.named_buffers()}
    hidden = [_move(source.embed(torch.tensor(list(ids))), device) for ids in sequences]
    for layer in source.layers():
        weights = {f"h.0.{name}": _move(tensor, device) for name, tensor in layer.items()} | buffers
        hidden = [_through(model, weights, states) for states in hidden]
        # Both names, or the block would still be there while the next one is read.
        del weights, layer
    ends = torch.cat([states[-count:] for states, count in zip(hidden, wanted, strict=True)])
    norm_weight, norm_bias = (_move(tensor, device) for tensor in source.final_norm())
    ends = torch.nn.functional.layer_norm(
        ends, norm_weight.shape, norm_weight, norm_bias, source.config.layer_norm_epsilon
    )
    columns = [
        torch.nn.functional.linear(ends, _move(weight, device), _move(bias, device)).cpu()
        for weight, bias in source.head()
    ]
    return list(torch.split(torch.cat(columns, dim=1), list(wanted)))


class StoredWeights:
    """What a float checkpoint's files hold, in the shapes they are stored in."""

    def __init__(self, checkpoint: Checkpoint, config: Any) -> None:
        self.config = config
        self._files = TensorFiles(checkpoint, prefix=families.PREFIX, unprefixed=("lm_head.",))
        ties = families.tied(self._files.infos, bool(config.tie_word_embeddings))
        self._embedding = ties.get(families.EMBEDDING, families.EMBEDDING)
        self._head = ties.get(families.LM_HEAD, families.LM_HEAD)
        self._block = tuple(name for name, _ in _one_block(config).h[0].named_parameters())

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """See WeightSource."""
        with self._files.open([self._embedding]) as held:
            return held[self._embedding][token_ids].float()

    def layers(self) -> Iterator[Mapping[str, torch.Tensor]]:
        """See WeightSource."""
        for number in range(self.config.n_layer):
            prefix = f"{families.PREFIX}h.{number}."
            with self._files.open([prefix + name for name in self._block]) as held:
                yield {name: held[prefix + name] for name in self._block}

    def final_norm(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See WeightSource."""
        with self._files.open([families.NORM_WEIGHT, families.NORM_BIAS]) as held:
            return held[families.NORM_WEIGHT].float(), held[families.NORM_BIAS].float()

    def head(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See WeightSource."""
        with self._files.open([self._head, families.LM_HEAD_BIAS]) as held:
            weight, bias = held[self._head], held[families.LM_HEAD_BIAS]
            rows = (torch.split(tensor, _HEAD_ROWS) for tensor in (weight, bias))
            yield from zip(*rows, strict=True)


class FusedValues:
    """The values that weights in the fused layout stand for, as GPT-J's block names them."""

    def __init__(self, weights: FusedWeights) -> None:
        """Takes `weights`: nobody else can have its layers and embedding afterwards."""
        geometry = weights.geometry
        self.config = _gptj_config(geometry)
        self._weights = weights

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """See WeightSource. Once."""
        return self._weights.head.embedding[token_ids].float()

    def layers(self) -> Iterator[Mapping[str, torch.Tensor]]:
        """See WeightSource."""
        # Half a gigabyte of a wide model, and looked up by now.
        head = self._weights.head
        self._weights.head = replace(head, embedding=head.embedding.new_empty(0))
        del head
        for layer in self._weights.layers():
            yield _split_layer(layer, self._weights.geometry)

    def final_norm(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See WeightSource."""
        return self._weights.head.norm_weight, self._weights.head.norm_bias

    def head(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See WeightSource."""
        lm_head = self._weights.head.lm_head
        for start in range(0, lm_head.shape[0], _HEAD_ROWS):
            stop = min(start + _HEAD_ROWS, lm_head.shape[0])
            yield _values(lm_head, start, stop), _bias(lm_head)[start:stop]


def _split_layer(layer: LayerWeights, geometry: BlockGeometry) -> dict[str, torch.Tensor]:
    width = geometry.num_heads * geometry.head_dim
    query, key, value, fc_in = torch.split(
        _values(layer.w_in), [width, width, width, geometry.inner_size]
    )
    out_proj, fc_out = torch.split(_values(layer.w_out), [width, geometry.inner_size], dim=1)
    return {
        "ln_1.weight": layer.norm_weight,
        "ln_1.bias": layer.norm_bias,
        "attn.q_proj.weight": query,
        "attn.k_proj.weight": key,
        "attn.v_proj.weight": value,
        "attn.out_proj.weight": out_proj,
        "mlp.fc_in.weight": fc_in,
        "mlp.fc_in.bias": _bias(layer.w_in)[3 * width :],
        "mlp.fc_out.weight": fc_out,
        "mlp.fc_out.bias": _bias(layer.w_out),
    }


def _values(weight: Weight, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """What rows [start, stop) stand for, where they are; no second float32 copy on the way."""
    stop = weight.shape[0] if stop is None else stop
    values = torch.empty(stop - start, weight.shape[1], device=_device(weight))
    for first in range(0, len(values), _DEQUANTIZED_ROWS):
        rows = values[first : first + _DEQUANTIZED_ROWS]
        dequantize_rows(weight, start + first, start + first + len(rows), rows)
    return values


def _bias(weight: Weight) -> torch.Tensor:
    if weight.bias is None:
        return torch.zeros(weight.shape[0], device=_device(weight))
    return weight.bias


def _device(weight: Weight) -> torch.device:
    if isinstance(weight, DenseWeight):
        return weight.weight.device
    return weight.scale.device


def _gptj_config(geometry: BlockGeometry) -> GPTJConfig:
    return GPTJConfig(
        vocab_size=geometry.vocab_size,
        n_positions=geometry.max_context,
        n_embd=geometry.hidden_size,
        n_layer=geometry.num_layers,
        n_head=geometry.num_heads,
        n_inner=geometry.inner_size,
        rotary_dim=geometry.rotary_dim,
        layer_norm_epsilon=geometry.layer_norm_eps,
        activation_function="gelu_new",
        bos_token_id=None,
        eos_token_id=None,
    )


def _one_block(config: Any) -> Any:
    """transformers' model of the family with one block, no weights, and no last LayerNorm."""
    config = copy.deepcopy(config)
    config.n_layer = 1
    config._attn_implementation = "eager"
    with quiet_transformers(), accelerate.init_empty_weights(include_buffers=False):
        auto: Any = AutoModel
        model = auto.from_config(config, dtype=torch.float32)
    model.ln_f = torch.nn.Identity()
    del model.wte  # inputs are embedded already
    return model.eval()


def _through(model: Any, weights: Mapping[str, torch.Tensor], states: torch.Tensor) -> torch.Tensor:
    """States [T, hidden] through the one block with these weights."""
    cache = DynamicCache(config=model.config)
    parts = []
    for part in torch.split(states, _CHUNK):
        output = torch.func.functional_call(
            model,
            dict(weights),
            (),
            {"inputs_embeds": part[None], "past_key_values": cache, "use_cache": True},
        )
        parts.append(output.last_hidden_state[0])
    return torch.cat(parts)


def _move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device, torch.float32)
