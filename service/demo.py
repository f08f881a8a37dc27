"""`make demo`: from nothing to streamed tokens, with the server and the client that users have.

It starts `gptjet serve` on a free port, waits for its health, streams two completions through the
gRPC client and stops the server again, whatever happens in between.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO, Unpack

from rich.console import Console

from gptjet.service import embedded
from gptjet.service.client import (
    Client,
    DeadlineExceededError,
    GptjetError,
    HealthStatus,
    SamplingOptions,
    UnavailableError,
)
from gptjet.service.commands.output import summary_line
from gptjet.service.commands.terminal import printable

_START_TIMEOUT_S = 300.0  # a cold page cache, imports and a busy machine; the model takes seconds
_STOP_TIMEOUT_S = 60.0
_CALL_TIMEOUT_S = 120.0
_LOG_TAIL_LINES = 20
_PROMPT_WORDS = 12
_REVIEW_SOURCES = ("movie", "amazon")
_CLEAR_RATING = 2.0  # of 4
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # treated as Ctrl-C

console = Console(highlight=False, soft_wrap=True)


class DemoError(Exception):
    """The demo did not go as it should; the message is one line."""


@dataclass(frozen=True)
class Review:
    """A text to continue and to judge; what people thought of it, where known."""

    text: str
    verdict: str = ""

    @property
    def beginning(self) -> str:
        """The words that the model is to go on from."""
        return " ".join(self.text.split()[:_PROMPT_WORDS])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit code: 0, 1 on a failure, 130 if interrupted."""
    options = _parse(arguments)
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    with tempfile.TemporaryDirectory(prefix="gptjet-demo-") as folder:
        log = Path(folder, "server.log")
        try:
            _run(options, Path(folder), log)
        except KeyboardInterrupt:
            console.print("\ninterrupted; the server is stopped")
            return 130
        except (DemoError, GptjetError, OSError) as error:
            console.print(f"\nthe demo failed: {error}", style="bold red", markup=False)
            _print_tail(log)
            return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gptjet.service.demo", description=__doc__)
    parser.add_argument("--model", default=embedded.EMBEDDED_NAME, help="as for gptjet serve")
    parser.add_argument("--backend", default="auto", help="as for gptjet serve")
    parser.add_argument("--text", help="your own review instead of one from the held-out texts")
    return parser.parse_args(arguments)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    # As Ctrl-C: unwinds through the block that stops the server.
    raise KeyboardInterrupt


def _run(options: argparse.Namespace, folder: Path, log: Path) -> None:
    review = Review(options.text) if options.text else _heldout_review()
    port_file = folder / "port"
    command = [
        *(sys.executable, "-m", "gptjet.service.cli", "serve"),
        *("--model", options.model, "--backend", options.backend),
        *("--port", "0", "--port-file", str(port_file)),
    ]
    shown = f"gptjet serve --model {options.model} --backend {options.backend} --port 0"
    console.print(f"$ {shown}", style="dim", markup=False)
    with log.open("w", encoding="utf-8") as log_file, _server(command, log_file) as server:
        port = _wait_for_port(server, port_file)
        with Client(f"127.0.0.1:{port}", timeout_s=_CALL_TIMEOUT_S) as client:
            _wait_until_serving(server, client)
            model = client.get_model()
            console.print(
                f"serving {model.name}: {model.num_parameters:,} parameters, {model.backend} "
                f"backend on {model.device}, {model.dtype}",
                style="dim",
                markup=False,
            )
            _show(
                client,
                "A review, continued",
                review.beginning,
                max_new_tokens=60,
                min_new_tokens=24,  # the model likes to end a sentence early; this is to be watched
                temperature=0.8,
                seed=7,
            )
            _show(
                client,
                "The same review, judged",
                embedded.build_prompt(review.text),
                max_new_tokens=48,
                stop=["\n\n"],
            )
            if review.verdict:
                console.print(review.verdict, style="dim", markup=False)
        _stop(server)
    console.print("\nserver stopped, exit code 0")


