"""Offline measurements of one backend, printed as JSON lines.

Run as `python -m gptjet.service.backends.measure --backend deepspeed --cells 50:50,1000:200`. For
programs that may not import backends (the benchmarks) and for machines that have PyTorch and
transformers and little else. Weights are random and seeded, drawn on the device itself, as speed
and parity do not depend on what a model has learnt. Each line has a `kind`:

    model    geometry, dtype, device, seconds to make it
    parity   the gate's verdict; where it failed no time is taken
    cell     times of one (input, output) length, raw, a list a repeat
    memory   of the card, at the end
    error    why it stopped; `unavailable` where the machine cannot run this at all
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from gptjet.service.backends.deepspeed import guards, memory_plan, op_build
from gptjet.service.backends.deepspeed.backend import DeepSpeedBackend
from gptjet.service.backends.deepspeed.loader import prove_and_inject
from gptjet.service.backends.device import choose_device, choose_dtype, dtype_name
from gptjet.service.backends.huggingface import HuggingFaceBackend
from gptjet.service.backends.records import Record, parse_cells, print_records
from gptjet.service.engine.backend import (
    Backend,
    BackendSpec,
    ParityStatus,
    Phase,
    ScheduledBatch,
)
from gptjet.service.engine.request import SamplingParams, new_request
from gptjet.service.engine.sequence import Sequence as EngineSequence
from gptjet.service.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from gptjet.service.backends.deepspeed.guards import Platform

# GPTJConfig's own defaults are GPT-J-6B's sizes.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "gpt-j-6b": {},
    "tiny": {
        "n_layer": 2,
        "n_embd": 64,
        "n_head": 4,
        "rotary_dim": 8,
        "n_positions": 256,
        "vocab_size": 503,
    },
}
_SEED = 6
# Wide enough that every position matters, narrow enough for FP16: see `tests/conftest.py`.
_GAIN = 0.8


def make_random_model(geometry: str, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """GPT-J of the sizes called `geometry` with seeded weights, drawn on `device`.

    No copy is ever in host memory: 12.1 GB on a machine of any size.
    """
    from transformers import GPTJConfig, GPTJForCausalLM

    sizes = {**GEOMETRIES[geometry], "bos_token_id": 0, "eos_token_id": 0}
    model_class: Any = GPTJForCausalLM
    with quiet_transformers(), torch.device(device):
        model = model_class._from_config(GPTJConfig(**sizes), dtype=dtype)
    generator = torch.Generator(device=device).manual_seed(_SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                spread = _GAIN * parameter.shape[-1] ** -0.5
                parameter.normal_(0.0, spread, generator=generator)
    result: torch.nn.Module = model.eval()
    return result


def measure(
    backend_name: str,
    *,
    geometry: str,
    device_name: str,
    cells: Sequence[tuple[int, int]],
    repeats: int,
    platform: Platform | None = None,
) -> Iterator[Record]:
    """Yield the records of one backend; with no `cells`, parity alone.

    Raises BackendLoadError where the machine cannot run it. `platform` stands for the GPU in tests.
    """
    device = platform.device if platform else choose_device(device_name)
    card = platform
    if backend_name == "deepspeed" and card is None:
        card = guards.cuda_platform(device, torch.float16)
        op_build.check_loadable()
    dtype = card.dtype if card else choose_dtype("auto", device)
    started = time.perf_counter()
    if card is not None:
        _check_fits(geometry, card)
    model = make_random_model(geometry, device, dtype)
    _synchronize(device)
    yield {
        "kind": "model",
        "backend": backend_name,
        "geometry": geometry,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "dtype": dtype_name(dtype),
        "device": card.name if card else str(device),
        "seconds": round(time.perf_counter() - started, 2),
    }
    if card is None:
        backend: Backend = HuggingFaceBackend(cast(Any, model), model_name=geometry)
    else:
        started = time.perf_counter()
        sizes = guards.check_model(cast(Any, model).config)
        injected, verdict = prove_and_inject(model, sizes, card)
        seconds = round(time.perf_counter() - started, 2)
        yield {"kind": "parity", **dataclasses.asdict(verdict), "seconds": seconds}
        if verdict.status is not ParityStatus.PASSED:
            injected.close()
            raise ParityFailedError(verdict.detail)
        backend = DeepSpeedBackend(injected, _spec(geometry, sizes, card))
    del model
    if cells:
        backend.warm_up()
    for input_tokens, output_tokens in cells:
        yield _time_cell(backend, device, input_tokens, output_tokens, repeats)
    yield _memory(device)
    backend.close()
    gc.collect()


class ParityFailedError(Exception):
    """The fast path is not what transformers computes, so its speed means nothing."""


def _time_cell(
    backend: Backend, device: torch.device, input_tokens: int, output_tokens: int, repeats: int
) -> Record:
    """One (input, output) cell: `repeats` timed runs after one that is not."""
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(0, backend.spec.vocab_size, (input_tokens,), generator=generator).tolist()
    runs = []
    for run in range(repeats + 1):
        _synchronize(device)
        times_ms = _time_run(backend, tuple(ids), output_tokens, run)
        if run:
            runs.append(times_ms)
    return {
        "kind": "cell",
        "backend": backend.spec.name,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "ttft_ms": [round(times[0], 4) for times in runs],
        "itl_ms": [[round(ms, 4) for ms in times[1:]] for times in runs],
        "tokens_per_s": [round(1000 * output_tokens / sum(times), 3) for times in runs],
    }


def _time_run(backend: Backend, ids: tuple[int, ...], output_tokens: int, run: int) -> list[float]:
    """Greedy decoding: ms from the start to the first token, then between tokens.

    A token counts once its id is in host memory, where a server would send it.
    """
    params = SamplingParams(max_new_tokens=output_tokens)
    nothing: Any = None  # no text is made and nothing is sampled
    sequence = EngineSequence(run, new_request(ids, params), 0, nothing, nothing)
    times_ms = []
    start = time.perf_counter()
    for step in range(output_tokens):
        if step == 0:
            logits = backend.prefill(ScheduledBatch(Phase.PREFILL, (sequence,))).logits
        else:
            logits = backend.decode(ScheduledBatch(Phase.DECODE, (sequence,)))
        sequence.output_token_ids.append(int(logits[0].argmax()))
        now = time.perf_counter()
        times_ms.append((now - start) * 1000)
        start = now
    backend.release(sequence)
    return times_ms


def _check_fits(geometry: str, card: Platform) -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(**GEOMETRIES[geometry])
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in GPTJForCausalLM(config).parameters())
    plan = memory_plan.plan_memory(guards.check_model(config), card, num_parameters)
    memory_plan.check_memory(plan, card)


def _spec(geometry: str, sizes: guards.InjectedGeometry, card: Platform) -> BackendSpec:
    return BackendSpec(
        name="deepspeed",
        model_name=geometry,
        architecture="GPTJForCausalLM",
        num_parameters=0,
        device=str(card.device),
        dtype=dtype_name(card.dtype),
        vocab_size=sizes.vocab_size,
        max_context=sizes.context,
        max_sequences=1,
        max_batch_size=1,
        num_kv_blocks=-(-sizes.context // 16),
    )


def _memory(device: torch.device) -> Record:
    if device.type != "cuda":
        return {"kind": "memory", "free_bytes": None, "total_bytes": None}
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device)
    # DeepSpeed's workspace is not PyTorch's: it shows in what is free
    return {"kind": "memory", "free_bytes": free, "total_bytes": total, "torch_peak_bytes": peak}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the records. Exit codes: 0 done, 1 failed, 2 this machine cannot run it."""
    parser = argparse.ArgumentParser(description="time one backend on random weights")
    parser.add_argument("--backend", choices=("huggingface", "deepspeed"), required=True)
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="gpt-j-6b")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--cells", type=parse_cells, default=[], help="input:output,… ; none: parity"
    )
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args(arguments)
    return print_records(
        lambda: measure(
            flags.backend,
            geometry=flags.geometry,
            device_name=flags.device,
            cells=flags.cells,
            repeats=flags.repeats,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
