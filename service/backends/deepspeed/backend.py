"""The `deepspeed` backend: one request at a time through the injected model."""

from __future__ import annotations

from collections.abc import Generator
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import torch

from gptjet.service.backends.deepspeed.injected_model import InjectedModel, InjectedRequest
from gptjet.service.backends.logprobs import token_logprobs
from gptjet.service.engine.backend import BackendSpec, PrefillResult, ScheduledBatch, ScoreJob

if TYPE_CHECKING:
    from gptjet.service.engine.sequence import Sequence

_WARM_UP_PROMPT = 16


class DeepSpeedBackend:
    """Drives an InjectedModel for the engine. See `loader.load` for how one comes to be.

    The spec says one sequence, so the scheduler queues later requests and their wait stands in
    their queue time. The workspace's lock is held from a sequence's prefill to its release all the
    same: other users of the process (offline ones) cannot get between two of its steps.
    """

    def __init__(self, model: InjectedModel, spec: BackendSpec) -> None:
        self._model = model
        self._spec = spec
        self._request: InjectedRequest | None = None
        self._sequence_id: int | None = None

    @property
    def spec(self) -> BackendSpec:
        """One sequence, one a step."""
        return self._spec

    @property
    def model(self) -> InjectedModel:
        """The injected model, for offline use."""
        return self._model

    def warm_up(self) -> None:
        """Allocate the workspace, and run a short prompt and two tokens after it."""
        length = max(1, min(_WARM_UP_PROMPT, self._spec.max_context - 2))
        self._model.generate_greedy([[0] * length], min(3, self._spec.max_context - length))
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)

    def prefill(self, batch: ScheduledBatch) -> PrefillResult:
        """Compute the sequence's tokens from the start: logits [1, V] float32.

        Raises RuntimeError where another sequence still holds the workspace: a bug above. After any
        exception the workspace is clean once the sequence is released.
        """
        (sequence,) = batch.sequences
        if self._request is not None and self._sequence_id != sequence.sequence_id:
            raise RuntimeError(
                f"sequence {sequence.sequence_id} cannot start: sequence {self._sequence_id} holds "
                "DeepSpeed's one KV workspace"
            )
        self._end_request()
        request = self._model.begin(max_tokens=sequence.request.max_tokens)
        self._request, self._sequence_id = request, sequence.sequence_id
        token_ids = torch.tensor([sequence.token_ids])
        if not sequence.needs_prompt_logits:
            return PrefillResult(_owned(request.prefill(token_ids)), (None,))
        logits, earlier = request.prefill_all_positions(token_ids)
        return PrefillResult(_owned(logits), (_owned(earlier[0]),))

    def decode(self, batch: ScheduledBatch) -> torch.Tensor:
        """Compute the sequence's last token: [1, V] float32.

        Raises RuntimeError where the workspace is not this sequence's or out of step with it.
        """
        (sequence,) = batch.sequences
        request = self._request
        if request is None or self._sequence_id != sequence.sequence_id:
            raise RuntimeError(
                f"sequence {sequence.sequence_id} does not hold the KV workspace "
                f"(sequence {self._sequence_id} does)"
            )
        if request.num_tokens != sequence.num_tokens - 1:
            raise RuntimeError(
                f"sequence {sequence.sequence_id} has {sequence.num_tokens} tokens and a KV "
                f"workspace of {request.num_tokens}, which must be one less"
            )
        return _owned(request.decode_one_token(torch.tensor([[sequence.last_token_id]])))

    def score(self, job: ScoreJob) -> Generator[None, None, tuple[torch.Tensor, ...]]:
        """One prefill of prompt and candidate for each candidate of several tokens.

        The workspace's counter goes forward or back to the start, and an input of several tokens
        always starts a sequence: the prompt cannot be kept from one candidate to the next. What is
        computed once is the first token of every candidate, so labels of one token cost one prompt.

        Between two pieces the workspace is nobody's. Raises RuntimeError where a sequence holds it:
        a bug above.
        """
        after_prompt: torch.Tensor | None = None
        later: list[torch.Tensor] = []
        prompt = job.prompt_token_ids
        for candidate in job.candidates:
            if len(candidate) == 1:
                later.append(torch.empty(0))
                continue
            if after_prompt is not None:
                yield
            rows = self._rows_from(prompt, candidate[:-1])
            after_prompt = rows[:1]
            later.append(token_logprobs(rows[1:], candidate[1:]))
        if after_prompt is None:
            after_prompt = self._rows_from(prompt, ())
        return tuple(
            torch.cat([token_logprobs(after_prompt, candidate[:1]), rest])
            for candidate, rest in zip(job.candidates, later, strict=True)
        )

    def release(self, sequence: Sequence) -> None:
        """Leave the workspace clean for the next sequence."""
        if sequence.sequence_id == self._sequence_id:
            self._end_request()

    def close(self) -> None:
        """Give the workspace and the weights back."""
        self._end_request()
        self._model.close()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _rows_from(self, prompt: tuple[int, ...], more: tuple[int, ...]) -> torch.Tensor:
        """Logits [1 + len(more), V] float32: after the prompt, and after each token of `more`."""
        if self._request is not None:
            raise RuntimeError(
                f"nothing can be scored: sequence {self._sequence_id} holds DeepSpeed's one KV "
                "workspace"
            )
        token_ids = torch.tensor([[*prompt, *more]])
        with self._model.begin(max_tokens=token_ids.shape[1]) as request:
            return request.prefill_last_positions(token_ids, 1 + len(more))[0]

    def _end_request(self) -> None:
        request, self._request, self._sequence_id = self._request, None, None
        if request is not None:
            request.end()


class InjectedStepper:
    """An InjectedModel behind `parity.StepModel`."""

    def __init__(self, model: InjectedModel) -> None:
        self._model = model
        self._request: InjectedRequest | None = None

    def start(self, token_ids: Seq[int], num_steps: int) -> torch.Tensor:
        """See StepModel."""
        self.finish()
        self._request = self._model.begin(max_tokens=len(token_ids) + num_steps)
        return self._request.prefill(torch.tensor([list(token_ids)]))[0]

    def step(self, token_id: int) -> torch.Tensor:
        """See StepModel."""
        if self._request is None:
            raise RuntimeError("step before start")
        return self._request.decode_one_token(torch.tensor([[token_id]]))[0]

    def finish(self) -> None:
        """See StepModel."""
        request, self._request = self._request, None
        if request is not None:
            request.end()


def _owned(rows: torch.Tensor) -> torch.Tensor:
    """A copy made outside inference mode: an ordinary tensor, which the sampler may change."""
    return torch.empty_like(rows).copy_(rows)
