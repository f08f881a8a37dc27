"""Logits to tokens, batched: every sampling parameter, and one random number a token.

A row's token depends on its logits, its sequence's history, and (seed, sequence index, position):
never on the other rows of the batch. `logits` says in which order the parameters are applied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from gptjet.service.engine import logits as lg
from gptjet.service.engine.errors import EngineError
from gptjet.service.engine.philox import uniforms
from gptjet.service.engine.request import TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from gptjet.service.engine.request import Request, SamplingParams

_Number = TypeVar("_Number", int, float)

# Rows are worked on a few at a time: on a CPU so that the [rows, V] int64 intermediates stay in its
# cache (five times as fast at 32 rows of 50400), elsewhere so that they stay small.
_CPU_PASS_ELEMENTS = 2**18
_DEVICE_PASS_ROWS = 64


class NonFiniteLogitsError(EngineError):
    """Some rows of the logits hold NaN or +inf, or no finite value at all; `rows` names them.

    No state has advanced: fail the sequences of these rows and sample the others again.
    """

    def __init__(self, rows: tuple[int, ...]) -> None:
        listed = ", ".join(map(str, rows))
        super().__init__(f"the model returned logits that are not finite in row {listed}")
        self.rows = rows


@dataclass(slots=True, eq=False)
class SamplingState:
    """What the sampler remembers of one sequence. Made by `Sampler.new_state`.

    plain  the likeliest token is all it takes, from the first token to the last
    """

    params: SamplingParams
    prompt_token_ids: tuple[int, ...]
    seed: int
    index: int
    processors: lg.LogitProcessors
    plain: bool = False

    @property
    def needs_host(self) -> bool:
        """The next token depends on more than its logits, temperature, top_k, top_p and min_p."""
        params = self.params
        return params.logprobs is not None or params.typical_p != 1.0 or self.processors.active

    def observe(self, token_id: int) -> None:
        """Advance by a token that was chosen elsewhere, from the same numbers."""
        self.processors.observe(token_id)

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled so far, which is the position of the next one in the random stream."""
        return self.processors.num_output


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One step's result, in the order of the batch. A logprob is None where none was asked for."""

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]


