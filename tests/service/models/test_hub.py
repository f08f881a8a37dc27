"""Hub names, against a hub of our own on the loopback: what is fetched, and what is refused."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from gptjet.service.models.checkpoint import resolve_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# huggingface_hub reads its endpoint and its cache's place when it is imported: a process each.
RESOLVE = """
import json, sys
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.checkpoint import resolve_checkpoint
try:
    checkpoint = resolve_checkpoint(sys.argv[1], **json.loads(sys.argv[2]))
    files = sorted(path.name for path in checkpoint.path.iterdir())
    print(checkpoint.name, checkpoint.num_parameters, files)
except BackendLoadError as error:
    print("refused:", error)
"""


class Hub:
    """The few addresses of the hub's API that a download asks for, over one folder of files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: Any, *, with_body: bool) -> None:
        path = request.path.split("?")[0]
        headers = {"X-Repo-Commit": COMMIT}
        if path.startswith("/api/models/ours/tiny"):
            body = self._listing("tree" in path)
        elif path.startswith(f"/ours/tiny/resolve/{COMMIT}/"):
            name = path.rsplit("/", 1)[1]
            body = (self.folder / name).read_bytes()
            headers["ETag"] = f'"{hashlib.sha1(body, usedforsecurity=False).hexdigest()}"'
            if with_body:
                self.fetched.append(name)
        else:
            gated = path.startswith("/api/models/ours/gated")
            request.send_response(403 if gated else 404)
            request.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(200)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if with_body:
            request.wfile.write(body)

    def _listing(self, tree: bool) -> bytes:
        names = sorted(path.name for path in self.folder.iterdir())
        if tree:
            return json.dumps(
                [
                    {
                        "type": "file",
                        "path": name,
                        "size": (self.folder / name).stat().st_size,
                        "oid": hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest(),
                    }
                    for name in names
                ]
            ).encode()
        return json.dumps(
            {"id": "ours/tiny", "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
        ).encode()


@pytest.fixture
def hub(make_gptj_checkpoint: Callable[..., Path], tmp_path: Path) -> Iterator[Hub]:
    """A hub with one model, whose repository holds the weights a second time as a pickle."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for path in make_gptj_checkpoint().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "model.onnx").write_bytes(b"another format")
    hub = Hub(folder)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def resolve(
    name: str, endpoint: str, cache: Path, **options: Any
) -> subprocess.CompletedProcess[str]:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", RESOLVE, name, json.dumps(options)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=120,
    )


def test_hub_name_is_downloaded_once_with_a_progress_bar_and_without_pickles(
    hub: Hub, tmp_path: Path
) -> None:
    first = resolve("ours/tiny", hub.endpoint, tmp_path / "cache")
    assert first.stdout.startswith("ours/tiny 462855 ['config.json', "), first.stdout + first.stderr
    assert "model.safetensors" in hub.fetched
    assert {"pytorch_model.bin", "model.onnx"}.isdisjoint(hub.fetched)
    assert "Fetching" in first.stderr
    hub.fetched.clear()
    again = resolve("ours/tiny", hub.endpoint, tmp_path / "cache", local_files_only=True)
    assert again.stdout == first.stdout
    assert hub.fetched == []


def test_pickles_are_fetched_only_where_allowed_and_nothing_else_is_there(
    hub: Hub, tmp_path: Path
) -> None:
    resolve("ours/tiny", hub.endpoint, tmp_path / "one", allow_pickle=True)
    assert "pytorch_model.bin" not in hub.fetched
    (hub.folder / "model.safetensors").unlink()
    refused = resolve("ours/tiny", hub.endpoint, tmp_path / "two")
    assert "ours/tiny has no safetensors weights on the hub" in refused.stdout
    assert "--allow-pickle" in refused.stdout
    resolve("ours/tiny", hub.endpoint, tmp_path / "three", allow_pickle=True)
    assert "pytorch_model.bin" in hub.fetched


def test_model_the_hub_does_not_have_is_one_line(hub: Hub, tmp_path: Path) -> None:
    refused = resolve("ours/other", hub.endpoint, tmp_path / "cache")
    assert "ours/other is not a folder here, and the hub has no such model" in refused.stdout
    assert refused.stdout.count("\n") == 1


def test_unreachable_hub_is_one_line(tmp_path: Path) -> None:
    # Port 9 (discard) refuses connections.
    refused = resolve("ours/tiny", "http://127.0.0.1:9", tmp_path / "cache")
    assert "refused: ours/tiny is not a folder here, and the hub could not be reached: " in (
        refused.stdout
    )
    assert refused.stdout.count("\n") == 1


def test_local_files_only_never_asks_the_hub(hub: Hub, tmp_path: Path) -> None:
    refused = resolve("ours/tiny", hub.endpoint, tmp_path / "cache", local_files_only=True)
    assert "the hub's cache on this machine does not hold it" in refused.stdout
    assert hub.fetched == []


def test_folder_never_asks_the_hub(
    make_gptj_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unexpected(*arguments: object, **options: object) -> None:
        raise AssertionError("a folder is offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unexpected)
    assert resolve_checkpoint(str(make_gptj_checkpoint())).model_type == "gptj"


def test_gated_model_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    refused = resolve("ours/gated", hub.endpoint, tmp_path / "cache")
    assert "ours/gated is gated on the hub: accept its terms" in refused.stdout
