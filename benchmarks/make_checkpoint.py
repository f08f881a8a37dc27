"""Writes a seeded random GPT-J checkpoint of a named geometry, to measure speed without a download.

    python -m gptjet.benchmarks.make_checkpoint --geometry small --context 2048 --out FOLDER

Its text means nothing; its shapes, bytes and arithmetic are a real model's. Written with numpy and
safetensors alone, the same bytes on every machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from gptjet.benchmarks.geometry import geometry_from_config, named_models

if TYPE_CHECKING:
    from numpy.typing import NDArray

# GPT-2's end-of-text, and padding words up to the vocabulary's size.
_END_OF_TEXT = "<|endoftext|>"
_BYTES = 256
# transformers' initializer_range: a trained model's weights are of this order.
_WEIGHT_SD = 0.02


def write_checkpoint(
    folder: Path, geometry: str, *, context: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Write config.json, model.safetensors (FP32) and a byte tokenizer; returns the configuration.

    Raises KeyError for an unknown geometry and ValueError for one that is not a GPT-J.
    """
    config = dict(named_models()[geometry]["config"])
    if config["model_type"] != "gptj":
        raise ValueError(f"{geometry} is a {config['model_type']}, not a gptj")
    if context is not None:
        config["n_positions"] = context
    config |= {
        "architectures": ["GPTJForCausalLM"],
        "activation_function": "gelu_new",
        "bos_token_id": _BYTES,
        "eos_token_id": _BYTES,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(_tensors(config, seed))
    assert sum(t.size for t in tensors.values()) == geometry_from_config(config).num_parameters
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _write_tokenizer(folder, int(config["vocab_size"]))
    return config


def _tensors(config: dict[str, Any], seed: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Names and shapes of transformers' GPTJForCausalLM."""
    hidden, vocab = int(config["n_embd"]), int(config["vocab_size"])
    generator = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        values = generator.standard_normal((rows, columns), dtype=np.float32)
        values *= np.float32(_WEIGHT_SD)
        return values

    def zeros(size: int) -> NDArray[np.float32]:
        return np.zeros(size, dtype=np.float32)

    def norm(name: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
        yield f"{name}.weight", np.ones(hidden, dtype=np.float32)
        yield f"{name}.bias", zeros(hidden)

    yield "transformer.wte.weight", matrix(vocab, hidden)
    for layer in range(int(config["n_layer"])):
        prefix = f"transformer.h.{layer}"
        yield from norm(f"{prefix}.ln_1")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{prefix}.attn.{name}.weight", matrix(hidden, hidden)
        yield f"{prefix}.mlp.fc_in.weight", matrix(4 * hidden, hidden)
        yield f"{prefix}.mlp.fc_in.bias", zeros(4 * hidden)
        yield f"{prefix}.mlp.fc_out.weight", matrix(hidden, 4 * hidden)
        yield f"{prefix}.mlp.fc_out.bias", zeros(hidden)
    yield from norm("transformer.ln_f")
    yield "lm_head.weight", matrix(vocab, hidden)
    yield "lm_head.bias", zeros(vocab)


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """GPT-2's byte alphabet: id i is byte i, id 256 is end-of-text, the rest are filler words.

    As many ids as the model has: CTranslate2's converter demands it.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(_BYTES) if byte not in printable]
    # GPT-2 writes bytes that do not print as the characters from U+0100 on.
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + position) for position, byte in enumerate(others)}
    vocabulary = {characters[byte]: byte for byte in range(_BYTES)} | {_END_OF_TEXT: _BYTES}
    for index in range(len(vocabulary), vocab_size):
        vocabulary[f"<|filler{index}|>"] = index
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(_END_OF_TEXT, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _END_OF_TEXT,
        "bos_token": _END_OF_TEXT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    """Write one checkpoint."""
    names = [
        name for name, entry in named_models().items() if entry["config"]["model_type"] == "gptj"
    ]
    parser = argparse.ArgumentParser(prog="python -m gptjet.benchmarks.make_checkpoint")
    parser.add_argument("--geometry", choices=names, default="small")
    parser.add_argument("--context", type=int, default=None, help="default: the geometry's, 2048")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    write_checkpoint(
        arguments.out, arguments.geometry, context=arguments.context, seed=arguments.seed
    )


if __name__ == "__main__":
    main()