class Sampler:
    """Chooses the next token of every sequence in a batch.

    vocab_size     columns of the model's logits
    eos_token_ids  ids that end a sequence unless it ignores them
    max_token_id   largest id that may be sampled, for a model with more columns than its tokenizer
                   has ids (GPT-J: 50400 and 50257); None allows every column, as transformers does
    """

    def __init__(
        self, vocab_size: int, eos_token_ids: tuple[int, ...] = (), max_token_id: int | None = None
    ) -> None:
        if not 0 < vocab_size <= lg.MAX_VOCAB_SIZE:
            raise ValueError(f"vocab_size must be 1 to {lg.MAX_VOCAB_SIZE}, got {vocab_size}")
        if max_token_id is not None and not 0 <= max_token_id < vocab_size:
            raise ValueError(f"max_token_id must be 0 to {vocab_size - 1}, got {max_token_id}")
        self._vocab_size = vocab_size
        self._num_usable = vocab_size if max_token_id is None else max_token_id + 1
        self._eos_token_ids = eos_token_ids

    def new_state(self, request: Request, index: int) -> SamplingState:
        """State of the `index`-th continuation of a request, before its first token."""
        params = request.sampling_params
        eos = () if params.ignore_eos else self._eos_token_ids
        processors = lg.LogitProcessors(
            params, request.prompt_token_ids, (*eos, *params.stop_token_ids), self._num_usable
        )
        # A processor that is not active before the first token never is.
        plain = params.is_greedy and params.logprobs is None and not processors.active
        return SamplingState(
            params, request.prompt_token_ids, request.seed, index, processors, plain
        )

    def sample(self, logits: torch.Tensor, states: Seq[SamplingState]) -> SampledTokens:
        """Choose a token a row and advance every state by it. logits: [B, V] float32, not changed.

        -inf entries are masks and legal. Raises NonFiniteLogitsError, with no state advanced, when
        a row has NaN, +inf or nothing but -inf.
        """
        if logits.shape != (len(states), self._vocab_size):
            raise ValueError(
                f"logits must be [{len(states)}, {self._vocab_size}], got {list(logits.shape)}"
            )
        if not states:
            return SampledTokens([], [])
        logits = logits.detach().to(torch.float32)
        logprobs: list[TokenLogprob | None]
        if self._is_plain_step(logits, states):
            token_ids, logprobs = _plain_argmax(logits), [None] * len(states)
        else:
            chosen = self._choose(logits[:, : self._num_usable], states)
            token_ids = self._read_back(chosen, logits)
            logprobs = _logprobs(logits, chosen, states)
        for state, token_id in zip(states, token_ids, strict=True):
            state.processors.observe(token_id)
        return SampledTokens(token_ids, logprobs)

    def choose(
        self, logits: torch.Tensor, states: Seq[SamplingState], positions: Seq[int]
    ) -> list[int]:
        """The id a row that `sample` would choose of a state that has generated `positions` tokens.

        No state is advanced; -1 for a row that is not usable. For states that do not need the host:
        what a backend that samples computes, and how one does that has logits on the CPU.
        """
        scores = logits[:, : self._num_usable]
        usable = ~_unusable(logits)
        chosen = _argmax(scores.nan_to_num(nan=0.0))
        for row, state in enumerate(states):
            if not state.params.is_greedy and bool(usable[row]):
                chosen[row] = _draw_pass(scores[row : row + 1], [state], [positions[row]])[0]
        return [int(token) if good else -1 for token, good in zip(chosen, usable, strict=True)]

    def _is_plain_step(self, logits: torch.Tensor, states: Seq[SamplingState]) -> bool:
        return (
            self._num_usable == self._vocab_size
            and logits.device.type == "cpu"
            and all(state.plain for state in states)
        )

    def prompt_logprobs(
        self,
        prompt_logits: torch.Tensor,
        state: SamplingState,
        start: int = 0,
        end: int | None = None,
    ) -> tuple[TokenLogprob, ...]:
        """Log-probabilities of prompt tokens from the logits of tokens [start, end) of L.

        prompt_logits: [N, V] float32, row i being the distribution of prompt token start + i + 1;
        N is end - start, and one less where `end` is L (or None). One entry a row, and before them
        that of the first token, which has none, where `start` is 0.
        Raises NonFiniteLogitsError with the rows of `prompt_logits` that are not usable.
        """
        token_ids = state.prompt_token_ids[start + 1 : None if end is None else end + 1]
        if prompt_logits.shape != (len(token_ids), self._vocab_size):
            raise ValueError(
                f"prompt_logits must be [{len(token_ids)}, {self._vocab_size}], "
                f"got {list(prompt_logits.shape)}"
            )
        entries = [] if start else [TokenLogprob(state.prompt_token_ids[0], None)]
        num_top = state.params.logprobs or 0
        _raise_for(_unusable(prompt_logits).tolist())
        for rows in _passes(prompt_logits):
            part = prompt_logits[rows].detach().to(torch.float32)
            ids = torch.tensor(token_ids[rows], device=part.device)
            entries += _token_logprobs(part, ids, [num_top] * len(part))
        return tuple(entries)

    def _choose(self, scores: torch.Tensor, states: Seq[SamplingState]) -> torch.Tensor:
        """Ids [B] for scores [B, V]. The all-greedy batch without processors is one argmax."""
        if any(state.processors.active for state in states):
            scores = scores.clone(memory_format=torch.contiguous_format)
            lg.process_logits(scores, [state.processors for state in states])
        drawn = [row for row, state in enumerate(states) if not state.params.is_greedy]
        if len(drawn) == len(states):
            return _draw(scores, states)
        chosen = _argmax(scores)
        if drawn:
            rows = torch.tensor(drawn, device=scores.device)
            chosen[rows] = _draw(scores[rows], [states[row] for row in drawn])
        return chosen

    def _read_back(self, chosen: torch.Tensor, logits: torch.Tensor) -> list[int]:
        """The ids and the check of the logits, in the one transfer of the step."""
        unusable = _unusable(logits)
        if self._num_usable < self._vocab_size:
            unusable |= logits[:, : self._num_usable].amax(-1).isneginf()
        token_ids, flags = torch.stack([chosen, unusable.to(chosen.dtype)]).tolist()
        _raise_for(flags)
        result: list[int] = token_ids
        return result


def _draw(scores: torch.Tensor, states: Seq[SamplingState]) -> torch.Tensor:
    """Ids [B] drawn from scores [B, V]."""
    return torch.cat([_draw_pass(scores[rows], states[rows]) for rows in _passes(scores)])


