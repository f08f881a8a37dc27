"""transformers' own forward pass with one matrix of the model in memory.

The reference of the parity gate where the model itself would not fit beside the fast one. The
blocks, masks, caches and positions are transformers' code; only the loop over the layers is turned
inside out: every probe goes through one block before any goes on to the next, and each module of
the block has its weights for as long as it computes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

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
_DEQUANTIZED_ROWS = 256

Block: TypeAlias = Callable[[str], torch.Tensor]
"""A block's tensors by their names in it ("mlp.fc_in.weight"), made anew each time."""


class WeightSource(Protocol):
    """Weights by the names that transformers gives them, a piece at a time.

    config  of the model whose block computes
    """

    config: Any

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Rows [T, hidden] float32 of the embedding."""
        ...

    def blocks(self) -> Iterator[Block]:
        """Each block in order; valid until the next is asked for."""
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
    model = _OneBlock(source.config, device)
    groups = _groups([len(ids) for ids in sequences])
    states = [
        torch.nn.utils.rnn.pad_sequence(
            [_move(source.embed(sequences[index]), device) for index in group], batch_first=True
        )
        for group in groups
    ]
    for block in source.blocks():
        states = [model.compute(block, batch) for batch in states]
        del block  # it must go before the next one is read
    rows = {
        index: batch[row, len(sequences[index]) - wanted[index] : len(sequences[index])]
        for group, batch in zip(groups, states, strict=True)
        for row, index in enumerate(group)
    }
    ends = torch.cat([rows[index] for index in range(len(sequences))])
    norm_weight, norm_bias = (_move(tensor, device) for tensor in source.final_norm())
    ends = torch.nn.functional.layer_norm(
        ends, norm_weight.shape, norm_weight, norm_bias, source.config.layer_norm_epsilon
    )
    columns = [
        torch.nn.functional.linear(ends, _move(weight, device), _move(bias, device)).cpu()
        for weight, bias in source.head()
    ]
    return list(torch.split(torch.cat(columns, dim=1), list(wanted)))


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    """Which sequences go together: short ones, so that a matrix is made once for them all.

    What fills the shorter ones up comes after their tokens, and no token attends to what follows.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and (len(groups[-1]) + 1) * lengths[index] <= _CHUNK:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


