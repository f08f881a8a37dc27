"""`python -m gptjet.benchmarks.peers`: worker processes, conversion, refusals."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from gptjet.benchmarks.peers.__main__ import main
from gptjet.benchmarks.peers.environments import PeerError, converted, find_peer
from gptjet.benchmarks.results import read_records


def test_transformers_and_our_server_give_the_same_greedy_tokens(
    make_gptj_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what `run` sets is taken back
    model, out = make_gptj_checkpoint(), tmp_path / "peers.jsonl"
    arguments = ["run", "--model", str(model), "transformers", "gptjet:huggingface"]
    arguments += ["--input", "6", "--output", "5", "--rounds", "2", "--threads", "1"]
    assert main([*arguments, "--out", str(out)]) == 0
    session, *runs, base, ours = read_records(out)
    assert session["contestants"] == ["transformers", "gptjet:huggingface"]
    assert [(each["round"], each["contestant"]) for each in runs] == [
        (0, "transformers"),
        (0, "gptjet:huggingface"),
        (1, "gptjet:huggingface"),
        (1, "transformers"),
    ]
    for each in runs:
        assert len(each["tokens"]) == len(each["token_ms"]) == 5
        assert each["token_ms"] == sorted(each["token_ms"])
        assert 0 < each["ttft_ms"] < each["e2e_ms"]
    assert runs[0]["tokens"] == runs[1]["tokens"]
    assert (base["equal_tokens"], ours["equal_tokens"]) == (1, 1)
    assert base["peak_memory_bytes"] > 50 * 2**20
    assert "gptjet:huggingface" in capsys.readouterr().out


def fake_environment(root: Path, name: str, script: str) -> None:
    """An environment whose converter is a shell script; no interpreter is started in it."""
    binaries = root / name / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").write_text("")
    converter = binaries / "ct2-transformers-converter"
    converter.write_text(f"#!/bin/sh\n{script}\n")
    converter.chmod(converter.stat().st_mode | stat.S_IXUSR)


def test_a_conversion_is_made_once_and_again_when_the_checkpoint_changes(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    fake_environment(tmp_path, "ctranslate2", f'mkdir "$4"; echo x >> {tmp_path}/calls')
    peer = find_peer("ctranslate2")
    first = converted(peer, model, "fp32", tmp_path)
    assert first == converted(peer, model, "fp32", tmp_path)
    assert (tmp_path / "calls").read_text() == "x\n"
    later = first.stat().st_mtime + 10
    os.utime(model / "config.json", (later, later))
    converted(peer, model, "fp32", tmp_path)
    assert (tmp_path / "calls").read_text() == "x\nx\n"


def test_a_conversion_that_fails_leaves_nothing_that_looks_like_one(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    fake_environment(tmp_path, "ctranslate2", 'mkdir "$4"; echo no such weights >&2; exit 1')
    with pytest.raises(PeerError, match="ct2-transformers-converter failed: no such weights"):
        converted(find_peer("ctranslate2"), model, "fp32", tmp_path)
    assert not (tmp_path / "models" / "model-ctranslate2-fp32").exists()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["vllm"], "unknown peer 'vllm'"),
        (["ctranslate2"], "ctranslate2 is not set up: python -m"),
        (["transformers", "transformers"], "named twice"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(
    names: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 9}))
    where = ["--root", str(tmp_path / "root"), "run", "--model", str(tmp_path)]
    assert main([*where, *names, "--out", str(tmp_path / "out.jsonl")]) == 1
    assert words in capsys.readouterr().err


def test_a_weight_type_that_the_peer_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="openvino has fp32, int8, not bf16"):
        converted(find_peer("openvino"), tmp_path, "bf16", tmp_path)
