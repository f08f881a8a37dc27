"""Every method of every service, without credentials, with wrong ones and with revoked ones."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import grpc

from gptjet.benchmarks.chaos.hostile import methods_of, path_of
from gptjet.benchmarks.chaos.scenario import Findings, Plan
from gptjet.benchmarks.chaos.server import ChaosServer
from gptjet.benchmarks.server_process import environment_without_settings

_UNKNOWN = ("/gptjet.v1.TextGeneration/Nothing", "/nobody.v1.Nothing/Knows", "/", "/x")
_STREAMS_OF_REQUESTS = (
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.health.v1.Health/Watch",
)
_TIMEOUT_S = 5.0


def run(plan: Plan) -> Findings:
    """Ask an open server for its methods, then try each of them on a closed one."""
    plan.report("  every method of every service")
    found = Findings()
    quiet = "--log-level=warning"
    with ChaosServer(quiet, backend="mock", model="mock") as server:
        with grpc.insecure_channel(server.target) as channel:
            paths = [path_of(method) for method in methods_of(channel)]
        server.stop()
    paths += [*_STREAMS_OF_REQUESTS, *_UNKNOWN]
    with tempfile.TemporaryDirectory(prefix="gptjet-chaos-access-") as folder:
        tokens = Path(folder) / "tokens.toml"
        good = _tokens(tokens, "create", "good")
        revoked = _tokens(tokens, "create", "revoked")
        _tokens(tokens, "revoke", "revoked")
        flags = (quiet, f"--tokens-file={tokens}", "--open-health")
        with ChaosServer(*flags, backend="mock", model="mock") as server:
            with grpc.insecure_channel(server.target) as channel:
                _wait_until_refused(channel)
                for name, values in (
                    ("no credentials", ()),
                    ("a wrong token", ("Bearer gptjet_wrong",)),
                    ("a revoked token", (f"Bearer {revoked}",)),
                    ("another scheme", (f"Basic {good}",)),
                    ("a token of 7 kB", ("Bearer " + "a" * 7000,)),
                    ("two headers", ("Bearer gptjet_wrong", f"Bearer {good}")),
                ):
                    answers = _try_all(channel, paths, values)
                    found.figures[name] = dict(answers)
                    let_in = {
                        end: number
                        for end, number in answers.items()
                        if end not in ("UNAUTHENTICATED", "health")
                    }
                    found.equal(f"{name}: answered by any of {len(paths)} methods", let_in, {})
                model = _call(channel, "/gptjet.v1.TextGeneration/GetModel", (f"Bearer {good}",))
                found.equal("a good token", model, "OK")
                log = server.log_text()
            found.equal("tokens in the log", [t for t in (good, revoked) if t in log], [])
            found.equal("exit code", server.stop(), 0)
    return found


def _tokens(file: Path, verb: str, name: str) -> str:
    """What `gptjet tokens` prints: of `create`, the token."""
    command = [
        *(sys.executable, "-m", "gptjet.service.cli", "tokens", verb, name),
        f"--file={file}",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment_without_settings()
    )
    return done.stdout.strip()


def _wait_until_refused(channel: grpc.Channel) -> None:
    """The server is up once it refuses; its health answers before the token file is in use."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if _call(channel, "/gptjet.v1.TextGeneration/GetModel", ()) == "UNAUTHENTICATED":
            return
        time.sleep(0.1)


def _try_all(channel: grpc.Channel, paths: Sequence[str], values: Sequence[str]) -> Counter[str]:
    answers: Counter[str] = Counter()
    for path in paths:
        # its health is open by the flag: probes have no tokens
        is_health = path.startswith("/grpc.health.v1.")
        answers["health" if is_health else _call(channel, path, values)] += 1
    return answers


def _call(channel: grpc.Channel, path: str, values: Sequence[str]) -> str:
    """The status of an empty request with these `authorization` headers."""
    method = channel.unary_stream(path, request_serializer=bytes, response_deserializer=bytes)
    metadata = tuple(("authorization", value) for value in values)
    try:
        for _ in method(b"", timeout=_TIMEOUT_S, metadata=metadata):
            pass
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code.name
    return "OK"
