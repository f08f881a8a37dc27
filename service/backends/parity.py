"""The parity gate: does a fast path compute what transformers computes, on this very card?

Probe prompts go through transformers' own model first and through the fast path afterwards (it may
replace the model in place). Both are fed the same tokens after the prompt, so one disagreement does
not hide what follows it. Logits and greedy choices are compared at every step.

Errors are relative: the largest difference of a row of logits over the largest reference logit of
that row, both rows centred, as adding a constant to all logits changes no probability.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol, cast

import torch

from gptjet.service.engine.backend import (
    Backend,
    BackendSpec,
    ParityStatus,
    ParityVerdict,
    PrefillResult,
    SampledBatch,
    SampledTokenIds,
    SamplingBackend,
    ScheduledBatch,
    ScoreJob,
)
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.engine.sequence import Sequence as EngineSequence

_STEPS = 16
_SEED = 20_220_101
_PREFILL_CHUNK = 256
# Rounding to nearest: half a unit in the last place of 1.0.
_UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_FP32_TOLERANCE = 1e-4
_SAFETY = 8.0
# The error of a row with NaN or infinity in it: JSON has no word for infinity.
_NOT_FINITE = 1e9


class ParityFailedError(BackendLoadError):
    """A fast path does not compute what transformers computes, and nothing may stand in for it."""

    def __init__(self, message: str, verdict: ParityVerdict) -> None:
        super().__init__(message)
        self.verdict = verdict


class StepModel(Protocol):
    """A model that can be asked for the next row of logits, one sequence at a time."""

    def start(self, token_ids: Sequence[int], num_steps: int) -> torch.Tensor:
        """Compute a prompt that up to `num_steps` tokens will follow: logits [V] float32."""
        ...

    def step(self, token_id: int) -> torch.Tensor:
        """Compute one more token: logits [V] float32."""
        ...

    def finish(self) -> None:
        """Forget the sequence."""
        ...


@dataclass(frozen=True, slots=True)
class Trace:
    """What the reference said of one probe: row i of `logits` [steps + 1, V] follows the prompt and
    i of `tokens`, of which the last is not computed."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logits: torch.Tensor


def tolerance(dtype: torch.dtype, layers: int) -> float:
    """The largest relative error of logits that rounding alone explains.

    In half precision every one of the two paths rounds its residual stream twice a layer.
    Independent roundings add as a random walk: sqrt(2 * layers) * u, where u is the unit roundoff;
    twice that for two paths, and a factor of four for the roundings inside attention and MLP
    (the square-root growth: Higham, Accuracy and Stability of Numerical Algorithms, 2.8). For
    GPT-J-6B in FP16 that is 0.029. On random models of 2 to 28 layers, rounded where the kernels
    round, a right path erred by 0.002 to 0.003 and one with a wrong rotary by 0.2 to 0.8.
    FP32 is held to 1e-4 whatever the depth.
    """
    roundoff = _UNIT_ROUNDOFF.get(dtype)
    return _FP32_TOLERANCE if roundoff is None else rounding_tolerance(roundoff, layers)


def rounding_tolerance(roundoff: float, layers: int) -> float:
    """The same for activations rounded twice a layer by `roundoff` of their size: see tolerance."""
    return _SAFETY * roundoff * math.sqrt(2 * layers)


