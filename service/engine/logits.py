"""What changes the logits before a token is chosen: processors first, then filters.

The order is that of transformers 5 (`GenerationMixin._get_logits_processor`), with the two
penalties that transformers does not have where vLLM has them:

    processors  logit_bias, repetition_penalty, frequency_penalty and presence_penalty,
                min_new_tokens, no_repeat_ngram_size
    filters     temperature, top_k, top_p, min_p, typical_p

Processors are sparse: `LogitProcessors` keeps, for one sequence, which ids they touch, and learns
of each new token in O(1); nothing reads the history again. Filters are batched tensor functions.

Filters work on integer weights, exp((logit - max) / temperature) in units of 2**-44. Integer sums
are exact, whatever the order, the batch or the device, so a row's result cannot depend on the other
rows; and a cut at 2**-44 (6e-14) of the likeliest token loses nothing that could be noticed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from numpy.typing import NDArray

    from gptjet.service.engine.request import SamplingParams

WEIGHT_BITS = 44  # weights of 2**19 = 524288 ids still sum below 2**63
MAX_VOCAB_SIZE = 2 ** (63 - WEIGHT_BITS)


class TokenCounts:
    """Which ids a sequence has seen and how often it generated them: arrays that grow in place."""

    __slots__ = ("_counts", "_ids", "_slots")

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}
        self._ids = np.empty(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.float32)

    def add(self, token_id: int, count: int) -> None:
        """Note that `token_id` occurred; `count` is 1 in the output and 0 in the prompt."""
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token_id
        self._counts[slot] += count

    @property
    def ids(self) -> NDArray[np.int64]:
        """Distinct ids [U], in order of first appearance."""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """Occurrences in the output [U], 0 for an id of the prompt alone."""
        return self._counts[: len(self._slots)]


class NgramIndex:
    """For every n - 1 tokens in a row, the tokens that have followed them."""

    __slots__ = ("_followers", "_num_ids", "_size", "_tail")

    def __init__(self, size: int, num_ids: int) -> None:
        self._size = size
        self._num_ids = num_ids
        self._tail: tuple[int, ...] = ()
        self._followers: dict[tuple[int, ...], dict[int, None]] = {}

    def add(self, token_id: int) -> None:
        """Take the next token of the sequence."""
        if len(self._tail) == self._size - 1 and token_id < self._num_ids:
            self._followers.setdefault(self._tail, {})[token_id] = None
        self._tail = (*self._tail, token_id)[1 - self._size :] if self._size > 1 else ()

    @property
    def banned(self) -> list[int]:
        """Tokens that would now complete an n-gram that has occurred before."""
        if len(self._tail) < self._size - 1:
            return []
        return list(self._followers.get(self._tail, ()))


class LogitProcessors:
    """What the processors have to know of one sequence. Advance it with `observe`.

    stop_ids  ids that end the sequence; they may not be sampled before min_new_tokens
    num_ids   columns that can be sampled; ids from there on (a prompt may hold some) are left alone
    """

    __slots__ = ("bias", "bias_ids", "counts", "ngrams", "num_output", "params", "stop_ids")

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Seq[int],
        stop_ids: Seq[int],
        num_ids: int,
    ) -> None:
        self.params = params
        self.num_output = 0
        self.stop_ids = tuple(t for t in dict.fromkeys(stop_ids) if t < num_ids)
        bias = {t: value for t, value in params.logit_bias.items() if t < num_ids}
        self.bias_ids = np.fromiter(bias.keys(), dtype=np.int64)
        self.bias = np.fromiter(bias.values(), dtype=np.float32)
        repeats = params.repetition_penalty != 1.0
        outputs = params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
        self.counts = TokenCounts() if repeats or outputs else None
        if self.counts is not None and repeats:
            for token_id in dict.fromkeys(prompt_token_ids):
                if token_id < num_ids:
                    self.counts.add(token_id, 0)
        size = params.no_repeat_ngram_size
        self.ngrams = NgramIndex(size, num_ids) if size > 0 else None
        if self.ngrams is not None:
            for token_id in prompt_token_ids:
                self.ngrams.add(token_id)

    def observe(self, token_id: int) -> None:
        """Take the token that was sampled."""
        self.num_output += 1
        if self.counts is not None:
            self.counts.add(token_id, 1)
        if self.ngrams is not None:
            self.ngrams.add(token_id)

    @property
    def active(self) -> bool:
        """Whether the next token's logits are changed at all."""
        return (
            self.counts is not None
            or self.ngrams is not None
            or len(self.bias_ids) > 0
            or self.holds_back_stops
        )

    @property
    def holds_back_stops(self) -> bool:
        """min_new_tokens is not reached yet and there are ids it forbids."""
        return self.num_output < self.params.min_new_tokens and bool(self.stop_ids)


