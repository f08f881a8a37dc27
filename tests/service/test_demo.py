"""`make demo` as a process: what a person sees, its exit codes, and that no server is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gptjet.service import embedded
from gptjet.service.demo import _heldout_review, _interrupts_held

REVIEW = "This was a wonderful film, I laughed and cried and would gladly see it again, at once."
COMMAND = [sys.executable, "-m", "gptjet.service.demo"]
SUMMARY = re.compile(r"^TTFT \d+\.\d ms · \d+\.\d tokens/s · \d+ tokens · \w+$", re.MULTILINE)


def environment(tmp_path: Path) -> dict[str, str]:
    # The demo's folder is under TMPDIR, so its server is recognised by its command line; and the
    # settings are a caller's, which must not reach the demo's server.
    return os.environ | {"TMPDIR": str(tmp_path), "GPTJET_PORT": "1", "GPTJET_NONSENSE": "x"}


def servers_of(tmp_path: Path) -> list[str]:
    """Command lines of the processes that name `tmp_path`: the demo's server."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        if str(tmp_path) in line and " serve " in line:
            found.append(line)
    return found


@contextmanager
def demo(tmp_path: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*COMMAND, *arguments],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_it_streams_two_completions_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with demo(tmp_path, "--backend", "mock", "--text", REVIEW) as process:
        shown, _ = process.communicate(timeout=240)
    assert process.returncode == 0, shown
    assert "$ gptjet serve --model embedded --backend mock --port 0" in shown
    assert "\nThis was a wonderful film, I laughed and cried and would gladly" in shown
    assert f"\nText: {REVIEW}\nSentiment:abcdefgh" in shown
    assert len(SUMMARY.findall(shown)) == 2
    assert shown.endswith("server stopped, exit code 0\n")
    assert "\x1b" not in shown  # no terminal, no colours
    assert servers_of(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_the_review_is_the_first_long_and_clear_one_of_the_heldout_texts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def row(name: str, source: str, words: int, rating: float) -> embedded.HeldoutRow:
        text = " ".join([name] * words)
        return embedded.HeldoutRow("id", source, text, rating, "negative")

    rows = (
        row("tweet", "tweet", 40, -3.0),
        row("short", "movie", 10, -3.0),
        row("unclear", "movie", 40, -1.0),
        row("wanted", "amazon", 30, -2.5),
        row("later", "movie", 40, 3.0),
    )
    monkeypatch.setattr(embedded, "heldout_rows", lambda: rows)
    review = _heldout_review()
    assert review.text == rows[3].text
    assert review.beginning == " ".join(["wanted"] * 12)
    assert review.verdict == "people rated it -2.5 (from -4 to 4): negative"


def test_a_server_that_does_not_start_is_shown_with_its_log(tmp_path: Path) -> None:
    with demo(tmp_path, "--backend", "nope", "--text", REVIEW) as process:
        shown, _ = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "the demo failed: the server ended with exit code 2" in shown
    assert "unknown backend 'nope'" in shown
    assert "Traceback" not in shown
    assert servers_of(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_waits_until_the_started_server_is_known(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    known = []

    def start() -> None:
        with _interrupts_held():
            signal.raise_signal(number)
            known.append("the server")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert known
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_it_stops_its_server(tmp_path: Path, number: signal.Signals) -> None:
    with demo(tmp_path, "--backend", "mock", "--text", REVIEW) as process:
        end = time.monotonic() + 120
        while not servers_of(tmp_path):
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(number)
        shown, _ = process.communicate(timeout=240)
    # As a shell counts. Python ends itself by SIGINT, rather than with the code it was given, when
    # the interrupt once came in the middle of an exec(), as dataclasses use in an import.
    code = process.returncode
    assert (code if code >= 0 else 128 - code) == 130, shown
    assert "interrupted" in shown
    assert servers_of(tmp_path) == []


@pytest.mark.skipif(
    not (embedded.embedded_path() / "heldout.jsonl").exists(),
    reason="the embedded checkpoint is not there",
)
def test_the_embedded_checkpoint_judges_a_real_review(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        shown, _ = process.communicate(timeout=280)
    assert process.returncode == 0, shown
    assert re.search(r"\nSentiment: (positive|negative|neutral)\nExplanation: \w", shown), shown
    assert re.search(r"people rated it [+-]\d\.\d", shown)
    assert len(SUMMARY.findall(shown)) == 2