def _draw_pass(
    scores: torch.Tensor, states: Seq[SamplingState], positions: Seq[int] | None = None
) -> torch.Tensor:
    """Ids [B] by the states' temperature, filters and random stream, there or at `positions`."""
    params = [state.params for state in states]
    weights = lg.to_weights(scores, [p.temperature for p in params])
    vocab = scores.shape[1]
    weights = _filter(
        weights, lg.keep_top_k, [p.top_k if p.top_k < vocab else 0 for p in params], 0
    )
    weights = _filter(weights, lg.keep_top_p, [p.top_p for p in params], 1)
    weights = _filter(weights, lg.keep_min_p, [p.min_p for p in params], 0)
    weights = _filter(weights, lg.keep_typical_p, [p.typical_p for p in params], 1)
    uniform = uniforms(
        [state.seed for state in states],
        [state.index for state in states],
        [state.num_output_tokens for state in states] if positions is None else positions,
    )
    return lg.draw(weights, uniform)


def _filter(
    weights: torch.Tensor,
    keep: Callable[[torch.Tensor, Seq[_Number]], torch.Tensor],
    limits: Seq[_Number],
    off: _Number,
) -> torch.Tensor:
    """Apply a filter to the rows whose limit is not `off`."""
    rows = [row for row, limit in enumerate(limits) if limit != off]
    if not rows:
        return weights
    if len(rows) == len(limits):
        return keep(weights, limits)
    where = torch.tensor(rows, device=weights.device)
    return weights.index_copy_(0, where, keep(weights[where], [limits[row] for row in rows]))


def _argmax(scores: torch.Tensor) -> torch.Tensor:
    """First index of the largest value, [B]. numpy's is ten times torch's on a CPU."""
    if scores.device.type == "cpu":
        return torch.from_numpy(np.asarray(scores.numpy().argmax(-1)))
    return scores.argmax(-1)


def _plain_argmax(logits: torch.Tensor) -> list[int]:
    """`_argmax` as a list, and the check of the logits without a second look at them.

    numpy's argmax takes NaN for the largest, so a row is usable if its largest value is finite.
    """
    values = logits.numpy()
    token_ids = values.argmax(-1)
    best = values[np.arange(len(values)), token_ids]
    _raise_for((~np.isfinite(best)).tolist())
    result: list[int] = token_ids.tolist()
    return result


def _unusable(logits: torch.Tensor) -> torch.Tensor:
    """Rows [B] bool with NaN, +inf or nothing but -inf; amax keeps NaN."""
    return ~logits.amax(-1).isfinite()


def _passes(rows: torch.Tensor) -> list[slice]:
    """The slices of rows [B, V] to work on one after the other."""
    count, vocab = rows.shape
    on_cpu = rows.device.type == "cpu"
    size = max(1, _CPU_PASS_ELEMENTS // vocab) if on_cpu else _DEVICE_PASS_ROWS
    return [slice(start, start + size) for start in range(0, count, size)]


def _raise_for(flags: Seq[int]) -> None:
    rows = tuple(row for row, flag in enumerate(flags) if flag)
    if rows:
        raise NonFiniteLogitsError(rows)


def _logprobs(
    logits: torch.Tensor, chosen: torch.Tensor, states: Seq[SamplingState]
) -> list[TokenLogprob | None]:
    """Log-probabilities of the chosen ids, where a row's parameters ask for them."""
    result: list[TokenLogprob | None] = [None] * len(states)
    asked = {
        row: s.params.logprobs for row, s in enumerate(states) if s.params.logprobs is not None
    }
    if asked:
        rows = torch.tensor(list(asked), device=logits.device)
        logits, chosen, num_top = logits[rows], chosen[rows], list(asked.values())
        entries: list[TokenLogprob] = []
        for part in _passes(logits):
            entries += _token_logprobs(logits[part], chosen[part], num_top[part])
        for row, entry in zip(asked, entries, strict=True):
            result[row] = entry
    return result


def _token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: Seq[int]
) -> list[TokenLogprob]:
    """One entry a row: the id's log-probability and those of the row's `num_top` likeliest ids.

    logits: [B, V] float32, the model's own; token_ids: [B]. Equally likely ids: the lowest first.
    """
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1).tolist()
    top_ids = _top_ids(logits, max(num_top))
    top_values = logprobs.gather(1, top_ids).tolist()
    return [
        TokenLogprob(token_id, logprob, tuple(zip(ids[:n], values[:n], strict=True)))
        for token_id, logprob, ids, values, n in zip(
            token_ids.tolist(), own, top_ids.tolist(), top_values, num_top, strict=True
        )
    ]


def _top_ids(logits: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of each row, ties by lowest id: [B, k].

    `topk` leaves the order of ties open, so the id goes into a key below the value's own bits:
    those of a float32 order like an integer, once all but the sign of a negative one are flipped.
    """
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    tie_break = torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    return ((ordered.to(torch.int64) << 32) | tie_break).topk(k, dim=-1).indices