def process_logits(scores: torch.Tensor, rows: Seq[LogitProcessors]) -> None:
    """Apply every processor, in order and in place. scores: [B, V] float32.

    -inf entries stay -inf. A mask that would leave a row without a single token is not applied to
    that row: the n-gram ban gives way first, then min_new_tokens.
    """
    _add_bias(scores, rows)
    _penalise(scores, rows)
    _mask(scores, [row.stop_ids if row.holds_back_stops else () for row in rows])
    _mask(scores, [row.ngrams.banned if row.ngrams is not None else () for row in rows])


def _add_bias(scores: torch.Tensor, rows: Seq[LogitProcessors]) -> None:
    biased = [(index, row) for index, row in enumerate(rows) if len(row.bias_ids)]
    if not biased:
        return
    vocab = scores.shape[1]
    where = _to(scores, np.concatenate([row.bias_ids + index * vocab for index, row in biased]))
    bias = _to(scores, np.concatenate([row.bias for _, row in biased]))
    flat = scores.view(-1)
    flat[where] = flat[where] + bias


def _penalise(scores: torch.Tensor, rows: Seq[LogitProcessors]) -> None:
    """repetition_penalty (Keskar et al. 2019, CTRL), then OpenAI's frequency and presence."""
    pieces = []
    vocab = scores.shape[1]
    for index, row in enumerate(rows):
        if row.counts is None:
            continue
        params, ids, counts = row.params, row.counts.ids, row.counts.counts
        subtract = counts * np.float32(params.frequency_penalty)
        subtract += (counts > 0) * np.float32(params.presence_penalty)
        factor = np.full(len(ids), params.repetition_penalty, dtype=np.float32)
        pieces.append((ids + index * vocab, factor, subtract))
    if not pieces:
        return
    where, factors, subtracts = (
        _to(scores, np.concatenate(arrays)) for arrays in zip(*pieces, strict=True)
    )
    flat = scores.view(-1)
    old = flat[where]
    new = torch.where(old < 0, old * factors, old / factors) - subtracts
    # An extreme factor must not make an infinity: +inf has no softmax, -inf means masked.
    limit = torch.finfo(new.dtype).max
    flat[where] = torch.where(old.isneginf(), old, new.clamp(-limit, limit))


def _mask(scores: torch.Tensor, banned: Seq[Seq[int]]) -> None:
    """Set the banned ids of each row to -inf, except in a row that would have nothing left."""
    if not any(banned):
        return
    vocab = scores.shape[1]
    row_of = np.repeat(np.arange(len(banned)), [len(ids) for ids in banned])
    ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in banned])
    where, row = _to(scores, row_of * vocab + ids), _to(scores, row_of)
    flat = scores.view(-1)
    old = flat[where]
    flat[where] = -torch.inf
    emptied = scores.amax(-1).isneginf()[row]
    flat[where] = torch.where(emptied, old, -torch.inf)


