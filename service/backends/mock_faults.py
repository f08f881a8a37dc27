"""A mock backend that goes wrong where it is told to: faults for tests, and for anyone to see.

`gptjet serve --backend mock --model mock:fail_at_step=100`. Steps are counted from 1 over the
prefill and decode steps and the pieces of score requests, whoever they are for.

    fail_at_step          this step raises an error
    fail_from_step        so does every step from this one on, as after a device has failed for good
    nan_at_step           the first row of this step's logits is NaN
    hang_at_step          this step never ends
    die_at_step           this step ends the thread that it runs in, which no backend should
    oom_above_tokens      prefill steps of more tokens run out of memory
    oom_above_sequences   decode steps of more sequences run out of memory
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

from gptjet.service.backends.mock import MockBackend

if TYPE_CHECKING:
    from collections.abc import Generator

    from gptjet.service.backends.mock_settings import MockSettings
    from gptjet.service.engine.backend import PrefillResult, ScheduledBatch, ScoreJob


class FaultyMockBackend(MockBackend):
    """A MockBackend with the faults of its settings; `num_steps` counts the steps so far.

    A fault happens before anything is computed, except that NaN takes the place of a result.
    """

    def __init__(self, settings: MockSettings, **options: Any) -> None:
        super().__init__(**options)
        self._settings = settings
        self.num_steps = 0

    def prefill(self, batch: ScheduledBatch) -> PrefillResult:
        """As the mock, with the faults."""
        self._begin_step()
        num_tokens = sum(batch.num_tokens) or sum(s.num_tokens for s in batch.sequences)
        self._run_out_of_memory(num_tokens, self._settings.oom_above_tokens, "tokens")
        result = super().prefill(batch)
        self._spoil(result.logits)
        return result

    def decode(self, batch: ScheduledBatch) -> torch.Tensor:
        """As the mock, with the faults."""
        self._begin_step()
        self._run_out_of_memory(
            len(batch.sequences), self._settings.oom_above_sequences, "sequences"
        )
        logits = super().decode(batch)
        self._spoil(logits)
        return logits

    def score(self, job: ScoreJob) -> Generator[None, None, tuple[torch.Tensor, ...]]:
        """As the mock, with the faults."""
        pieces = super().score(job)
        try:
            self._begin_step()
            self._run_out_of_memory(
                len(job.prompt_token_ids), self._settings.oom_above_tokens, "tokens"
            )
            while True:
                try:
                    next(pieces)
                except StopIteration as stop:
                    scores: tuple[torch.Tensor, ...] = stop.value
                    break
                yield
                self._begin_step()
            self._spoil(scores[0])
            return scores
        finally:
            pieces.close()

    def _begin_step(self) -> None:
        self.num_steps += 1
        step, settings = self.num_steps, self._settings
        if step == settings.hang_at_step:
            threading.Event().wait()
        if step == settings.die_at_step:
            raise SystemExit(f"a fault that was asked for: the thread ends in step {step}")
        if step == settings.fail_at_step or 0 < settings.fail_from_step <= step:
            raise RuntimeError(f"a fault that was asked for: step {step} fails")

    def _spoil(self, logits: torch.Tensor) -> None:
        if self.num_steps == self._settings.nan_at_step:
            logits[:1] = torch.nan

    def _run_out_of_memory(self, size: int, limit: int, unit: str) -> None:
        if 0 < limit < size:
            # The very class that PyTorch raises for a device's memory.
            raise torch.OutOfMemoryError(
                f"a fault that was asked for: {size} {unit} in a step, of which {limit} fit"
            )
