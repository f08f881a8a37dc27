"""The engine over the paged mock, which writes down what it is asked.

The mock's rule: after a lower-case letter the next one (`z` -> `a`), after an upper-case letter
the next one (`Z` -> end-of-text), after anything else `a`. Paged, it raises where a block does not
hold what a model would have put there, so a wrong copy or an early reuse fails the request.
"""

from __future__ import annotations

from typing import Any

import torch

from gptjet.service.backends.mock import MockBackend
from gptjet.service.engine.backend import Phase, PrefillResult, ScheduledBatch
from gptjet.service.engine.config import EngineConfig
from gptjet.service.engine.engine import Engine
from gptjet.service.engine.request import (
    RequestOutput,
    RequestSummary,
    SamplingParams,
    new_request,
)
from gptjet.service.engine.tokenizer import ByteTokenizer


class RecordingBackend(MockBackend):
    """Keeps what was asked: "P" or "D", and (sequence_id, tokens) of each sequence."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"paged": True, "block_size": 4, **options})
        self.steps: list[tuple[str, tuple[tuple[int, int], ...]]] = []
        self.copies: list[tuple[int, int]] = []

    def prefill(self, batch: ScheduledBatch) -> PrefillResult:
        self._record(batch)
        return super().prefill(batch)

    def decode(self, batch: ScheduledBatch) -> torch.Tensor:
        self._record(batch)
        return super().decode(batch)

    def _record(self, batch: ScheduledBatch) -> None:
        counts = batch.num_tokens or (1,) * len(batch.sequences)
        ids = (sequence.sequence_id for sequence in batch.sequences)
        name = "P" if batch.phase is Phase.PREFILL else "D"
        self.steps.append((name, tuple(zip(ids, counts, strict=True))))
        self.copies += batch.block_copies

    def prefills(self, sequence_id: int) -> list[int]:
        return [n for name, work in self.steps if name == "P" for i, n in work if i == sequence_id]


def make_engine(backend: MockBackend | None = None, **config: Any) -> Engine:
    return Engine(backend or RecordingBackend(), ByteTokenizer(), EngineConfig(**config))


def add(engine: Engine, prompt: str, *, deadline_ns: int | None = None, **params: Any) -> int:
    return engine.add(
        new_request(tuple(prompt.encode()), SamplingParams(**params), deadline_ns=deadline_ns)
    )


def run(engine: Engine) -> dict[int, list[RequestOutput]]:
    outputs: dict[int, list[RequestOutput]] = {}
    for _ in range(10_000):
        if not engine.has_work:
            assert_nothing_left(engine)
            return outputs
        for key, output in engine.step():
            outputs.setdefault(key, []).append(output)
        engine.scheduler.block_manager.check_invariants()
    raise AssertionError("the engine makes no progress")


def run_one(engine: Engine, prompt: str, **params: Any) -> list[RequestOutput]:
    key = add(engine, prompt, **params)
    return run(engine)[key]


def assert_nothing_left(engine: Engine) -> None:
    assert not engine.has_work
    assert not engine.scheduler.has_work
    manager = engine.scheduler.block_manager
    manager.check_invariants()
    assert manager.num_free_blocks == manager.num_blocks


def text_of(outputs: list[RequestOutput], index: int = 0) -> str:
    return "".join(o.text for o in outputs if o.index == index and not o.is_prompt)


def ids_of(outputs: list[RequestOutput], index: int = 0) -> list[int]:
    return [t for o in outputs if o.index == index and not o.is_prompt for t in o.token_ids]


def summary_of(outputs: list[RequestOutput]) -> RequestSummary:
    (summary,) = [o.summary for o in outputs if o.summary is not None]
    return summary
