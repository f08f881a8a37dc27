"""What a scrape of a real server says, worked out by hand on the mock backend.

The mock's rule: after a lower-case letter the next one (`z` -> `a`), after an upper-case letter
the next one (`Z` -> end-of-text), after anything else `a`.
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import math
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import generate_latest, values
from prometheus_client.parser import text_string_to_metric_families

from gptjet.service.backends.mock import MockBackend
from gptjet.service.client import GptjetError
from gptjet.service.engine.observer import StepKind, StepReport
from gptjet.service.observability.errors import ObservabilityError
from gptjet.service.observability.exposition import MetricsServer
from gptjet.service.observability.metrics import Metrics
from gptjet.service.rpc.access.tokens import new_token
from gptjet.service.rpc.access.tokens_file import editing

StartServer = Callable[..., Awaitable[Any]]


class Scrape:
    """Samples by name and labels; a counter's name has its `_total`."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self.samples[f"gptjet_{name}", frozenset(labels.items())]

    def labels(self, name: str, label: str) -> set[str]:
        return {
            dict(labels)[label]
            for found, labels in self.samples
            if found == f"gptjet_{name}" and label in dict(labels)
        }


def get(port: int, path: str = "/metrics", **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


async def scrape(running: Any) -> Scrape:
    port = running.server.observability.metrics_port
    _, _, body = await asyncio.to_thread(get, port)
    return Scrape(body.decode())


async def scrape_when(running: Any, name: str, value: float, **labels: str) -> Scrape:
    """The scrape in which a sample has this value: RPCs are counted after their answer."""
    async with asyncio.timeout(20):
        while True:
            found = await scrape(running)
            if found(name, **labels) == value:
                return found
            await asyncio.sleep(0.01)


async def test_tokens_requests_and_latencies_of_two_requests(start_server: StartServer) -> None:
    running = await start_server(metrics_port=0)
    await running.client.generate("abc", max_new_tokens=5)
    await running.client.generate("The X", max_new_tokens=50, n=2)  # "YZ", end-of-text: 3 each
    now = await scrape_when(running, "rpcs_total", 2, method="Generate", code="OK")
    assert now("generated_tokens_total") == 5 + 2 * 3
    assert now("prompt_tokens_total") == 3 + 5
    assert now("requests_finished_total", finish_reason="length") == 1
    assert now("requests_finished_total", finish_reason="stop_token") == 1
    assert now("requests_finished_total", finish_reason="error") == 0
    # A first token a request; then a gap a token and sequence.
    assert now("time_to_first_token_seconds_count") == 2
    assert now("inter_token_latency_seconds_count") == 4 + 2 * 2
    for name in ("queue_time", "prefill_time", "decode_time", "e2e_latency"):
        assert now(f"{name}_seconds_count") == 2
        assert 0 < now(f"{name}_seconds_sum") < 20
    assert now("time_per_output_token_seconds_count") == 2
    assert now("request_prompt_tokens_bucket", le="4.0") == 1
    assert now("request_prompt_tokens_bucket", le="8.0") == 2
    assert now("request_generated_tokens_sum") == 5 + 6
    assert now("rpc_duration_seconds_count", method="Generate") == 2
    assert now("rpcs_active") == 0


async def test_time_per_output_token_of_parallel_sequences_is_that_of_one(
    start_server: StartServer,
) -> None:
    running = await start_server(backend=MockBackend(decode_ms=20), metrics_port=0)
    await running.client.generate("abc", max_new_tokens=5, n=4)
    now = await scrape(running)
    # Four decode steps of 20 ms or more, whatever n; the sum is that mean's.
    assert now("time_per_output_token_seconds_sum") >= 0.02
    assert now("decode_time_seconds_sum") == pytest.approx(
        4 * now("time_per_output_token_seconds_sum")
    )


async def test_steps_have_their_sizes_and_durations_by_phase(start_server: StartServer) -> None:
    backend = MockBackend(prefill_ms=5, decode_ms=2)
    running = await start_server(backend=backend, metrics_port=0)
    await running.client.generate("abc", max_new_tokens=4)
    await running.client.score("The cat", [" sat", " ran"])
    now = await scrape(running)
    assert now("step_batch_size_sum", phase="prefill") == 1
    assert now("step_batch_size_sum", phase="decode") == 3
    assert now("step_duration_seconds_count", phase="decode") == 3
    assert now("step_duration_seconds_bucket", phase="prefill", le="0.005") == 0
    assert 0.005 <= now("step_duration_seconds_sum", phase="prefill") < 20
    assert now("step_duration_seconds_count", phase="score") >= 1
    assert now("scores_finished_total", finish_reason="finished") == 1
    assert now("scored_candidates_total") == 2
    assert now("score_latency_seconds_count") == 1
    assert now("computed_prompt_tokens_total") == 3


class Gated(MockBackend):
    """Computes no prompt until `asked` is set, and no two sequences together until `seen` is."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asked, self.seen = threading.Event(), threading.Event()

    def prefill(self, batch: Any) -> Any:
        assert self.asked.wait(60)
        return super().prefill(batch)

    def decode(self, batch: Any) -> Any:
        assert len(batch.sequences) == 1 or self.seen.wait(60)
        return super().decode(batch)


async def test_queue_and_kv_blocks_are_those_of_the_moment(start_server: StartServer) -> None:
    backend = Gated(max_sequences=2, max_context=64, block_size=16)
    running = await start_server(backend=backend, metrics_port=0, max_queue_size=7)
    idle = await scrape(running)
    assert idle("num_requests_running") == idle("num_requests_waiting") == 0
    assert idle("kv_blocks", state="free") == 8
    streams = []
    for number in range(1, 4):
        streams.append(running.client.generate_stream("a", max_new_tokens=40))
        await scrape_when(running, "rpcs_active", number)
    backend.asked.set()
    try:
        await running.until(lambda: running.server.engine.num_waiting == 1)
        busy = await scrape_when(running, "num_sequences_running", 2)
    finally:
        backend.seen.set()
    assert busy("num_requests_running") == 2
    assert busy("num_requests_waiting") == 1
    assert busy("max_queue_size") == 7
    assert busy("num_sequences_running") == busy("max_sequences") == 2
    assert busy("rpcs_active") == 3
    # 41 tokens are 3 blocks, reserved at once where the backend is not paged.
    assert busy("kv_blocks", state="used") == 6
    assert busy("kv_blocks", state="free") == 2
    assert busy("kv_cache_usage_ratio") == 0.75
    assert busy("kv_block_tokens") == 16
    for stream in streams:
        await stream.aclose()
    after = await scrape_when(running, "requests_finished_total", 3, finish_reason="cancelled")
    assert after("kv_blocks", state="used") == 0
    await scrape_when(running, "rpcs_total", 3, method="GenerateStream", code="CANCELLED")


async def test_prefix_cache_drafts_and_preemptions(start_server: StartServer) -> None:
    backend = MockBackend(paged=True, block_size=4, num_kv_blocks=16, max_draft_tokens=4)
    running = await start_server(backend=backend, metrics_port=0)
    prompt = "abcdefghijklmnopqrstuvwxyzabc"
    await running.client.generate(prompt, max_new_tokens=6, prompt_lookup_tokens=4)
    await running.client.generate(prompt, max_new_tokens=1)
    now = await scrape(running)
    assert now("prefix_cache_queried_tokens_total") == 2 * 29
    assert now("prefix_cache_hit_tokens_total") == 28
    assert now("prompt_tokens_total") == 2 * 29
    assert now("computed_prompt_tokens_total") == 29 + 1
    # 35 tokens, the last of which is not computed, are 8 full blocks that can be found again.
    assert now("kv_blocks", state="cached") == now("kv_blocks", state="free") == 8
    assert now("kv_blocks", state="used") == now("kv_cache_usage_ratio") == 0
    # 6 tokens: one of the prefill, one of the decode step, and its four guesses.
    assert now("draft_tokens_total") == now("accepted_draft_tokens_total") == 4
    assert now("preemptions_total") == 0
    await asyncio.gather(*(running.client.generate("ab", max_new_tokens=40) for _ in range(2)))
    assert (await scrape(running))("preemptions_total") >= 1


async def test_errors_are_counted_by_method_and_code(start_server: StartServer) -> None:
    running = await start_server(metrics_port=0)
    with pytest.raises(GptjetError):
        await running.client.generate("abc", top_p=2.0)
    with pytest.raises(GptjetError):
        await running.client.tokenize("x" * (2 * 1024 * 1024))
    await scrape_when(running, "rpcs_total", 1, method="Generate", code="INVALID_ARGUMENT")
    now = await scrape_when(running, "rpcs_total", 1, method="Tokenize", code="INVALID_ARGUMENT")
    # What has not happened is there with 0, so that its first time is seen as an increase.
    assert now("rpcs_total", method="Score", code="INTERNAL") == 0


async def test_refusals_are_counted_by_what_refused(
    start_server: StartServer, tmp_path: Path
) -> None:
    text, kept = new_token("web", requests_per_minute=1)
    with editing(tmp_path / "tokens", create=True) as tokens:
        tokens.append(kept)
    running = await start_server(metrics_port=0, tokens_file=tmp_path / "tokens", attach=False)
    web = running.new_client(token=text, retry=None)
    for client in (running.client, web, web):
        with pytest.raises(GptjetError):
            await client.generate("abc")
    now = await scrape_when(running, "rpcs_refused_total", 1, refused_by="quota")
    assert now("rpcs_refused_total", refused_by="authentication") == 1
    assert now("rpcs_refused_total", refused_by="unavailable") == 1
    assert now("rpcs_refused_total", refused_by="queue") == 0
    assert now("rpcs_total", method="Generate", code="UNAUTHENTICATED") == 1
    assert now("rpcs_total", method="Score", code="PERMISSION_DENIED") == 0


async def test_a_failed_step_is_an_error_of_the_request_and_the_rpc(
    start_server: StartServer,
) -> None:
    class Broken(MockBackend):
        def decode(self, batch: Any) -> Any:
            raise RuntimeError("the device is gone")

    running = await start_server(backend=Broken(), metrics_port=0)
    with pytest.raises(GptjetError):
        await running.client.generate("abc", max_new_tokens=5)
    now = await scrape_when(running, "rpcs_total", 1, method="Generate", code="INTERNAL")
    assert now("requests_finished_total", finish_reason="error") == 1
    assert now("rpcs_active") == 0


async def test_serving_follows_health_and_the_model_is_named(start_server: StartServer) -> None:
    running = await start_server(metrics_port=0, attach=False, model="my/model")
    loading = await scrape(running)
    assert loading("serving") == 0
    assert "gptjet_model_info" not in loading.text
    from gptjet.service.engine.tokenizer import ByteTokenizer

    await running.server.attach(running.backend, ByteTokenizer())
    now = await scrape(running)
    assert now("serving") == 1
    info = {"architecture": "mock", "backend": "mock", "device": "cpu", "dtype": "float32"}
    assert now("model_info", model="my/model", **info) == 1
    assert now("parity_verdict", status="not_run") == 1
    assert now("parity_verdict", status="failed") == now("parity_verdict", status="passed") == 0
    assert now.labels("build_info", "python")
    assert math.isfinite(now.samples["process_resident_memory_bytes", frozenset()])


async def test_no_label_takes_what_a_caller_sends(start_server: StartServer) -> None:
    """As many series after a hundred different requests as after one of each kind."""
    running = await start_server(metrics_port=0)

    async def ask(number: int) -> None:
        await running.client.generate(f"p{number}", request_id=f"id-{number}", max_new_tokens=2)
        await running.client.tokenize(f"text {number}")
        call = running.client._channel.unary_unary(f"/gptjet.v1.TextGeneration/Nothing{number}")
        with pytest.raises(grpc.RpcError):
            await call(b"")

    await ask(0)
    before = set((await scrape(running)).samples)
    for number in range(1, 33):
        await ask(number)
    after = await scrape(running)
    assert set(after.samples) == before
    assert "id-7" not in after.text
    assert "Nothing7" not in after.text


async def test_methods_that_there_are_not_share_a_label(start_server: StartServer) -> None:
    """Where an interceptor answers for them, as access control does, they are counted too."""
    from gptjet.service.rpc.interceptors import RequestRecord

    running = await start_server(metrics_port=0)
    watch = running.server._rpcs.watch
    code = grpc.StatusCode.UNAUTHENTICATED
    for path in (
        "gptjet.v1.TextGeneration/Generate",
        "gptjet.v1.TextGeneration/A1",
        "x.Y/B2",
        "",
        "/",
    ):
        record = RequestRecord(method=path, peer="", counted=True, code=code)
        watch.count_refused(record)
        watch.begin(record, path, None, ())
        watch.end(record)
    now = await scrape(running)
    assert now("rpcs_total", method="Generate", code=code.name) == 2
    assert now("rpcs_total", method="_OTHER", code=code.name) == 8
    assert now("rpcs_active") == 0
    assert "A1" not in now.text
    assert "B2" not in now.text


async def test_names_are_ours_in_base_units_and_described(start_server: StartServer) -> None:
    running = await start_server(metrics_port=0)
    text = (await scrape(running)).text
    for family in text_string_to_metric_families(text):
        assert family.documentation.strip(), family.name
        if family.name.startswith(("process_", "python_")):
            continue
        assert re.fullmatch(r"gptjet_[a-z0-9]+(_[a-z0-9]+)*", family.name)
        assert not family.name.endswith(("_ms", "_percent", "_created")), family.name


def test_latency_buckets_reach_from_a_millisecond_to_a_minute() -> None:
    from gptjet.service.observability.metrics import LATENCY_BOUNDS_S

    assert (LATENCY_BOUNDS_S[0], LATENCY_BOUNDS_S[-1]) == (0.001, 60.0)
    ratios = [b / a for a, b in itertools.pairwise(LATENCY_BOUNDS_S)]
    assert min(ratios) > 1
    assert max(ratios) <= 2


async def test_without_the_setting_nothing_counts_and_nothing_listens(
    start_server: StartServer,
) -> None:
    running = await start_server()
    assert running.server.observability.metrics is None
    assert running.server.observability.metrics_port == 0
    assert running.server.engine.engine._watch is None
    assert running.server.observability.request_observers == ()


# --- the port ---


def test_the_port_answers_one_path_only() -> None:
    server = MetricsServer("127.0.0.1", 0, Metrics().registry)
    try:
        status, headers, body = get(server.port)
        assert status == 200
        assert headers["Content-Type"].startswith("text/plain")
        assert b"gptjet_serving 0.0" in body
        status, _, body = get(server.port, "/")
        assert (status, body) == (404, b"the metrics are at /metrics\n")
        status, headers, body = get(server.port, **{"Accept-Encoding": "gzip"})
        assert headers["Content-Encoding"] == "gzip"
        assert b"gptjet_serving 0.0" in gzip.decompress(body)
        accept = "application/openmetrics-text; version=1.0.0"
        _, headers, body = get(server.port, Accept=accept)
        assert headers["Content-Type"].startswith("application/openmetrics-text")
        assert body.endswith(b"# EOF\n")
    finally:
        server.close()


def test_a_port_in_use_is_named_with_its_setting() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ObservabilityError) as caught:
            MetricsServer("127.0.0.1", port, Metrics().registry)
    assert str(caught.value) == (
        f"cannot serve metrics: port {port} on 127.0.0.1 is in use; choose another with "
        "--metrics-port"
    )


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_a_wrong_host_is_named_with_its_setting(host: str) -> None:
    with pytest.raises(ObservabilityError, match=re.escape(host)):
        MetricsServer(host, 0, Metrics().registry)


def test_ipv6_is_listened_on() -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 loopback")
    server = MetricsServer("::1", 0, Metrics().registry)
    try:
        with urllib.request.urlopen(f"http://[::1]:{server.port}/metrics", timeout=20) as answer:
            assert answer.status == 200
    finally:
        server.close()


def test_silent_connections_take_a_bounded_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # So that what is closed is not closed for its silence.
    monkeypatch.setattr("gptjet.service.observability.exposition._Handler.timeout", 600)
    server = MetricsServer("127.0.0.1", 0, Metrics().registry)
    connections = []
    try:
        for _ in range(8):
            connections.append(socket.create_connection(("127.0.0.1", server.port), 20))
        ninth = socket.create_connection(("127.0.0.1", server.port), 20)
        connections.append(ninth)
        assert ninth.recv(1) == b""  # closed at once, where eight keep the threads
        for connection in connections:
            connection.close()
        for _ in range(1000):
            try:
                if get(server.port)[0] == 200:
                    break
            except OSError:  # a thread has not noticed yet
                continue
        else:
            pytest.fail("the threads were never given back")
    finally:
        for connection in connections:
            connection.close()
        server.close()


async def test_the_port_is_closed_when_the_server_has_drained(start_server: StartServer) -> None:
    running = await start_server(metrics_port=0)
    port = running.server.observability.metrics_port
    await running.server.drain(0.0)
    with pytest.raises(OSError, match="refused"):
        await asyncio.to_thread(get, port)


def test_counting_a_step_takes_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """prometheus_client's own values do, and a scrape may hold it: every stream would wait."""
    metrics = Metrics(("Generate",))

    def refuse(*_: Any) -> None:
        raise AssertionError("a value behind a lock")

    for change in ("inc", "set"):
        monkeypatch.setattr(values.ValueClass, change, refuse)
    with pytest.raises(AssertionError, match="behind a lock"):
        metrics.rpc_started()
    for kind in StepKind:
        report = StepReport(0, kind, 2, 3, 4, 5, 6, [7], [8, 9])
        with metrics.registry._lock:
            metrics.step_ended(report)
    text = generate_latest(metrics.registry).decode()
    assert "gptjet_generated_tokens_total 15.0" in text