def _heldout_review() -> Review:
    """The first held-out review that is long enough to be cut and has a clear tone."""
    for row in embedded.heldout_rows():
        is_long = len(row.text.split()) >= 2 * _PROMPT_WORDS
        if row.source in _REVIEW_SOURCES and is_long and abs(row.mean_rating) >= _CLEAR_RATING:
            rating = f"people rated it {row.mean_rating:+.1f} (from -4 to 4): {row.label}"
            return Review(row.text, rating)
    raise DemoError("no held-out review is long and clear enough")


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """A signal that comes inside the block interrupts at its end. For the main thread."""
    held: list[int] = []

    def hold(number: int, _frame: FrameType | None) -> None:
        held.append(number)

    previous = {number: signal.signal(number, hold) for number in (signal.SIGINT, *_SIGNALS)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if held:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _server(command: Sequence[str], log_file: TextIO) -> Iterator[subprocess.Popen[bytes]]:
    """The server's process; it has ended when the block is left, however that happens."""
    # Settings in the caller's environment are for the caller's own server.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GPTJET_")}
    server: subprocess.Popen[bytes] | None = None
    try:
        # Interrupted in between, there would be a process and nobody who knows of it.
        with _interrupts_held():
            server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C goes to a terminal's whole process group: only the demo is to hear it.
                start_new_session=True,
            )
        yield server
    finally:
        if server is not None and server.poll() is None:
            server.terminate()
            try:
                server.wait(timeout=5)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                server.kill()
                server.wait()


def _wait_for_port(server: subprocess.Popen[bytes], port_file: Path) -> int:
    with console.status("starting the server"):
        end = time.monotonic() + _START_TIMEOUT_S
        while not port_file.exists():
            _check_alive(server)
            if time.monotonic() > end:
                raise DemoError(f"the server does not listen after {_START_TIMEOUT_S:.0f} s")
            time.sleep(0.05)
    return int(port_file.read_text(encoding="ascii"))


def _wait_until_serving(server: subprocess.Popen[bytes], client: Client) -> None:
    end = time.monotonic() + _START_TIMEOUT_S
    with console.status("loading the model"):
        while not _is_serving(client):
            _check_alive(server)
            if time.monotonic() > end:
                raise DemoError(f"the server does not serve after {_START_TIMEOUT_S:.0f} s")
            time.sleep(0.05)


def _is_serving(client: Client) -> bool:
    try:
        return client.health() is HealthStatus.SERVING
    except (DeadlineExceededError, UnavailableError):
        return False  # too busy loading to answer, or ended, which the process itself tells


def _check_alive(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is not None:
        raise DemoError(f"the server ended with exit code {server.returncode}")


def _show(client: Client, title: str, prompt: str, **options: Unpack[SamplingOptions]) -> None:
    """Stream one completion after its prompt, and say how fast it was."""
    console.print(f"\n{title}", style="bold")
    _write(prompt, dim=True)
    with client.generate_stream(prompt, **options) as stream:
        for chunk in stream:
            _write(chunk.text)
    if stream.summary is None:
        raise DemoError("the server ended the stream without a summary")
    console.print(f"\n{summary_line(stream.summary)}", style="dim", markup=False)


def _write(text: str, *, dim: bool = False) -> None:
    # Not through rich, which would hold back and wrap what comes token by token.
    codes = ("\x1b[2m", "\x1b[0m") if dim and sys.stdout.isatty() else ("", "")
    sys.stdout.write(codes[0] + printable(text) + codes[1])
    sys.stdout.flush()


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGTERM)
    try:
        code = server.wait(timeout=_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise DemoError(f"the server does not stop after {_STOP_TIMEOUT_S:.0f} s") from None
    if code != 0:
        raise DemoError(f"the server stopped with exit code {code}")


def _print_tail(log: Path) -> None:
    with contextlib.suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        if lines:
            console.print("the end of the server's log:", style="dim")
        for line in lines:
            console.print(f"  {line}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
