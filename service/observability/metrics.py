"""What GPTJet counts for Prometheus. Names are in the style of vLLM's and TGI's, units are seconds.

What happens every step goes into tallies that take no locks; what happens once a request, into
prometheus_client's own; what is known anyway (queue, KV blocks) is read when it is asked for. No
label takes a value that a caller can choose.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import TYPE_CHECKING

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from gptjet.service.engine.backend import ParityStatus
from gptjet.service.engine.observer import StepKind, StepReport
from gptjet.service.engine.request import FinishReason
from gptjet.service.log import dropped_lines
from gptjet.service.observability.governance import GovernanceCollector, Governed
from gptjet.service.observability.tally import Tally

if TYPE_CHECKING:
    from gptjet.service.engine.async_engine import AsyncEngine
    from gptjet.service.engine.request import Request, RequestSummary
    from gptjet.service.engine.score import ScoreOutcome, ScoreRequest

# From a token of an H100 to a prompt that waited behind a long queue.
LATENCY_BOUNDS_S = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0),
)
# A step of a small model on a CPU, or of the mock, is below a millisecond.
STEP_BOUNDS_S = (0.0001, 0.0002, 0.0005, *LATENCY_BOUNDS_S)
# For each method: whatever is finer, a request's own histograms have.
_RPC_BOUNDS_S = (0.005, 0.02, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_POWERS_OF_2 = tuple(float(2**power) for power in range(13))
_NS_PER_S = 1e9
_MS_PER_S = 1e3

# What an RPC can end with here, so that a rate sees the first one of a kind as a step from 0.
USUAL_CODES = (
    *("OK", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "INVALID_ARGUMENT", "PERMISSION_DENIED"),
    *("RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "UNAVAILABLE"),
)
# What refuses an RPC: the caller's own doing, and what the server has no room or is not there for.
CALLERS_FAULTS = (*("authentication", "message_size", "policy", "quota", "scope", "slow_reader"),)
SERVERS_LIMITS = (
    *("concurrent_rpcs", "memory", "queue", "queue_time", "tokens_in_flight", "unavailable"),
)


class Metrics:
    """All metrics of one server, in a registry of their own.

    A StepObserver (engine thread) and a RequestObserver (event loop).
    """

    def __init__(
        self, methods: Iterable[str] = (), is_serving: Callable[[], bool] = lambda: False
    ) -> None:
        """`methods` of our service get their series at once; `is_serving` is asked in a scrape."""
        # Halves the series; a Prometheus that wants creation times is not to be found.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self.registry)
        prometheus_client.GCCollector(registry=self.registry)
        self._steps = _StepTallies()
        self._state = _EngineState(is_serving)
        self.registry.register(self._steps)
        self.registry.register(self._state)
        self._make_request_metrics()
        self._make_rpc_metrics(methods)
        build = self._gauge("build_info", "Versions; always 1.", ("version", "python", "torch"))
        build.labels(_version("gptjet"), platform.python_version(), _version("torch")).set(1)

    def attach(self, engine: AsyncEngine, model: str) -> None:
        """Count a loaded model's engine; `model` is the name it is served by."""
        self._state.engine = engine
        spec = engine.spec
        info = self._gauge(
            "model_info",
            "What is served; always 1.",
            ("model", "architecture", "backend", "device", "dtype"),
        )
        info.labels(model, spec.architecture, spec.name, spec.device, spec.dtype).set(1)
        parity = self._gauge(
            "parity_verdict",
            "1 for the outcome of the self-check against transformers at load: passed, failed or "
            "not_run.",
            ("status",),
        )
        for status in ParityStatus:
            parity.labels(status.value).set(status is spec.parity.status)
        error = self._gauge(
            "parity_max_relative_error", "Largest relative error of a logit in the self-check."
        )
        error.set(spec.parity.max_relative_error)

    def govern(self, governed: Governed) -> None:
        """Count what a policy decides."""
        self.registry.register(GovernanceCollector(governed))

    # --- what is reported ---

    def step_ended(self, report: StepReport) -> None:
        """One step of the engine; see StepObserver."""
        self._steps.add(report)

    def request_ended(self, _request: Request, summary: RequestSummary, /) -> None:
        """One Generate or GenerateStream; see RequestObserver."""
        self._finished[summary.finish_reason].inc()
        timings = summary.timings
        self._prompt_lengths.observe(summary.prompt_tokens)
        self._output_lengths.observe(summary.completion_tokens)
        if not summary.completion_tokens:
            return  # it has never run, or not to its first token
        self._queue_time.observe(timings.queue_ms / _MS_PER_S)
        self._prefill_time.observe(timings.prefill_ms / _MS_PER_S)
        self._decode_time.observe(timings.decode_ms / _MS_PER_S)
        self._e2e.observe(timings.e2e_ms / _MS_PER_S)
        # The first token of each sequence is prefill's; n sequences decode side by side.
        decoded = max(sequence.completion_tokens for sequence in summary.sequences) - 1
        if decoded > 0:
            self._tpot.observe(timings.decode_ms / _MS_PER_S / decoded)
        if self._state.has_prefix_cache:
            self._prefix_queried.inc(summary.prompt_tokens)
            self._prefix_hits.inc(summary.cached_prompt_tokens)
        if summary.speculation is not None:
            self._drafted.inc(summary.speculation.drafted_tokens)
            self._accepted.inc(summary.speculation.accepted_tokens)

    def score_ended(self, _request: ScoreRequest, outcome: ScoreOutcome, /) -> None:
        """One Score; see RequestObserver."""
        self._scores.labels(outcome.finish_reason or "finished").inc()
        if outcome.result is not None:
            self._scored_candidates.inc(len(outcome.result.scores))
            self._score_e2e.observe(outcome.result.timings.e2e_ms / _MS_PER_S)

    def rpc_started(self) -> None:
        """An RPC of our service has arrived."""
        self._active.inc()

    def rpc_ended(self, method: str, code: str, duration_s: float, *, counted: bool) -> None:
        """An RPC has ended, however it ended. `counted`: one of our service and not a probe."""
        self._rpcs.labels(method, code).inc()
        if counted:
            self._active.dec()
            self._durations.labels(method).observe(duration_s)

    def rpc_refused(self, refused_by: str | None) -> None:
        """What refused an RPC that has ended; None: nothing has."""
        if refused_by is not None:
            self._refused.labels(refused_by).inc()

    # --- what there is ---

    def _make_request_metrics(self) -> None:
        finished = self._counter(
            "requests_finished",
            "Generate requests by the reason why their first sequence ended.",
            ("finish_reason",),
        )
        self._finished = {reason: finished.labels(reason.value) for reason in FinishReason}
        self._queue_time = self._latency("queue_time_seconds", "From arrival to the first step.")
        self._prefill_time = self._latency(
            "prefill_time_seconds", "From a request's first step to its first token."
        )
        self._decode_time = self._latency(
            "decode_time_seconds", "From a request's first token to its last."
        )
        self._e2e = self._latency("e2e_latency_seconds", "From arrival to the last token.")
        self._tpot = self._latency(
            "time_per_output_token_seconds",
            "Mean time between a request's tokens, the first excluded; one value a request.",
        )
        self._prompt_lengths = self._histogram(
            "request_prompt_tokens", "Tokens of a request's prompt.", _POWERS_OF_2
        )
        self._output_lengths = self._histogram(
            "request_generated_tokens", "Tokens made for a request.", _POWERS_OF_2
        )
        self._prefix_queried = self._counter(
            "prefix_cache_queried_tokens", "Prompt tokens looked for in the prefix cache."
        )
        self._prefix_hits = self._counter(
            "prefix_cache_hit_tokens", "Prompt tokens that the prefix cache had."
        )
        self._drafted = self._counter("draft_tokens", "Tokens guessed by prompt lookup.")
        self._accepted = self._counter("accepted_draft_tokens", "Guessed tokens that were right.")
        self._scores = self._counter(
            "scores_finished", "Score requests by how they ended.", ("finish_reason",)
        )
        self._scores.labels("finished")
        self._scored_candidates = self._counter("scored_candidates", "Candidates scored.")
        self._score_e2e = self._latency(
            "score_latency_seconds", "From a score request's arrival to its answer."
        )

    def _make_rpc_metrics(self, methods: Iterable[str]) -> None:
        self._rpcs = self._counter(
            "rpcs", "RPCs that have ended, by method and gRPC status code.", ("method", "code")
        )
        self._durations = self._histogram(
            "rpc_duration_seconds",
            "From an RPC's arrival to its status; probes and reflection left out.",
            _RPC_BOUNDS_S,
            ("method",),
        )
        self._active = self._gauge("rpcs_active", "RPCs being served; probes left out.")
        self._refused = self._counter(
            "rpcs_refused",
            "RPCs refused by a right, a limit or the server's state, by which of them; what is not "
            "a valid request is not among them.",
            ("refused_by",),
        )
        for refused_by in (*CALLERS_FAULTS, *SERVERS_LIMITS):
            self._refused.labels(refused_by)
        for method in methods:
            self._durations.labels(method)
            for code in USUAL_CODES:
                self._rpcs.labels(method, code)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"gptjet_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"gptjet_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, bounds: tuple[float, ...], labels: tuple[str, ...] = ()
    ) -> Histogram:
        return Histogram(f"gptjet_{name}", text, labels, buckets=bounds, registry=self.registry)

    def _latency(self, name: str, text: str) -> Histogram:
        return self._histogram(name, text, LATENCY_BOUNDS_S)


