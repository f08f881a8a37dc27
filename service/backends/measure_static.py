"""transformers' own model with a static cache and torch.compile, timed at batch 1: JSON lines.

    python -m gptjet.service.backends.measure_static --cells 50:50,50:200

What PyTorch gives anyone without kernels of one's own: every decode step has one shape, so it is
compiled once and, on a card, replayed as a CUDA graph ("reduce-overhead"). Lines as `measure`'s.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gptjet.service.backends.device import choose_device, choose_dtype, dtype_name
from gptjet.service.backends.measure import GEOMETRIES, make_random_model
from gptjet.service.backends.records import Record, parse_cells, print_records

BACKEND = "huggingface-static"
_SEED = 6
# A CPU tries the command: Dynamo traces the step, and nothing is compiled for it.
_COMPILER: dict[str, dict[str, Any]] = {
    "cuda": {"mode": "reduce-overhead"},
    "cpu": {"backend": "eager"},
}
# Of the largest logit, static cache and compiler against eager: some roundings of float16.
_TOLERANCE = 0.03


def measure(
    *, geometry: str, device_name: str, cells: Sequence[tuple[int, int]], repeats: int
) -> Iterator[Record]:
    """Yield the records; raises RuntimeError where the compiled step is not the eager one."""
    device = choose_device(device_name)
    dtype = choose_dtype("auto", device)
    started = time.perf_counter()
    model: Any = make_random_model(geometry, device, dtype)
    yield {
        "kind": "model",
        "backend": BACKEND,
        "geometry": geometry,
        "dtype": dtype_name(dtype),
        "device": str(device),
        "seconds": round(time.perf_counter() - started, 2),
    }
    runner = _StaticRunner(model, device, max(i + o for i, o in cells))
    started = time.perf_counter()
    error = runner.check()
    passed = error <= _TOLERANCE
    yield {
        "kind": "static_parity",
        "backend": BACKEND,
        "error": error,
        "limit": _TOLERANCE,
        "passed": passed,
        "compile_s": round(time.perf_counter() - started, 2),
    }
    if not passed:
        raise RuntimeError(f"the compiled step differs from the eager one by {error:.3g}")
    for input_tokens, output_tokens in cells:
        runs = [runner.time_run(input_tokens, output_tokens) for _ in range(repeats + 1)][1:]
        yield {
            "kind": "cell",
            "backend": BACKEND,
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            "ttft_ms": [round(run[0], 4) for run in runs],
            "itl_ms": [[round(ms, 4) for ms in run[1:]] for run in runs],
            "tokens_per_s": [round(1000 * output_tokens / sum(run), 3) for run in runs],
        }


class _StaticRunner:
    """One cache for all runs, as its address is part of what is compiled."""

    def __init__(self, model: Any, device: torch.device, max_tokens: int) -> None:
        from transformers import StaticCache

        self._model, self._device = model, device
        self._cache: Any = StaticCache(config=model.config, max_cache_len=max_tokens)
        self._step = torch.compile(self._forward, fullgraph=True, **_COMPILER[device.type])
        self._token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self._position = torch.zeros(1, dtype=torch.long, device=device)

    @torch.no_grad()
    def check(self) -> float:
        """Relative error of a compiled step's logits; compiles on the way."""
        ids = self._prompt(5)
        eager = self._model(input_ids=ids, use_cache=False).logits[0, -1].float()
        for _ in range(3):  # compiled, recorded, replayed
            self._prefill(ids[:, :-1])
            row = self._decode(int(ids[0, -1]), ids.shape[1] - 1)
        return float((row.float() - eager).abs().max() / eager.abs().max())

    @torch.no_grad()
    def time_run(self, input_tokens: int, output_tokens: int) -> list[float]:
        """ms to the first token, then between tokens; a token counts once it is on the host."""
        ids = self._prompt(input_tokens)
        times_ms, token = [], 0
        start = time.perf_counter()
        for step in range(output_tokens):
            is_first = step == 0
            row = self._prefill(ids) if is_first else self._decode(token, input_tokens + step - 1)
            token = int(row.argmax())
            now = time.perf_counter()
            times_ms.append(1000 * (now - start))
            start = now
        return times_ms

    def _prompt(self, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(_SEED)
        vocab_size = int(self._model.config.vocab_size)
        return torch.randint(0, vocab_size, (1, length), generator=generator).to(self._device)

    def _prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Eager: prompts have any length, and each would be compiled anew."""
        self._cache.reset()
        positions = torch.arange(ids.shape[1], device=self._device)
        return self._forward(ids, positions)[0, -1]

    def _decode(self, token: int, position: int) -> torch.Tensor:
        self._token.fill_(token)
        self._position.fill_(position)
        return self._step(self._token, self._position)[0, -1].clone()

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = self._model(
            input_ids=ids,
            position_ids=positions[None],
            cache_position=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits
        return logits


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the records. Exit codes: 0 done, 1 failed, 2 this machine cannot run it."""
    parser = argparse.ArgumentParser(description="time transformers compiled, on random weights")
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="gpt-j-6b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cells", type=parse_cells, required=True, help="input:output,…")
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args(arguments)
    return print_records(
        lambda: measure(
            geometry=flags.geometry,
            device_name=flags.device,
            cells=flags.cells,
            repeats=flags.repeats,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