class StoredWeights:
    """What a float checkpoint's files hold, in the shapes they are stored in."""

    def __init__(self, checkpoint: Checkpoint, config: Any) -> None:
        self.config = config
        self._files = TensorFiles(checkpoint, prefix=families.PREFIX, unprefixed=("lm_head.",))
        ties = families.tied(self._files.infos, bool(config.tie_word_embeddings))
        self._embedding = ties.get(families.EMBEDDING, families.EMBEDDING)
        self._head = ties.get(families.LM_HEAD, families.LM_HEAD)

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """See WeightSource."""
        with self._files.open([self._embedding]) as held:
            rows = [held.rows(self._embedding, token, token + 1) for token in token_ids]
        return torch.cat(rows).float()

    def blocks(self) -> Iterator[Block]:
        """See WeightSource."""
        for number in range(self.config.n_layer):
            prefix = f"{families.PREFIX}h.{number}."
            with self._files.open(n for n in self._files.infos if n.startswith(prefix)) as held:
                yield lambda name, prefix=prefix, held=held: held[prefix + name]  # type: ignore[misc]

    def final_norm(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See WeightSource."""
        with self._files.open([families.NORM_WEIGHT, families.NORM_BIAS]) as held:
            return held[families.NORM_WEIGHT].float(), held[families.NORM_BIAS].float()

    def head(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See WeightSource."""
        with self._files.open([self._head, families.LM_HEAD_BIAS]) as held:
            vocab = self._files.infos[self._head].shape[0]
            for start in range(0, vocab, _HEAD_ROWS):
                stop = min(start + _HEAD_ROWS, vocab)
                yield (
                    held.rows(self._head, start, stop),
                    held.rows(families.LM_HEAD_BIAS, start, stop),
                )


class FusedValues:
    """The values that weights in the fused layout stand for, as GPT-J's block names them."""

    def __init__(self, weights: FusedWeights) -> None:
        """Takes `weights`: nobody else can have its layers and embedding afterwards."""
        geometry = weights.geometry
        self.config = _gptj_config(geometry)
        self._weights = weights
        self._norm = weights.head.norm_weight, weights.head.norm_bias

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """See WeightSource. Before `blocks`."""
        return self._weights.head.embedding[list(token_ids)].float()

    def blocks(self) -> Iterator[Block]:
        """See WeightSource. Once."""
        # Half a gigabyte of a wide model: looked up by now, and lm_head is read again.
        del self._weights.head
        for layer in self._weights.layers():
            yield functools.partial(_part_of, layer, self._weights.geometry)
            del layer  # it must go before the next one is read

    def final_norm(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See WeightSource."""
        return self._norm

    def head(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See WeightSource."""
        lm_head = self._weights.read_lm_head()
        for start in range(0, lm_head.shape[0], _HEAD_ROWS):
            stop = min(start + _HEAD_ROWS, lm_head.shape[0])
            yield _values(lm_head, start, stop), _bias(lm_head)[start:stop]


def _part_of(layer: LayerWeights, geometry: BlockGeometry, name: str) -> torch.Tensor:
    """A tensor of GPT-J's block out of the two matrices that the fused layout joins."""
    width, inner = geometry.num_heads * geometry.head_dim, geometry.inner_size
    match name:
        case "ln_1.weight":
            return layer.norm_weight
        case "ln_1.bias":
            return layer.norm_bias
        case "attn.q_proj.weight":
            return _values(layer.w_in, 0, width)
        case "attn.k_proj.weight":
            return _values(layer.w_in, width, 2 * width)
        case "attn.v_proj.weight":
            return _values(layer.w_in, 2 * width, 3 * width)
        case "mlp.fc_in.weight":
            return _values(layer.w_in, 3 * width, 3 * width + inner)
        case "mlp.fc_in.bias":
            return _bias(layer.w_in)[3 * width :]
        case "attn.out_proj.weight":
            return _values(layer.w_out, columns=slice(0, width))
        case "mlp.fc_out.weight":
            return _values(layer.w_out, columns=slice(width, width + inner))
        case "mlp.fc_out.bias":
            return _bias(layer.w_out)
    raise KeyError(name)


def _values(
    weight: Weight, start: int = 0, stop: int | None = None, columns: slice = slice(None)
) -> torch.Tensor:
    """What some rows and columns stand for, with few float32 values beside them on the way."""
    stop = weight.shape[0] if stop is None else stop
    width = len(range(weight.shape[1])[columns])
    device = _device(weight)
    values = torch.empty(stop - start, width, device=device)
    buffer = torch.empty(min(_DEQUANTIZED_ROWS, stop - start), weight.shape[1], device=device)
    for first in range(0, len(values), _DEQUANTIZED_ROWS):
        rows = buffer[: len(values) - first]
        dequantize_rows(weight, start + first, start + first + len(rows), rows)
        values[first : first + len(rows)] = rows[:, columns]
    return values


def _bias(weight: Weight) -> torch.Tensor:
    if weight.bias is None:
        return torch.zeros(weight.shape[0], device=_device(weight))
    return weight.bias


def _device(weight: Weight) -> torch.device:
    return weight.weight.device if isinstance(weight, DenseWeight) else weight.scale.device


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


class _OneBlock:
    """transformers' model with one block, which is lent its weights, and without last LayerNorm."""

    def __init__(self, config: Any, device: torch.device) -> None:
        config = copy.deepcopy(config)
        config.n_layer = 1
        config._attn_implementation = "eager"
        with quiet_transformers(), accelerate.init_empty_weights(include_buffers=False):
            auto: Any = AutoModel
            model = auto.from_config(config, dtype=torch.float32)
        model.ln_f = torch.nn.Identity()
        del model.wte  # inputs are embedded already
        self._model = model.eval()
        self._device = device
        self._block: Block | None = None
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        for name, module in model.h[0].named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(functools.partial(self._lend, name))
                module.register_forward_hook(_take_back)

    def compute(self, block: Block, states: torch.Tensor) -> torch.Tensor:
        """States [B, T, hidden] through a block."""
        self._block = block
        cache = DynamicCache(config=self._model.config)
        parts = []
        for part in torch.split(states, _CHUNK, dim=1):
            output = self._model(inputs_embeds=part, past_key_values=cache, use_cache=True)
            parts.append(output.last_hidden_state)
        self._block = None
        return torch.cat(parts, dim=1)

    def _lend(self, path: str, module: torch.nn.Module, _: Any) -> None:
        assert self._block is not None
        for name in list(module._parameters):
            if module._parameters[name] is not None:
                tensor = _move(self._block(f"{path}.{name}"), self._device)
                module._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)


def _take_back(module: torch.nn.Module, _: Any, __: Any) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = torch.nn.Parameter(
                torch.empty(0, device="meta"), requires_grad=False
            )


def _move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device, torch.float32)
