"""The text a model is quantised against, and the activations it makes in every layer.

By default it is text that the checkpoint writes itself, at temperature 1 (as in "LLM-QAT:
Data-Free Quantization Aware Training", Liu et al. 2023): it needs no data, resembles what the model
was trained on, and is never what the result is judged by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from gptjet.kernels import reference
from gptjet.kernels.batch import BLOCK_SIZE, BlockGeometry, ForwardBatch
from gptjet.kernels.weights import HeadWeights, Weight
from gptjet.service.quantization.perplexity import Model

SEED = 20140530
_STREAMS = 32
_TOKENS_AT_ONCE = 2048


@torch.inference_mode()
def sample_sequences(
    model: Model,
    geometry: BlockGeometry,
    *,
    num_tokens: int,
    starts: Sequence[Sequence[int]],
    end_ids: Sequence[int],
    max_length: int,
    on_progress: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """At least `num_tokens` tokens in sequences that the model writes, the same every time.

    starts      beginnings, taken in turn; an empty one stands for a token drawn from the vocabulary
    end_ids     ids that end a sequence; they are kept as its last token
    max_length  of a sequence, at most the context
    """
    generator = torch.Generator().manual_seed(SEED)
    max_length = min(max_length, geometry.max_context)
    done: list[list[int]] = []
    total = 0
    while total < num_tokens:
        first = len(done)
        prompts = [list(starts[(first + i) % len(starts)]) for i in range(_STREAMS)]
        for prompt in prompts:
            if not prompt:
                drawn = torch.randint(geometry.vocab_size, (1,), generator=generator)
                prompt.append(int(drawn))
        for sequence in _write(model, geometry, prompts, end_ids, max_length, generator):
            done.append(sequence)
            total += len(sequence)
            on_progress(len(sequence))
    return done


def _write(
    model: Model,
    geometry: BlockGeometry,
    sequences: list[list[int]],
    end_ids: Sequence[int],
    max_length: int,
    generator: torch.Generator,
) -> Iterator[list[int]]:
    """Continue the sequences together, in place, and yield each when it ends."""
    width = -(-max_length // BLOCK_SIZE)
    layers, *rest = geometry.kv_block_shape
    cache = torch.empty(layers, rest[0], width * len(sequences), *rest[1:])
    tables = torch.arange(width * len(sequences), dtype=torch.int32).view(-1, width)
    running, computed = list(range(len(sequences))), [0] * len(sequences)
    while running:
        new = [sequences[row][computed[row] :] for row in running]
        counts = torch.tensor([len(ids) for ids in new])
        batch = ForwardBatch(
            token_ids=torch.tensor([i for ids in new for i in ids], dtype=torch.int32),
            positions=torch.cat(
                [
                    torch.arange(computed[row], len(sequences[row]), dtype=torch.int32)
                    for row in running
                ]
            ),
            sequence_index=torch.repeat_interleave(
                torch.tensor(running, dtype=torch.int32), counts
            ),
            block_tables=tables,
            logits_rows=(counts.cumsum(0) - 1).int(),
        )
        probabilities = torch.softmax(model.forward(batch, cache), dim=1)
        drawn = torch.multinomial(probabilities, 1, generator=generator).squeeze(1).tolist()
        still_running = []
        for row, token in zip(running, drawn, strict=True):
            computed[row] = len(sequences[row])
            sequences[row].append(token)
            if token in end_ids or len(sequences[row]) >= max_length:
                yield sequences[row]
            else:
                still_running.append(row)
        running = still_running


class Activations:
    """The residual stream of all calibration tokens, moved through the model a layer at a time.

    The tokens of sequences [S][L], with S * L * hidden float32 values in memory.
    """

    def __init__(
        self, geometry: BlockGeometry, head: HeadWeights, sequences: Sequence[Sequence[int]]
    ) -> None:
        self._geometry = geometry
        self._lengths = [len(sequence) for sequence in sequences]
        ids = torch.tensor([i for sequence in sequences for i in sequence])
        self._positions = torch.cat([torch.arange(n) for n in self._lengths])
        self._residual = head.embedding[ids].float()
        self._cos, self._sin = reference.rotary_tables(geometry.max_context, geometry.rotary_dim)
        self._scratch = reference.Scratch()
        self._inputs: torch.Tensor | None = None

    @torch.inference_mode()
    def normed(self, weight: torch.Tensor, bias: torch.Tensor) -> Iterator[torch.Tensor]:
        """Pieces [T, hidden] of what a LayerNorm hands on: the first pass's inputs."""
        for start, stop in self._pieces():
            yield reference.layer_norm(
                self._residual[start:stop], weight, bias, self._geometry.layer_norm_eps
            )

    @torch.inference_mode()
    def second_inputs(
        self, norm_weight: torch.Tensor, norm_bias: torch.Tensor, w_in: Weight
    ) -> Iterator[torch.Tensor]:
        """Pieces [T, heads * head_dim + inner] of the second pass's inputs, w_in being done."""
        for first, last, start, stop in self._whole_sequences():
            yield self._joined(first, last, start, stop, norm_weight, norm_bias, w_in)

    @torch.inference_mode()
    def advance(
        self, norm_weight: torch.Tensor, norm_bias: torch.Tensor, w_in: Weight, w_out: Weight
    ) -> None:
        """Add the block's output, as the finished weights compute it."""
        for first, last, start, stop in self._whole_sequences():
            joined = self._joined(first, last, start, stop, norm_weight, norm_bias, w_in)
            self._residual[start:stop] += reference.linear(joined, w_out, self._scratch)

    def _joined(
        self,
        first: int,
        last: int,
        start: int,
        stop: int,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        w_in: Weight,
    ) -> torch.Tensor:
        """[attention; gelu(inner)] of sequences first to last, which are tokens start to stop."""
        geometry = self._geometry
        heads, head_dim = geometry.num_heads, geometry.head_dim
        projected = reference.layer_norm_linear(
            self._residual[start:stop],
            norm_weight,
            norm_bias,
            geometry.layer_norm_eps,
            w_in,
            scratch=self._scratch,
        )
        width = heads * head_dim
        query, key, value, inner = torch.split(
            projected, [width, width, width, geometry.inner_size], dim=1
        )
        positions = self._positions[start:stop]
        cos, sin = self._cos[positions], self._sin[positions]
        query = reference.rotary(query.reshape(-1, heads, head_dim), cos, sin)
        key = reference.rotary(key.reshape(-1, heads, head_dim), cos, sin)
        lengths = self._lengths[first:last]
        attended = [
            torch.nn.functional.scaled_dot_product_attention(
                q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True
            ).transpose(0, 1)
            for q, k, v in zip(
                torch.split(query, lengths),
                torch.split(key, lengths),
                torch.split(value.reshape(-1, heads, head_dim), lengths),
                strict=True,
            )
        ]
        return torch.cat((torch.cat(attended).reshape(-1, width), reference.gelu(inner)), dim=1)

    def _pieces(self) -> Iterator[tuple[int, int]]:
        for start in range(0, len(self._residual), _TOKENS_AT_ONCE):
            yield start, min(start + _TOKENS_AT_ONCE, len(self._residual))

    def _whole_sequences(self) -> Iterator[tuple[int, int, int, int]]:
        """(first sequence, last, first token, last token) of pieces that cut no sequence."""
        first = start = stop = 0
        for index, length in enumerate(self._lengths):
            if stop > start and stop - start + length > _TOKENS_AT_ONCE:
                yield first, index, start, stop
                first, start = index, stop
            stop += length
        yield first, len(self._lengths), start, stop