def _to(like: torch.Tensor, array: NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(array).to(like.device)


def _column(numbers: Seq[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=like.device).unsqueeze(1)


def to_weights(scores: torch.Tensor, temperature: Seq[float]) -> torch.Tensor:
    """Integer weights [B, V], in units of 2**-WEIGHT_BITS of the likeliest token's.

    scores: [B, V] float32 with a finite entry in every row; temperature: B numbers above 0.
    Subtracting the maximum first keeps any temperature, however small, from overflowing.
    """
    best = scores.amax(-1, keepdim=True)
    below = (scores.double() - best) / _column(temperature, scores)
    return below.exp_().mul_(2.0**WEIGHT_BITS).to(torch.int64)


def keep_top_k(weights: torch.Tensor, top_k: Seq[int]) -> torch.Tensor:
    """Keep the k likeliest of each row; ties with the k-th stay, as in transformers.

    weights: [B, V] int64; top_k: B numbers, 1 or more. (Fan et al. 2018)
    """
    vocab = weights.shape[1]
    places = [min(k, vocab) - 1 for k in top_k]
    best = weights.topk(max(places) + 1, dim=-1).values
    least = best.gather(1, torch.tensor(places, device=weights.device).unsqueeze(1))
    return weights * (weights >= least)


def keep_top_p(weights: torch.Tensor, top_p: Seq[float]) -> torch.Tensor:
    """Keep the smallest set of likeliest tokens that reaches `top_p` of the mass, at least one.

    Of equally likely tokens at the edge the lowest ids stay; transformers keeps as many, but leaves
    which ones to an unstable sort. weights: [B, V] int64; top_p: B numbers. (Holtzman et al. 2020)
    """
    ranked = _sorted(weights)
    summed = ranked.cumsum(-1)
    total = summed[:, -1:]
    target = (total.double() * _column(top_p, weights)).ceil_().to(torch.int64)
    dropped = torch.searchsorted(summed, total - target, right=True)
    edge = ranked.gather(1, dropped.clamp_(max=weights.shape[1] - 1))
    if _is_cpu(weights) and torch.equal(dropped, torch.searchsorted(ranked, edge)):
        return weights * (weights >= edge)  # no tie is cut; elsewhere looking costs a transfer
    tied = weights == edge
    tied_kept = torch.searchsorted(ranked, edge, right=True) - dropped
    return weights * ((weights > edge) | (tied & (tied.cumsum(-1) <= tied_kept)))


def keep_min_p(weights: torch.Tensor, min_p: Seq[float]) -> torch.Tensor:
    """Drop tokens less likely than `min_p` of the likeliest one. (Nguyen et al. 2024)

    weights: [B, V] int64; min_p: B numbers.
    """
    least = weights.amax(-1, keepdim=True).double() * _column(min_p, weights)
    return weights * (weights >= least)


def keep_typical_p(weights: torch.Tensor, typical_p: Seq[float]) -> torch.Tensor:
    """Keep the tokens whose surprise is nearest the entropy, up to `typical_p` of the mass.

    weights: [B, V] int64; typical_p: B numbers. Ties at the edge stay, as in transformers.
    (Meister et al. 2022, locally typical sampling)
    """
    # Relative to the likeliest token's. A dropped token has no mass, so its surprise is moot.
    surprise = weights.clamp(min=1).double().log_().neg_().add_(WEIGHT_BITS * math.log(2))
    # In integers, so that the sum is exact: w * -log(w) is at most 2**44 / e.
    spread = (weights * surprise).to(torch.int64)
    total = weights.cumsum(-1)[:, -1:]
    mean_surprise = spread.cumsum(-1)[:, -1:].double() / total
    distance = (surprise - mean_surprise).abs_()
    order = _argsorted(distance)
    summed = weights.gather(1, order).cumsum(-1)
    target = (total.double() * _column(typical_p, weights)).ceil_().to(torch.int64)
    reached = torch.searchsorted(summed, target).clamp_(max=weights.shape[1] - 1)
    edge = distance.gather(1, order.gather(1, reached))
    return weights * (distance <= edge)


def draw(weights: torch.Tensor, uniform: Seq[float]) -> torch.Tensor:
    """Ids [B] by inverse CDF: the first whose cumulated weight exceeds uniform * total.

    weights: [B, V] int64, not all 0 in a row; uniform: B numbers in [0, 1).
    """
    summed = weights.cumsum(-1)
    # With uniform <= 1 - 2**-53 the product is below the total, rounded as it may be.
    target = (summed[:, -1:].double() * _column(uniform, weights)).to(torch.int64)
    return torch.searchsorted(summed, target, right=True).squeeze(1)


def _sorted(values: torch.Tensor) -> torch.Tensor:
    """Ascending along the last dimension. numpy's sort is ten times torch's on a CPU."""
    if _is_cpu(values):
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(dim=-1).values


def _argsorted(values: torch.Tensor) -> torch.Tensor:
    """Indices that sort ascending; the order of equal values is free."""
    if _is_cpu(values):
        return torch.from_numpy(np.argsort(values.numpy(), axis=-1))
    return values.argsort(dim=-1)


def _is_cpu(values: torch.Tensor) -> bool:
    return values.device.type == "cpu"