class _StepTallies(Collector):
    """What the engine thread counts."""

    def __init__(self) -> None:
        self._durations = {kind: Tally(STEP_BOUNDS_S, unit=_NS_PER_S) for kind in StepKind}
        self._batch_sizes = {kind: Tally(_POWERS_OF_2[:10]) for kind in StepKind}
        self._ttft = Tally(LATENCY_BOUNDS_S, unit=_NS_PER_S)
        self._itl = Tally(LATENCY_BOUNDS_S, unit=_NS_PER_S)
        self._output_tokens = 0
        self._prompt_tokens = 0
        self._computed_prompt_tokens = 0

    def add(self, report: StepReport) -> None:
        kind = report.kind
        assert kind is not None, "only steps that did something are reported"
        self._durations[kind].add(report.duration_ns)
        self._batch_sizes[kind].add(report.num_sequences)
        if report.gaps_ns:
            self._itl.add_all(report.gaps_ns)
        self._output_tokens += report.output_tokens
        if kind is StepKind.PREFILL:
            self._ttft.add_all(report.ttft_ns)
            self._prompt_tokens += report.prompt_tokens
            self._computed_prompt_tokens += report.computed_prompt_tokens

    def collect(self) -> Iterator[Metric]:
        yield _histogram_of(
            "step_duration_seconds",
            "Time of one step of the engine: schedule, compute, sample, detokenize.",
            self._durations,
        )
        yield _histogram_of("step_batch_size", "Sequences computed in one step.", self._batch_sizes)
        buckets, total = self._ttft.read()
        yield HistogramMetricFamily(
            "gptjet_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=buckets,
            sum_value=total,
        )
        buckets, total = self._itl.read()
        yield HistogramMetricFamily(
            "gptjet_inter_token_latency_seconds",
            "Time between two outputs of a sequence; tokens that drafts bring are one output.",
            buckets=buckets,
            sum_value=total,
        )
        yield CounterMetricFamily(
            "gptjet_generated_tokens", "Tokens made for all sequences.", self._output_tokens
        )
        yield CounterMetricFamily(
            "gptjet_prompt_tokens",
            "Prompt tokens of the requests that have their first token.",
            self._prompt_tokens,
        )
        yield CounterMetricFamily(
            "gptjet_computed_prompt_tokens",
            "Tokens computed in prefills: without those of the prefix cache, and again after a "
            "preemption.",
            self._computed_prompt_tokens,
        )


