"""`python -m gptjet.benchmarks.peers`: worker processes, conversion, refusals."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from gptjet.benchmarks.peers.__main__ import main
from gptjet.benchmarks.peers.contestants import LateContestant, StreamsContestant, start
from gptjet.benchmarks.peers.environments import PeerError, converted, find_peer, quantized
from gptjet.benchmarks.results import read_records
from gptjet.service.embedded import embedded_path


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


@pytest.mark.parametrize("flag", ["--input", "--output", "--rounds", "--threads"])
def test_a_number_below_one_is_refused_by_its_flag(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["run", "--model", str(tmp_path), "transformers", flag, "0"])
    assert done.value.code == 2
    assert f"argument {flag}: must be a whole number, 1 or more, got 0" in capsys.readouterr().err


def test_the_engine_and_the_server_give_transformers_tokens_and_say_their_memory(
    make_gptj_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # A setting of the caller's reaches neither: both would fail on it.
    monkeypatch.setenv("GPTJET_MODEL", "no/such/model")
    names = ["engine:huggingface", "gptjet:huggingface"]
    arguments = ["run", "--model", str(make_gptj_checkpoint()), *names, "--threads", "1"]
    arguments += ["--input", "6", "--output", "5", "--rounds", "1"]
    assert main([*arguments, "--out", str(tmp_path / "out.jsonl")]) == 0
    _, first, second, engine, server = read_records(tmp_path / "out.jsonl")
    assert (first["contestant"], second["contestant"]) == tuple(names)
    assert (engine["equal_tokens"], server["equal_tokens"]) == (1, 1)
    assert min(engine["peak_memory_bytes"], server["peak_memory_bytes"]) > 50 * 2**20


@pytest.mark.parametrize("name", ["engine:mock", "gptjet:mock"])
def test_streams_of_ours_run_together(name: str, tmp_path: Path) -> None:
    with start(name, tmp_path, "fp32", 1, kv_cache_tokens=256) as contestant:
        assert isinstance(contestant, StreamsContestant)
        first, second = contestant.run_together([list(b"a"), list(b"k")], 3)
        assert (bytes(first.tokens), bytes(second.tokens)) == (b"bcd", b"lmn")
        assert len(first.token_ms) == len(second.token_ms) == 3
        # 256 tokens of KV cache were asked for, and a longer prompt can never fit.
        with pytest.raises(PeerError, match="KV cache of 256 tokens"):
            contestant.run([1] * 300, 2)
        assert bytes(contestant.run(list(b"x"), 2).tokens) == b"yz"


def test_options_of_our_engine_reach_its_process(
    make_gptj_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """PyTorch under the promise computes one token a pass, and gives the same tokens."""
    folder = make_gptj_checkpoint()
    names = ["engine:fused", "engine:fused+torch+deterministic"]
    answers = []
    for name in names:
        with start(name, folder, "fp32", 1, kv_cache_tokens=64) as contestant:
            answers.append(contestant.run([5, 6, 7], 4).tokens)
            if isinstance(contestant, LateContestant):
                runs, late = contestant.run_beside([[1], [2]], 6, [3] * 20, 2)
                assert [len(run.tokens) for run in runs] == [6, 6]
                assert runs[0].token_ms[1] <= late.added_ms
    assert answers[0] == answers[1]
    with (
        pytest.raises(PeerError, match="no option 'fast': deterministic, torch"),
        start("engine:fused+fast", tmp_path, "fp32", 1),
    ):
        pass


def test_a_contestant_that_cannot_start_leaves_no_process(tmp_path: Path) -> None:
    with (
        pytest.raises(PeerError, match="unknown backend 'nonsense'"),
        start("engine:nonsense", tmp_path, "fp32", 1),
    ):
        pass
    with (
        pytest.raises(PeerError, match="no backend has such a name"),
        start("engine:No Such", tmp_path, "fp32", 1),
    ):
        pass


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


def test_ours_reads_a_copy_quantised_beforehand_as_the_peers_do(tmp_path: Path) -> None:
    model = embedded_path()
    assert quantized(model, "fp32", tmp_path) == model
    folder = quantized(model, "int8", tmp_path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    recipe = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (recipe["quant_method"], recipe["bits"], recipe["method"]) == ("gptjet", 8, "rtn")
    assert quantized(model, "int8", tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
