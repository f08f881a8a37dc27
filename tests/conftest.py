"""Fixtures of every room: checkpoints of seeded random models, written once a session."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Small models gain nothing from threads, and workers of pytest-xdist share the cores. torch reads
# this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# GPU kernels run through Triton's interpreter. Triton's own library reads this when it is imported,
# which transformers may do in whichever test is first.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts its background jobs with Ctrl-C ignored, and so would be the processes that tests
# interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, and no limit of time: a neighbour on the machine fails no test,
# and a change is judged by what it changes. `--hypothesis-profile explore` looks at others.
hypothesis.settings.register_profile(
    "explore",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    print_blob=True,
)
hypothesis.settings.register_profile(
    "repeatable", hypothesis.settings.get_profile("explore"), derandomize=True, database=None
)
hypothesis.settings.load_profile("repeatable")

END_OF_TEXT = "<|endoftext|>"


QUICK_INTERPRETER = Path(__file__).with_name("quick_interpreter") / "sitecustomize.py"


@pytest.fixture(scope="session")
def quick_interpreter_folder() -> Path:
    """In the PYTHONPATH of a process, it makes Triton's interpreter quick there."""
    return QUICK_INTERPRETER.parent


@pytest.fixture(scope="session")
def quick_interpreter() -> Iterator[None]:
    """Makes Triton's interpreter quick in this process."""
    from triton.runtime import interpreter

    spec = importlib.util.spec_from_file_location("quick_interpreter", QUICK_INTERPRETER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    quick = module.quick_patch(interpreter)
    with pytest.MonkeyPatch.context() as context:
        if quick is not None:
            context.setattr(interpreter, "_patch_lang", quick)
        yield


@pytest.fixture(scope="session")
def make_gptj_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make(head_dim=64, n_head=2, n_layer=2, rotary_dim=32, n_positions=64, vocab_size=263, ...)`
    writes a random GPT-J with a byte tokenizer and returns its folder; the same arguments, the same
    folder: copy it before changing it.

    rotary_dim      None leaves the field out of config.json, where transformers reads 64
    seed, dtype     of the weights
    max_shard_size  splits the weights ("1MB")

    End-of-text is id 256; ids from 257 on have no text.
    """
    written: dict[tuple[tuple[str, Any], ...], Path] = {}

    def make(**options: Any) -> Path:
        key = tuple(sorted(options.items()))
        if key not in written:
            folder = tmp_path_factory.mktemp("gptj") / "checkpoint"
            folder.mkdir()
            _write_gptj(folder, **options)
            written[key] = folder
        return written[key]

    return make


@pytest.fixture(scope="session")
def make_causal_lm_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make("gpt2", n_embd=32, ...)` writes a random model of any transformers family, likewise."""

    def make(model_type: str, **config_fields: Any) -> Path:
        from transformers import AutoConfig

        folder = tmp_path_factory.mktemp(model_type) / "checkpoint"
        folder.mkdir()
        _write_model(folder, AutoConfig.for_model(model_type, **config_fields), seed=0)
        return folder

    return make


def _write_gptj(
    folder: Path,
    *,
    head_dim: int = 64,
    n_head: int = 2,
    n_layer: int = 2,
    rotary_dim: int | None = 32,
    n_positions: int = 64,
    vocab_size: int = 263,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
) -> None:
    from transformers import GPTJConfig

    config = GPTJConfig(
        vocab_size=vocab_size,
        n_positions=n_positions,
        n_embd=head_dim * n_head,
        n_layer=n_layer,
        n_head=n_head,
        rotary_dim=rotary_dim or 64,
        bos_token_id=256,
        eos_token_id=256,
    )
    _write_model(folder, config, seed=seed, dtype=dtype, max_shard_size=max_shard_size)
    if rotary_dim is None:
        fields = json.loads((folder / "config.json").read_text())
        del fields["rotary_dim"]
        (folder / "config.json").write_text(json.dumps(fields))
    _write_byte_tokenizer(folder)


def _write_model(
    folder: Path, config: Any, *, seed: int, dtype: str = "float32", max_shard_size: str = "5GB"
) -> None:
    import torch
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers' own 0.02 makes a small model nearly linear: it repeats one token
            # whatever the prompt, and a test of parity would compare nothing. With these weights 15
            # to 35 of 40 greedy tokens differ, and the margin between the two best logits (0.02 and
            # more, measured over head sizes 32 to 256) is far above the rounding of FP32 (order
            # 1e-6), so that rounding never decides a token.
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                values = values * 0.05 + (1.0 if name.endswith("weight") else 0.0)
            elif "lm_head" in name:
                values *= 0.5
            elif not any(word in name for word in ("wte", "wpe", "embed")):
                values *= 1.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(values)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    save_torch_state_dict(
        model.to(getattr(torch, dtype)).state_dict(), folder, max_shard_size=max_shard_size
    )


def _write_byte_tokenizer(folder: Path) -> None:
    """GPT-2's byte alphabet without merges: id i is byte i, id 256 is end-of-text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    # GPT-2 writes bytes that do not print as the characters from U+0100 on.
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + position) for position, byte in enumerate(others)}
    vocabulary = {characters[byte]: byte for byte in range(256)} | {END_OF_TEXT: 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(
        folder
    )