class _EngineState(Collector):
    """What is read when it is asked for. Lengths of containers: safe beside the engine thread."""

    def __init__(self, is_serving: Callable[[], bool]) -> None:
        self.engine: AsyncEngine | None = None
        self._is_serving = is_serving

    @property
    def has_prefix_cache(self) -> bool:
        return self.engine is not None and self.engine.engine.scheduler.block_manager.prefix_cache

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "gptjet_serving",
            "1 while health says SERVING; 0 while it loads, drains or has failed.",
            float(self._is_serving()),
        )
        yield CounterMetricFamily(
            "gptjet_log_lines_dropped",
            "Log lines that could not be written: a full disk, or a reader that is too slow.",
            dropped_lines(),
        )
        if self.engine is None:
            return
        yield from self._requests(self.engine)
        yield from self._blocks(self.engine)

    def _requests(self, engine: AsyncEngine) -> Iterator[Metric]:
        scheduler = engine.engine.scheduler
        yield GaugeMetricFamily(
            "gptjet_num_requests_running",
            "Requests of which a step has run and which have not ended.",
            engine.num_running,
        )
        yield GaugeMetricFamily(
            "gptjet_num_requests_waiting",
            "Requests of which nothing has run: the length of the queue.",
            engine.num_waiting,
        )
        yield GaugeMetricFamily(
            "gptjet_max_queue_size",
            "Requests that may wait; one more is refused.",
            engine.config.max_queue_size,
        )
        yield GaugeMetricFamily(
            "gptjet_num_sequences_running",
            "Sequences that hold a KV cache.",
            len(scheduler.running) + len(scheduler.prefilling),
        )
        yield GaugeMetricFamily(
            "gptjet_max_sequences",
            "Sequences that may hold a KV cache at once.",
            min(engine.spec.max_sequences, engine.config.max_sequences),
        )
        yield CounterMetricFamily(
            "gptjet_preemptions",
            "Sequences whose KV blocks were taken and which were computed again.",
            scheduler.num_preemptions,
        )

    def _blocks(self, engine: AsyncEngine) -> Iterator[Metric]:
        manager = engine.engine.scheduler.block_manager
        cached = manager.num_cached_blocks
        free = manager.num_free_blocks
        used = manager.num_blocks - free
        blocks = GaugeMetricFamily(
            "gptjet_kv_blocks",
            "KV blocks: used by a sequence, cached for a prompt that begins alike, or free.",
            labels=("state",),
        )
        for state, count in (("used", used), ("cached", cached), ("free", max(0, free - cached))):
            blocks.add_metric((state,), count)
        yield blocks
        yield GaugeMetricFamily(
            "gptjet_kv_cache_usage_ratio",
            "Share of the KV blocks that sequences use, 0 to 1.",
            used / manager.num_blocks,
        )
        yield GaugeMetricFamily(
            "gptjet_kv_block_tokens", "Tokens of one KV block.", manager.block_size
        )


def _histogram_of(name: str, text: str, tallies: dict[StepKind, Tally]) -> Metric:
    family = HistogramMetricFamily(f"gptjet_{name}", text, labels=("phase",))
    for kind, tally in tallies.items():
        buckets, total = tally.read()
        family.add_metric((kind.value,), buckets, total)
    return family


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
