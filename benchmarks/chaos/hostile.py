"""Ten thousand hostile requests: drawn from the contract's shapes, and found by following coverage.

The first half is property-based: hypothesis draws messages from the descriptors that the server's
own reflection gives (so nothing here knows the contract), damages their bytes, and adds hostile
metadata. The second half is what a coverage-guided fuzzer found worth sending to the server's code
in a process of its own (`gptjet.service.fuzz_target`). Last come bytes that are not HTTP/2 at all.
Every request must end with a status that says what was wrong, and the server must go on.
"""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from gptjet.benchmarks.chaos.scenario import Findings, Plan
from gptjet.benchmarks.chaos.server import ChaosServer
from gptjet.benchmarks.chaos.storm import probe
from gptjet.benchmarks.server_process import environment_without_settings

_DRAWN, _GUIDED, _RAW = 5000, 5000, 200
_FUZZ_TIMEOUT_S = 600.0
_CALL_TIMEOUT_S = 10.0
# What a hostile request may end with. Never UNKNOWN, INTERNAL, UNAVAILABLE or DATA_LOSS.
ALLOWED = frozenset(
    {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.NOT_FOUND,  # what grpc.health.v1 prescribes for an unknown service
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
_INTEGERS = (0, 1, 2, 17, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, -1, -(2**31))
_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 3.4e38, float("inf"), float("-inf"), float("nan"), 1e308)
_TEXTS = ("", "\x00", "a" * 3000, "\U0001f600" * 50, "\u202e\ufeff", "<|endoftext|>", "\n" * 500)
_RECORD_HEAD_BYTES = 5

Request = tuple[str, bytes, tuple[tuple[str, str | bytes], ...]]


def run(plan: Plan) -> Findings:
    """Send everything to a server of the mock, whose speed leaves the time to the requests."""
    found = Findings()
    ends: dict[str, Counter[str]] = {}
    with ChaosServer("--log-level=error", backend="mock", model="mock") as server:
        expected = probe(server.target)
        with grpc.insecure_channel(server.target) as channel:
            caller = Caller(channel)
            methods = methods_of(channel)
            plan.report(f"  {plan.count(_DRAWN)} requests drawn over {len(methods)} methods")
            ends["property-based"] = send_drawn(caller, methods, plan)
            plan.report(f"  {plan.count(_GUIDED)} requests of the coverage-guided fuzzer")
            with tempfile.TemporaryDirectory(prefix="gptjet-chaos-fuzz-") as folder:
                guided, inputs, edges = guided_requests(Path(folder), plan)
                ends["coverage-guided"] = Counter(caller.send(request) for request in guided)
        plan.report("  bytes that are not HTTP/2")
        raw = plan.count(_RAW, least=20)
        ends["not HTTP/2"] = send_raw(server.port, raw, plan.seed)
        sent = sum(sum(kinds.values()) for kinds in ends.values())
        strays = {f"{kind}: {end}" for kind, each in ends.items() for end in each if "!" in end}
        found.equal("answers that are no clear status", sorted(strays), [])
        found.equal("the server is up", server.is_serving(), True)
        found.equal("held afterwards", sum(server.wait_until_idle(10.0).values()), 0)
        found.equal("errors in the server's log", errors_in(server.log_text()), [])
        found.equal("the same request, the same tokens", probe(server.target), expected)
        found.equal("exit code", server.stop(), 0)
        found.figures = {
            "requests": sent,
            "ends": {kind: dict(each.most_common()) for kind, each in ends.items()},
            "fuzzer_inputs_in_process": inputs,
            "fuzzer_coverage": edges,
        }
    wanted = plan.count(_DRAWN) + plan.count(_GUIDED) + raw
    found.check("requests sent", sent >= wanted, sent, f"at least {wanted}")
    return found


def errors_in(log: str) -> list[str]:
    """Lines of errors and of tracebacks, shortened."""
    marks = ("Traceback", "internal error", "[error", "Fatal Python")
    return [line[:200] for line in log.splitlines() if any(mark in line for mark in marks)]


class Caller:
    """Sends bytes to methods by their paths and names how each call ended."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def send(self, request: Request) -> str:
        """A status, or one that begins with "!" where it is not a clear one."""
        path, data, metadata = request
        # As a stream whatever the method is: a unary answer is a stream of one.
        call = self._channel.unary_stream(
            path, request_serializer=bytes, response_deserializer=bytes
        )
        try:
            for _ in call(data, timeout=_CALL_TIMEOUT_S, metadata=metadata):
                pass
        except grpc.RpcError as error:
            code, words = error.code(), error.details() or ""
            if code not in ALLOWED or not words:
                return f"!{code.name}: {words[:100]}"
            return str(code.name)
        except ValueError:
            return "refused by the client's own library"  # such as a key that HTTP/2 has not
        return "OK"


# ---- property-based -----------------------------------------------------------------------------


def methods_of(channel: grpc.Channel) -> list[MethodDescriptor]:
    """Every method that takes one message, from the server's reflection."""
    database = ProtoReflectionDescriptorDatabase(channel)
    pool = DescriptorPool(database)
    return [
        method
        for service in database.get_services()
        for method in pool.FindServiceByName(service).methods
        if not method.client_streaming and not _never_ends(method)
    ]


def _never_ends(method: MethodDescriptor) -> bool:
    return method.full_name == "grpc.health.v1.Health.Watch"


def send_drawn(caller: Caller, methods: Sequence[MethodDescriptor], plan: Plan) -> Counter[str]:
    """Requests that hypothesis draws; how many ended in which way."""
    ends: Counter[str] = Counter()

    @seed(plan.seed)
    @settings(
        max_examples=plan.count(_DRAWN),
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(requests(methods))
    def send(request: Request) -> None:
        ends[caller.send(request)] += 1

    send()
    # hypothesis stops early where it believes to have drawn everything there is
    rng = random.Random(plan.seed)
    while sum(ends.values()) < plan.count(_DRAWN):
        method = rng.choice(methods)
        ends[caller.send((path_of(method), rng.randbytes(rng.randint(0, 200)), ()))] += 1
    return ends


def path_of(method: MethodDescriptor) -> str:
    """As gRPC calls it: /package.Service/Method."""
    return f"/{method.containing_service.full_name}/{method.name}"


def requests(methods: Sequence[MethodDescriptor]) -> st.SearchStrategy[Request]:
    """Method, bytes and metadata. One path in twenty is made up."""

    @st.composite
    def draw_request(draw: st.DrawFn) -> Request:
        method = draw(st.sampled_from(methods))
        path = path_of(method)
        if draw(st.integers(0, 19)) == 0:
            path = "/" + draw(st.text("abcZ./_-0", max_size=30))
        message = draw(messages(method.input_type))
        return path, draw(damaged(message.SerializeToString())), draw(metadata())

    return draw_request()


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor, depth: int = 0) -> Any:
    """A message with any of its fields, each with a usual or an extreme value."""
    message = message_factory.GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if not draw(st.booleans()):
            continue
        try:
            _fill(draw, message, field, depth)
        except (ValueError, TypeError, UnicodeError):
            continue  # a value that the library itself will not put into such a field
    return message


def _fill(draw: st.DrawFn, message: Any, field: FieldDescriptor, depth: int) -> None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        values = field.message_type.fields_by_name["value"]
        for _ in range(draw(st.integers(0, 4))):
            key = draw(st.sampled_from(_INTEGERS))
            getattr(message, field.name)[key] = _value(draw, values)
    elif field.message_type is not None:
        if depth > 2:
            return
        inner = [
            draw(messages(field.message_type, depth + 1))
            for _ in range(draw(st.integers(0, 3)) if field.is_repeated else 1)
        ]
        target = getattr(message, field.name)
        if field.is_repeated:
            target.extend(inner)
        else:
            for each in inner:
                target.CopyFrom(each)
    elif field.is_repeated:
        count = draw(st.sampled_from((0, 1, 3, 17, 400)))
        getattr(message, field.name).extend([_value(draw, field)] * count)
    else:
        setattr(message, field.name, _value(draw, field))


def _value(draw: st.DrawFn, field: FieldDescriptor) -> Any:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        text = draw(st.one_of(st.sampled_from(_TEXTS), st.text(max_size=40)))
        return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return draw(st.booleans())
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return draw(st.one_of(st.sampled_from(_FLOATS), st.floats(-3, 3, width=32)))
    return draw(st.one_of(st.sampled_from(_INTEGERS), st.integers(0, 300)))


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Half of the time the bytes themselves, else cut, changed, doubled or anything at all."""
    match draw(st.integers(0, 9)):
        case 0 if data:
            return data[: draw(st.integers(0, len(data) - 1))]
        case 1 if data:
            at = draw(st.integers(0, len(data) - 1))
            return data[:at] + draw(st.binary(min_size=1, max_size=4)) + data[at + 1 :]
        case 2:
            return data + data
        case 3:
            return draw(st.binary(max_size=300))
        case 4 if data:
            at = draw(st.integers(0, len(data)))
            return data[:at] + b"\xff\xfe\x80" + data[at:]
    return data


@st.composite
def metadata(draw: st.DrawFn) -> tuple[tuple[str, str | bytes], ...]:
    """Up to three entries: names that mean something to servers, and others."""
    names = ("authorization", "traceparent", "tracestate", "user-agent", "x-request-id", "te")
    printable = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=200)
    entries: list[tuple[str, str | bytes]] = []
    for _ in range(draw(st.sampled_from((0, 0, 1, 3)))):
        if draw(st.booleans()):
            entries.append((draw(st.sampled_from(names)), draw(printable)))
        else:
            key = draw(st.text("abcxyz019_-.", min_size=1, max_size=20))
            entries.append((f"{key}-bin", draw(st.binary(max_size=300))))
    return tuple(entries)


# ---- coverage-guided ----------------------------------------------------------------------------


def guided_requests(folder: Path, plan: Plan) -> tuple[list[Request], int, str]:
    """Inputs of the fuzzer as requests, how many it tried in its process, and what it covered.

    Raises RuntimeError where it found a fault in its own process: its last words name the input.
    """
    wanted = plan.count(_GUIDED)
    record = folder / "inputs"
    command = [
        *(sys.executable, "-m", "gptjet.service.fuzz_target", "--record", str(record)),
        *("--corpus", str(folder / "corpus"), "--runs", str(4 * wanted), "--seed", str(plan.seed)),
    ]
    fuzzer = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=_FUZZ_TIMEOUT_S,
        check=False,
        cwd=folder,
        env=environment_without_settings(),
    )
    if fuzzer.returncode:
        raise RuntimeError(f"the fuzzer ended with {fuzzer.returncode}: {fuzzer.stderr[-1500:]}")
    inputs = list(read_record(record))
    edges = [line for line in fuzzer.stderr.splitlines() if " cov: " in line]
    # The latest ones reach deepest.
    return inputs[-wanted:], len(inputs), edges[-1].strip() if edges else "unknown"


def read_record(path: Path) -> Iterator[Request]:
    """The (path, bytes) pairs that the fuzz target wrote: two lengths, then both."""
    data = path.read_bytes()
    position = 0
    while position + _RECORD_HEAD_BYTES <= len(data):
        name = data[position]
        length = int.from_bytes(data[position + 1 : position + _RECORD_HEAD_BYTES], "little")
        position += _RECORD_HEAD_BYTES
        method = data[position : position + name].decode()
        yield method, data[position + name : position + name + length], ()
        position += name + length


# ---- not HTTP/2 ---------------------------------------------------------------------------------


def send_raw(port: int, count: int, seed_: int) -> Counter[str]:
    """Connections that send nonsense, or HTTP/2 up to some point and nonsense after it."""
    rng = random.Random(seed_)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    empty_settings = bytes(3) + b"\x04" + bytes(5)
    ends: Counter[str] = Counter()
    for _ in range(count):
        begin = rng.choice((b"", preface, preface[:10], preface + empty_settings))
        ends[_send_bytes(port, begin + rng.randbytes(rng.randint(1, 4000)))] += 1
    return ends


def _send_bytes(port: int, data: bytes) -> str:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=_CALL_TIMEOUT_S) as connection:
            connection.settimeout(0.05)
            connection.sendall(data)
            started = time.monotonic()
            while time.monotonic() - started < 0.2:
                if not connection.recv(65536):
                    return "closed by the server"
    except TimeoutError:
        return "left open, closed by us"  # it may wait for the rest of a frame
    except OSError:
        return "closed by the server"
    return "answered, closed by us"
