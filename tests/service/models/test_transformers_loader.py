"""Loading: how much host memory it takes, and what it prints."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptjet.service.models.checkpoint import resolve_checkpoint
from gptjet.service.models.transformers_loader import load_causal_lm

MIB = 2**20

# Peaks are read where the kernel keeps them; the anonymous part, which cannot be given back the way
# pages of a mapped file can, has no peak there and is sampled.
MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
import transformers.models.gptj.modeling_gptj
from gptjet.service.models.architecture import verify_architecture
from gptjet.service.models.checkpoint import resolve_checkpoint
from gptjet.service.models.transformers_loader import load_causal_lm

def kib(field):
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0])

folder, dtype = sys.argv[1:]
checkpoint = resolve_checkpoint(folder)
architecture = verify_architecture(checkpoint)
anonymous, done = [kib("RssAnon")], threading.Event()

def sample():
    while not done.wait(0.001):
        anonymous.append(kib("RssAnon"))

sampler = threading.Thread(target=sample)
sampler.start()
resident = kib("VmRSS")
model = load_causal_lm(checkpoint, device=torch.device("cpu"), dtype=getattr(torch, dtype),
                       architecture=architecture)
done.set()
sampler.join()
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(weights, (kib("VmHWM") - resident) * 1024, (max(anonymous) - anonymous[0]) * 1024)
"""


@pytest.fixture(scope="module")
def large_checkpoint(make_gptj_checkpoint: Callable[..., Path]) -> Path:
    """237 MiB of FP32 in shards of at most 48 MiB."""
    return make_gptj_checkpoint(
        head_dim=256, n_head=4, n_layer=4, rotary_dim=64, vocab_size=4099, max_shard_size="48MB"
    )


def measure(folder: Path, dtype: str) -> tuple[int, int, int]:
    """Bytes of the weights, growth of the resident peak, growth of its anonymous part."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), dtype],
        capture_output=True,
        text=True,
        check=True,
        timeout=280,
    )
    assert result.stderr == "", "loading is silent where stderr is no terminal"
    weights, resident, anonymous = map(int, result.stdout.split())
    return weights, resident, anonymous


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_peaks_at_the_model_and_one_shard(large_checkpoint: Path) -> None:
    """A plain load holds the state dict beside the model, twice the weights. This one must stay
    below the model, one shard and a constant."""
    checkpoint = resolve_checkpoint(str(large_checkpoint))
    assert len(checkpoint.weight_files) >= 5
    assert checkpoint.total_bytes > 200 * MIB
    shard = max(path.stat().st_size for path in checkpoint.weight_files)
    weights, resident, anonymous = measure(large_checkpoint, "float32")
    assert resident < weights + shard + 32 * MIB
    # In the file's own dtype the weights are the mapped file, which costs no memory of its own.
    assert anonymous < shard


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_converting_while_loading_holds_one_copy_that_is_not_the_file(
    large_checkpoint: Path,
) -> None:
    """FP32 file to BF16: the resident peak counts the file's pages too, which the kernel takes back
    when it needs them; what it cannot take back is the model and at most a shard."""
    checkpoint = resolve_checkpoint(str(large_checkpoint))
    shard = max(path.stat().st_size for path in checkpoint.weight_files)
    weights, _, anonymous = measure(large_checkpoint, "bfloat16")
    assert weights < 125 * MIB
    assert weights - 8 * MIB < anonymous < weights + shard + 32 * MIB


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stderr", "progress", "shown"),
    [(Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)],
)
def test_progress_bar_is_drawn_on_a_terminal_where_it_is_wanted(
    make_gptj_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    stderr: io.StringIO,
    progress: bool,
    shown: bool,
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    checkpoint = resolve_checkpoint(str(make_gptj_checkpoint()))
    load_causal_lm(checkpoint, device=torch.device("cpu"), dtype=torch.float32, progress=progress)
    assert ("Loading weights" in stderr.getvalue()) is shown


def test_logging_and_progress_settings_are_restored(
    make_gptj_checkpoint: Callable[..., Path],
) -> None:
    from transformers.utils import logging

    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        load_causal_lm(
            resolve_checkpoint(str(make_gptj_checkpoint())),
            device=torch.device("cpu"),
            dtype=torch.float32,
            progress=False,
        )
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()