def probe_prompts(
    vocab_size: int, max_context: int, max_tokens: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Prompts of one token, a few, a page, and as many as leave room for the steps.

    The same ids every time. The longest one reaches the end of the context, where an unchecked
    kernel would leave its memory. `max_tokens` leaves out the longest ones, until prompts and steps
    are no more tokens than that, or only the two shortest are left.
    """
    generator = torch.Generator().manual_seed(_SEED)
    steps = probe_steps(max_context)
    longest = max(1, max_context - steps)
    lengths = sorted({min(length, longest) for length in (1, 5, 64, 300, longest)})
    if max_tokens is not None:
        while len(lengths) > 2 and sum(lengths) + steps * len(lengths) > max_tokens:
            lengths.pop()
    return tuple(
        tuple(torch.randint(0, vocab_size, (length,), generator=generator).tolist())
        for length in lengths
    )


def probe_steps(max_context: int) -> int:
    """Decode steps of a probe: fewer where the context itself is tiny."""
    return min(_STEPS, max(1, max_context // 4))


def record_reference(
    model: StepModel, prompts: Iterable[Sequence[int]], max_context: int
) -> list[Trace]:
    """Run the probes through the reference; logits are kept in host memory."""
    steps = probe_steps(max_context)
    traces = []
    for prompt in prompts:
        rows, tokens = [model.start(prompt, steps).cpu()], []
        for _ in range(steps):
            tokens.append(int(rows[-1].argmax()))
            rows.append(model.step(tokens[-1]).cpu())
        tokens.append(int(rows[-1].argmax()))
        model.finish()
        traces.append(Trace(tuple(prompt), tuple(tokens), torch.stack(rows)))
    return traces


def record_forced(
    last_logits: Callable[[list[tuple[int, ...]], list[int]], list[torch.Tensor]],
    prompts: Iterable[Sequence[int]],
    vocab_size: int,
    max_context: int,
) -> list[Trace]:
    """The same of a reference that computes whole sequences and not steps.

    The tokens after a prompt are then not its own greedy ones, but as arbitrary as the prompt.
    `last_logits(sequences, wanted)` gives the logits [wanted[i], V] of each one's last positions.
    """
    generator = torch.Generator().manual_seed(_SEED + 1)
    steps = probe_steps(max_context)
    probes = [
        (tuple(prompt), torch.randint(0, vocab_size, (steps + 1,), generator=generator).tolist())
        for prompt in prompts
    ]
    logits = last_logits(
        [(*prompt, *tokens[:-1]) for prompt, tokens in probes], [steps + 1] * len(probes)
    )
    return [
        Trace(prompt, tuple(tokens), rows)
        for (prompt, tokens), rows in zip(probes, logits, strict=True)
    ]


def compare(model: StepModel, reference: Sequence[Trace], max_error: float) -> ParityVerdict:
    """Run the probes through the fast path and judge it against what was recorded.

    A greedy token that differs counts against it only where the reference preferred its own by more
    than rounding could turn: twice `max_error`, as both logits may move.
    """
    worst = 0.0
    compared = agreed = near_ties = 0
    try:
        for trace in reference:
            rows = [model.start(trace.prompt, len(trace.tokens) - 1).cpu()]
            rows += [model.step(token).cpu() for token in trace.tokens[:-1]]
            model.finish()
            for row, expected in zip(rows, trace.logits, strict=True):
                error, is_tie = _compare_row(row, expected, max_error)
                worst = max(worst, error)
                compared += 1
                agrees = int(row.argmax()) == int(expected.argmax())
                agreed += agrees
                near_ties += is_tie and not agrees
    except Exception as error:  # noqa: BLE001 - a path that cannot run its probes has failed them
        model.finish()
        return _verdict(worst, compared, agreed, near_ties, max_error, broke=error)
    return _verdict(worst, compared, agreed, near_ties, max_error)


def versions(*packages: str) -> str:
    """ "torch 2.11.0, transformers 5.17.0, …" of what is installed, with Python's and CUDA's."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found.append(f"CUDA {torch.version.cuda}")
    return ", ".join([*found, f"Python {platform.python_version()}"])


class TransformersStepper:
    """transformers' own model, prefilled in pieces so that eager attention stays small."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None

    def start(self, token_ids: Sequence[int], num_steps: int) -> torch.Tensor:
        """See StepModel."""
        del num_steps  # its cache grows as it goes
        self._cache = None
        for first in range(0, len(token_ids), _PREFILL_CHUNK):
            row = self._forward(list(token_ids[first : first + _PREFILL_CHUNK]))
        return row

    def step(self, token_id: int) -> torch.Tensor:
        """See StepModel."""
        return self._forward([token_id])

    def finish(self) -> None:
        """See StepModel."""
        self._cache = None

    @torch.inference_mode()
    def _forward(self, token_ids: list[int]) -> torch.Tensor:
        output = self._model(
            input_ids=torch.tensor([token_ids], device=self._model.device),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = output.past_key_values
        row: torch.Tensor = output.logits[0, -1].float()
        return row


class WithParity:
    """A backend that also carries a verdict: a fallback says what it stands in for, and why."""

    def __init__(self, backend: Backend, spec: BackendSpec) -> None:
        self._backend = backend
        self._spec = spec

    @property
    def spec(self) -> BackendSpec:
        """The backend's own, with the verdict in it."""
        return self._spec

    def warm_up(self) -> None:
        """The backend's own."""
        self._backend.warm_up()

    def prefill(self, batch: ScheduledBatch) -> PrefillResult:
        """The backend's own."""
        return self._backend.prefill(batch)

    def decode(self, batch: ScheduledBatch) -> torch.Tensor:
        """The backend's own."""
        return self._backend.decode(batch)

    def decode_and_sample(self, batch: SampledBatch) -> SampledTokenIds:
        """The backend's own, where its spec says that it has one."""
        return cast(SamplingBackend, self._backend).decode_and_sample(batch)

    def score(self, job: ScoreJob) -> Generator[None, None, tuple[torch.Tensor, ...]]:
        """The backend's own."""
        return self._backend.score(job)

    def release(self, sequence: EngineSequence) -> None:
        """The backend's own."""
        self._backend.release(sequence)

    def close(self) -> None:
        """The backend's own."""
        self._backend.close()


def _compare_row(row: torch.Tensor, expected: torch.Tensor, max_error: float) -> tuple[float, bool]:
    """Relative error of one row of logits [V]; whether the reference's choice was a near-tie."""
    expected = expected - expected.mean()
    scale = float(expected.abs().max().clamp_min(1e-30))
    error = float((row - row.mean() - expected).abs().max()) / scale
    best = expected.topk(min(2, len(expected))).values
    margin = float(best[0] - best[-1]) / scale
    return (error if math.isfinite(error) else _NOT_FINITE), margin <= 2 * max_error


def _verdict(
    worst: float,
    compared: int,
    agreed: int,
    near_ties: int,
    max_error: float,
    *,
    broke: Exception | None = None,
) -> ParityVerdict:
    wrong = compared - agreed - near_ties
    passed = broke is None and worst <= max_error and wrong == 0 and compared > 0
    parts = [
        f"{agreed} of {compared} greedy tokens equal, {near_ties} differ in near-ties",
        f"largest relative error of logits {worst:.2e} (limit {max_error:.2e})",
    ]
    if wrong:
        parts.insert(1, f"{wrong} differ outright")
    if broke is not None:
        parts.append(f"then it broke: {type(broke).__name__}: {' '.join(str(broke).split())}")
    return ParityVerdict(
        status=ParityStatus.PASSED if passed else ParityStatus.FAILED,
        max_relative_error=worst,
        tokens_compared=compared,
        tokens_agreed=agreed,
        detail="; ".join(parts),
    )
