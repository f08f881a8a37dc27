"""The package: missing, on another accelerator, noisy. And the memory a load takes."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptjet.service.backends.deepspeed import runtime
from gptjet.service.engine.errors import BackendLoadError


def test_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "deepspeed_installed", lambda: False)
    with pytest.raises(
        BackendLoadError, match=r"DS_BUILD_OPS=0 pip install .*'gptjet\[deepspeed\]'"
    ):
        runtime.import_deepspeed(torch.device("cpu"))


def test_package_that_took_another_accelerator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendLoadError, match="it saw no GPU when it was imported"):
        runtime.import_deepspeed(torch.device("cuda"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(BackendLoadError, match=r"DS_ACCELERATOR=cpu.*unset DS_ACCELERATOR"):
        runtime.import_deepspeed(torch.device("cuda"))


def test_what_deepspeed_prints_goes_to_the_debug_log(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), runtime.quiet_deepspeed():
        print("some internal table")
    assert capsys.readouterr().out == ""
    assert "deepspeed: some internal table" in caplog.text


def test_what_c_code_prints_while_allocating_stays_out_of_stdout(
    capfd: pytest.CaptureFixture[str],
) -> None:
    import ctypes

    library = ctypes.CDLL(None)
    with runtime.c_stdout_on_stderr():
        library.printf(b"Setting maximum total tokens\n")
    library.printf(b"afterwards\n")
    library.fflush(None)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("afterwards\n", "Setting maximum total tokens\n")


def test_first_import_and_table_of_backends_stay_free_of_deepspeed() -> None:
    """Also: importing it quietly in a fresh process leaves stdout and stderr empty."""
    code = (
        "import sys, torch\n"
        "from gptjet.service.backends import factory\n"
        "from gptjet.service.backends.deepspeed import loader, op_build, runtime\n"
        "assert 'deepspeed' not in sys.modules\n"
        "runtime.import_deepspeed(torch.device('cpu'))\n"
        "assert 'deepspeed' in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


_MEASURE = """
import json, sys, threading, time
from pathlib import Path
import torch
from gptjet.service.models.checkpoint import resolve_checkpoint
from gptjet.service.models.transformers_loader import load_causal_lm

def anonymous_kib():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1])

def warm(folder):
    load_causal_lm(resolve_checkpoint(folder), device=torch.device("cpu"), dtype=torch.float16)

warm(sys.argv[1])
before = peak = anonymous_kib()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous_kib())
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
model = load_causal_lm(
    resolve_checkpoint(sys.argv[2]), device=torch.device("cpu"), dtype=torch.float16, progress=False
)
done = True
thread.join()
weights = sum(p.numel() * p.element_size() for p in model.parameters())
largest = max(p.numel() for p in model.parameters()) * 4
print(json.dumps({"peak": (peak - before) * 1024, "weights": weights, "largest": largest}))
"""


def test_load_needs_a_few_tensors_of_host_memory_beside_the_weights(
    make_gptj_checkpoint: Callable[..., Path],
) -> None:
    """What lands on a card on a GPU machine is the FP16 weights; the rest is what the host needs.

    A sharded FP32 checkpoint of 124 MiB, scaled from GPT-J-6B's 24 GB: reading it whole first, as
    `torch.load` or a plain `from_pretrained` of old did, would take all of it beside the weights.
    """
    tiny = make_gptj_checkpoint(head_dim=16, n_head=2, n_layer=1, rotary_dim=8)
    sizes = {"head_dim": 64, "n_head": 8, "n_layer": 10, "rotary_dim": 32, "vocab_size": 1000}
    folder = make_gptj_checkpoint(**sizes, max_shard_size="20MB")
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert len(list(folder.glob("*.safetensors"))) >= 5
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tiny), str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    measured = json.loads(result.stdout)
    beside_weights = measured["peak"] - measured["weights"]
    assert beside_weights < 4 * measured["largest"]
    assert measured["peak"] < 0.6 * stored
