"""transformers in a process of its own: what it says, how it fails, what the server is spared."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gptjet.service.backends.fused.groundwork import ReferenceProcess, open_reference
from gptjet.service.backends.fused.reference import Reference
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.checkpoint import resolve_checkpoint
from gptjet.service.models.tokenizer import TransformersTokenizer

CPU = torch.device("cpu")
PROMPTS = ((3,), (5, 6, 7, 8, 9))


@contextlib.contextmanager
def process(folder: Path) -> Iterator[ReferenceProcess]:
    with contextlib.closing(ReferenceProcess(resolve_checkpoint(str(folder)), 1)) as child:
        yield child


def test_the_process_says_what_transformers_says_here(
    make_gptj_checkpoint: Callable[..., Path],
) -> None:
    folder = make_gptj_checkpoint()
    here = Reference(resolve_checkpoint(str(folder)), CPU)
    expected = here.describe()
    with process(folder) as child:
        found = child.describe()
        traces = child.record("int8", PROMPTS)
    assert found == expected
    references = here.record("int8", PROMPTS)
    assert references.keys() == traces.keys() == {"weights", "floats"}
    for name, recorded in references.items():
        for mine, theirs in zip(recorded, traces[name], strict=True):
            assert (mine.prompt, mine.tokens) == (theirs.prompt, theirs.tokens)
            torch.testing.assert_close(mine.logits, theirs.logits, atol=1e-5, rtol=1e-5)
    assert expected.tokenizer is not None
    tokenizer = TransformersTokenizer.from_parts(expected.tokenizer)
    assert tokenizer.decode(tokenizer.encode("A text, naïve.")) == "A text, naïve."


def test_what_is_wrong_with_a_checkpoint_is_said_by_the_process(
    make_causal_lm_checkpoint: Callable[..., Path],
) -> None:
    folder = make_causal_lm_checkpoint(
        "gpt2", vocab_size=64, n_positions=32, n_embd=32, n_head=2, n_layer=1
    )
    with process(folder) as child, pytest.raises(BackendLoadError, match="not of the GPT-J family"):
        child.describe()


def test_a_process_that_is_killed_is_an_error_that_says_so(
    make_gptj_checkpoint: Callable[..., Path],
) -> None:
    with process(make_gptj_checkpoint()) as child:
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(BackendLoadError, match=r"signal 9 \(SIGKILL\), as one that found no"):
            child.describe()


def test_closing_ends_the_process_whatever_it_is_doing(
    make_gptj_checkpoint: Callable[..., Path],
) -> None:
    with process(make_gptj_checkpoint()) as child:
        pid = child.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_process_ends_with_the_one_that_started_it(
    make_gptj_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Killed, so that it can do nothing about it."""
    file = tmp_path / "checkpoint"
    file.write_bytes(pickle.dumps(resolve_checkpoint(str(make_gptj_checkpoint()))))
    script = (
        "import pickle, sys, time\n"
        "from gptjet.service.backends.fused.groundwork import ReferenceProcess\n"
        "child = ReferenceProcess(pickle.load(open(sys.argv[1], 'rb')), 1)\n"
        "child.describe()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(file)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        watched = os.pidfd_open(pid)
        parent.kill()
    import select

    readable, _, _ = select.select([watched], [], [], 120)
    os.close(watched)
    assert readable


def test_where_transformers_models_are_imported_they_are_asked_here(
    make_gptj_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = resolve_checkpoint(str(make_gptj_checkpoint()))
    assert "transformers.modeling_utils" in sys.modules
    assert isinstance(open_reference(checkpoint, CPU, 1), Reference)
    assert isinstance(open_reference(checkpoint, torch.device("cuda"), 1), Reference)
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils")
    with contextlib.closing(open_reference(checkpoint, CPU, 1)) as reference:
        assert isinstance(reference, ReferenceProcess)


def test_a_served_process_never_imports_transformers(
    make_gptj_checkpoint: Callable[..., Path],
) -> None:
    script = (
        "import sys; from gptjet.service.backends.factory import load_backend\n"
        "loaded = load_backend('fused', sys.argv[1], device='cpu', cpu_threads=1)\n"
        "loaded.backend.warm_up()\n"
        "assert loaded.tokenizer.encode('a text')\n"
        "heavy = ('transformers', 'accelerate', 'scipy', 'sympy', 'triton', 'torch._dynamo')\n"
        "print(loaded.backend.spec.parity.status, [name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(make_gptj_checkpoint())],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "passed []\n"
