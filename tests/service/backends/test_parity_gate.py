"""The gate itself, on models whose logits are made up: what passes, what fails, what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from gptjet.service.backends import parity
from gptjet.service.backends.mock import MockBackend
from gptjet.service.engine.backend import ParityStatus, ParityVerdict

VOCAB = 50
LIMIT = 0.01
Change = Callable[[torch.Tensor, int], torch.Tensor]


class Scripted:
    """Logits that depend on every token so far; `change(logits, position)` plants a fault."""

    def __init__(self, change: Change | None = None) -> None:
        self.change = change
        self.tokens: list[int] = []
        self.finished = 0

    def start(self, token_ids: Sequence[int], num_steps: int) -> torch.Tensor:
        self.tokens = list(token_ids)
        return self._row()

    def step(self, token_id: int) -> torch.Tensor:
        self.tokens.append(token_id)
        return self._row()

    def finish(self) -> None:
        self.finished += 1

    def _row(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash(tuple(self.tokens)) % 2**31)
        row = torch.randn(VOCAB, generator=generator)
        row[int(row.argmax())] += 1.0  # no near-ties unless a test makes one
        return self.change(row, len(self.tokens)) if self.change else row


def verdict_of(change: Change | None, reference: Scripted | None = None) -> ParityVerdict:
    prompts = parity.probe_prompts(VOCAB, 64)
    traces = parity.record_reference(reference or Scripted(), prompts, 64)
    return parity.compare(Scripted(change), traces, LIMIT)


def test_equal_models_pass_and_every_position_is_counted() -> None:
    verdict = verdict_of(None)
    probes = len(parity.probe_prompts(VOCAB, 64))
    assert verdict.status is ParityStatus.PASSED
    assert verdict.tokens_compared == verdict.tokens_agreed == probes * 17
    assert verdict.max_relative_error == 0.0


def test_error_is_relative_to_the_rows_largest_centred_logit() -> None:
    def nudge(row: torch.Tensor, position: int) -> torch.Tensor:
        centred = row - row.mean()
        wave = torch.ones(VOCAB)
        wave[::2] = -1.0  # sums to zero, so centring leaves it alone
        return row + 0.005 * centred.abs().max() * wave

    verdict = verdict_of(nudge)
    assert verdict.status is ParityStatus.PASSED
    assert verdict.max_relative_error == pytest.approx(0.005, rel=1e-3)


def test_constant_added_to_all_logits_is_no_error() -> None:
    verdict = verdict_of(lambda row, position: row + 100.0)
    assert verdict.status is ParityStatus.PASSED
    assert verdict.max_relative_error < 1e-5


def test_one_logit_beyond_the_limit_at_one_step_fails_with_all_tokens_equal() -> None:
    def spike(row: torch.Tensor, position: int) -> torch.Tensor:
        row = row.clone()
        if position == 9:
            row[int(row.argmin())] -= 0.5
        return row

    verdict = verdict_of(spike)
    assert verdict.status is ParityStatus.FAILED
    assert verdict.tokens_agreed == verdict.tokens_compared
    assert verdict.max_relative_error > LIMIT


def test_turned_near_tie_is_counted_but_not_held_against_it() -> None:
    """Best and second differ by less than rounding could turn; the fast path turns them."""

    def tie(row: torch.Tensor, position: int) -> torch.Tensor:
        row = row.clone()
        best, second = row.topk(2).indices.tolist()
        row[second] = row[best] - 1e-4
        return row

    def turned(row: torch.Tensor, position: int) -> torch.Tensor:
        row = tie(row, position)
        best, second = row.topk(2).indices.tolist()
        row[best], row[second] = row[second].clone(), row[best].clone()
        return row

    verdict = verdict_of(turned, reference=Scripted(tie))
    assert verdict.status is ParityStatus.PASSED
    assert verdict.tokens_agreed == 0
    assert f"{verdict.tokens_compared} differ in near-ties" in verdict.detail


def test_turned_clear_choice_fails_even_where_the_limit_would_allow_the_error() -> None:
    def turned(row: torch.Tensor, position: int) -> torch.Tensor:
        row = row.clone()
        best, second = row.topk(2).indices.tolist()
        row[best], row[second] = row[second].clone(), row[best].clone()
        return row

    prompts = parity.probe_prompts(VOCAB, 64)
    traces = parity.record_reference(Scripted(), prompts, 64)
    # the margin of 1.0 is about a third of the largest logit: outside 2 x 0.1, inside an error of 1
    verdict = parity.compare(Scripted(turned), traces, 0.1)
    assert verdict.status is ParityStatus.FAILED
    assert "differ outright" in verdict.detail


def test_not_a_number_fails() -> None:
    def poison(row: torch.Tensor, position: int) -> torch.Tensor:
        return torch.full_like(row, torch.nan) if position == 12 else row

    verdict = verdict_of(poison)
    assert verdict.status is ParityStatus.FAILED
    assert verdict.max_relative_error == 1e9


def test_path_that_raises_has_failed_and_is_told_to_finish() -> None:
    def explode(row: torch.Tensor, position: int) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    subject = Scripted(explode)
    traces = parity.record_reference(Scripted(), [(1, 2)], 64)
    verdict = parity.compare(subject, traces, LIMIT)
    assert verdict.status is ParityStatus.FAILED
    assert subject.finished == 1
    assert "RuntimeError: CUDA error: an illegal memory access was encountered" in verdict.detail
    assert "\n" not in verdict.detail


def test_nothing_compared_is_no_pass() -> None:
    assert parity.compare(Scripted(), [], LIMIT).status is ParityStatus.FAILED


def test_fast_path_is_fed_the_references_tokens() -> None:
    """Else one early difference would make every later row incomparable."""
    wrong_once = verdict_of(lambda row, position: -row if position == 1 else row)
    assert wrong_once.tokens_compared - wrong_once.tokens_agreed == 1


@pytest.mark.parametrize("context", [4, 16, 64, 2048])
def test_probes_and_their_steps_stay_inside_the_context_and_reach_its_end(context: int) -> None:
    prompts = parity.probe_prompts(VOCAB, context)
    traces = parity.record_reference(Scripted(), prompts[-1:], context)
    assert min(len(prompt) for prompt in prompts) == 1
    # the last token chosen is never computed
    assert len(prompts[-1]) + len(traces[0].tokens) - 1 == context
    assert prompts == parity.probe_prompts(VOCAB, context)


def test_limit_grows_with_depth_in_half_precision_and_is_fixed_in_single() -> None:
    assert parity.tolerance(torch.float16, 28) == pytest.approx(8 * 2**-11 * 56**0.5)
    assert parity.tolerance(torch.float32, 28) == parity.tolerance(torch.float32, 2) == 1e-4


def test_wrapped_backend_shows_the_verdict_and_is_otherwise_itself() -> None:
    from dataclasses import replace

    backend = MockBackend(max_context=64, max_sequences=2, num_kv_blocks=8)
    failed = ParityVerdict(status=ParityStatus.FAILED, detail="asked for deepspeed")
    wrapped = parity.WithParity(backend, replace(backend.spec, parity=failed))
    assert wrapped.spec.parity is failed
    assert replace(wrapped.spec, parity=ParityVerdict()) == backend.spec
