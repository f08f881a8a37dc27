"""Offline measurements of the fused backend's kernels on random weights, printed as JSON lines.

    python -m gptjet.service.backends.fused.measure parity --weight-type int8
    python -m gptjet.service.backends.fused.measure latency --cells 50:50,1000:50 --batches 1,2,4
    python -m gptjet.service.backends.fused.measure profile

For programs that may not import backends. On a CPU the kernels are interpreted: that tries this
command, and its times say nothing. Each line has a `kind`:

    model    what computes, geometry, weight type, seconds to make it
    parity   whole-model verdict against transformers' blocks on the same weights, in float32
    proof    a subject ("model/int8") and whether all of its parity passed
    cell     times of one (input, output) length at batch 1, raw, a list a repeat
    decode   times of decode steps of a batch, `graphs`: replayed as CUDA graphs or launched
    profile  microseconds a decode step by kernel; profile_step: of the whole step
    memory, error    as in `backends.measure`
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from gptjet.kernels.batch import BLOCK_SIZE
from gptjet.kernels.gpu.model import GpuModel
from gptjet.service.backends import layerwise, parity
from gptjet.service.backends.device import choose_device, give_back
from gptjet.service.backends.fused import gpu, proof, timing
from gptjet.service.backends.fused.backend import FusedBackend
from gptjet.service.backends.fused.kv_cache import allocate_kv_cache
from gptjet.service.backends.fused.model import Computer, build_model
from gptjet.service.backends.fused.random_weights import (
    GEOMETRIES,
    RandomWeights,
    count_parameters,
)
from gptjet.service.backends.fused.runner import ModelRunner, SamplingModel
from gptjet.service.backends.records import Record, parse_cells, print_records
from gptjet.service.engine.backend import BackendSpec, ParityStatus
from gptjet.service.engine.errors import BackendLoadError

WEIGHT_TYPES = ("float16", "int8", "int4")
MAX_ROWS = 32
_MAX_PREFILL_TOKENS = 1024
# Tokens that sequences of a decode batch have behind them: what the 32 streams begin with.
_CONTEXT = 512
# Of the probes under the interpreter: the two shortest.
_INTERPRETED_TOKENS = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """The model that is measured."""

    geometry_name: str
    weight_type: str
    device: torch.device

    @property
    def weights(self) -> RandomWeights:
        """Nothing is drawn yet."""
        return RandomWeights(GEOMETRIES[self.geometry_name], self.weight_type, self.device)

    @property
    def name(self) -> str:
        """What a proof says that it proves."""
        return f"model/{self.weight_type}"

    @property
    def backend(self) -> str:
        """The name in cells, beside "huggingface" and "deepspeed"."""
        return f"fused-{self.weight_type}"

    def build(self, max_rows: int) -> tuple[Computer, GpuModel]:
        """On the kernels: raises BackendLoadError where PyTorch would stand in for them."""
        computer = build_model(
            self.weights.weights(), self.weight_type, self.device, num_threads=1, max_rows=max_rows
        )
        model = computer.model
        if not isinstance(model, GpuModel):
            model.close()
            raise BackendLoadError(f"the GPU kernels do not run here: {computer.description}")
        return computer, model


def subject_of(geometry_name: str, weight_type: str, device_name: str) -> Subject:
    """Raises BackendLoadError for a device that is not there. A CPU interprets the kernels."""
    device = choose_device(device_name)
    if device.type == "cpu":
        gpu.interpret_on_cpu = True
        if not gpu.is_interpreted(device):
            raise BackendLoadError("on a CPU, set TRITON_INTERPRET=1 to interpret the kernels")
    return Subject(geometry_name, weight_type, device)


def measure_parity(subject: Subject) -> Iterator[Record]:
    """Hold the model to transformers' blocks: on the served values, and on those before rounding.

    The reference computes in float32, a layer in memory at a time.
    """
    weights, geometry = subject.weights, subject.weights.geometry
    started = time.perf_counter()
    most = None if subject.device.type == "cuda" else _INTERPRETED_TOKENS
    prompts = parity.probe_prompts(geometry.vocab_size, geometry.max_context, most)
    sources = {"weights": weights}
    if subject.weight_type != "float16":
        sources["floats"] = dataclasses.replace(weights, weight_type="float16")
    references = {name: _reference(source, prompts) for name, source in sources.items()}
    give_back(subject.device)
    reference_s = time.perf_counter() - started
    computer, model = subject.build(MAX_ROWS)
    yield _model_record(subject, computer, time.perf_counter() - started - reference_s)
    runner = proof.probe_runner(
        computer,
        geometry,
        subject.device,
        prompts,
        kv_dtype=computer.kv_dtype,
        max_tokens=_MAX_PREFILL_TOKENS,
        max_segments=MAX_ROWS,
    )
    verdict = proof.judge(runner, references, subject.weight_type, computer.kv_dtype)
    runner.close()
    model.close()
    yield {
        "kind": "parity",
        "backend": subject.backend,
        "subject": subject.name,
        **dataclasses.asdict(verdict),
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "seconds": round(time.perf_counter() - started, 2),
    }
    passed = verdict.status is ParityStatus.PASSED
    yield {"kind": "proof", "subject": subject.name, "passed": passed, "cases": len(prompts)}
    if not passed:
        raise ParityRedError(verdict.detail)


def _reference(weights: RandomWeights, prompts: Sequence[Sequence[int]]) -> list[parity.Trace]:
    """What transformers' blocks compute for the probes, a layer in memory at a time."""
    source, geometry = layerwise.FusedValues(weights.weights()), weights.geometry

    def last_logits(sequences: list[tuple[int, ...]], wanted: list[int]) -> list[torch.Tensor]:
        return layerwise.last_logits(source, sequences, wanted, weights.device)

    return parity.record_forced(last_logits, prompts, geometry.vocab_size, geometry.max_context)


class ParityRedError(Exception):
    """The kernels do not compute what transformers computes: their times would mean nothing."""


def measure_latency(
    subject: Subject,
    *,
    cells: Sequence[tuple[int, int]],
    batches: Sequence[int],
    repeats: int,
    steps: int,
) -> Iterator[Record]:
    """Requests alone, then decode batches, then batch 1 once more without CUDA graphs."""
    geometry = subject.weights.geometry
    context = min(_CONTEXT, geometry.max_context // 2)
    rows = timing.Rows.allocate(max(batches), context + steps + 1)
    longest = max([0, *(i + o for i, o in cells)])
    alone = timing.Rows.allocate(1, longest)
    runner, model, record = _prepare(subject, max(rows.num_blocks, alone.num_blocks), max(batches))
    yield record
    for input_tokens, output_tokens in cells:
        prompt = timing.prompt_of(geometry.vocab_size, input_tokens)
        runs = [
            timing.time_request(runner, alone.tables[0], prompt, output_tokens)
            for _ in range(repeats + 1)
        ][1:]
        yield {
            "kind": "cell",
            "backend": subject.backend,
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            "ttft_ms": [round(run[0], 4) for run in runs],
            "itl_ms": [[round(ms, 4) for ms in run[1:]] for run in runs],
            "tokens_per_s": [round(1000 * output_tokens / sum(run), 3) for run in runs],
        }
    for batch in batches:
        yield _time_batch(subject, runner, rows, batch, context, steps, graphs=_recorded(model))
    yield _memory(subject.device)
    model.forget_graphs()
    if subject.device.type == "cuda":
        yield _time_batch(subject, runner, rows, batches[0], context, steps, graphs=False)
    runner.close()


def measure_profile(subject: Subject, *, steps: int) -> Iterator[Record]:
    """One sequence in the middle of its context."""
    geometry = subject.weights.geometry
    context = min(_CONTEXT, geometry.max_context // 2)
    rows = timing.Rows.allocate(1, context + steps + 1)
    runner, _, record = _prepare(subject, rows.num_blocks, 1)
    yield record
    for entry in timing.profile_steps(runner, rows.tables[0], context, steps):
        yield {**entry, "backend": subject.backend}
    runner.close()


def build_backend(subject: Subject, *, max_sequences: int, max_tokens: int) -> FusedBackend:
    """The backend as a server would load it, for sequences of up to `max_tokens` tokens."""
    geometry = subject.weights.geometry
    num_blocks = max_sequences * -(-max_tokens // BLOCK_SIZE)
    runner, model, _ = _prepare(subject, num_blocks, max_sequences)
    spec = BackendSpec(
        name="fused",
        model_name=f"random {subject.geometry_name}",
        architecture="GPTJForCausalLM",
        num_parameters=count_parameters(geometry),
        device=str(subject.device),
        dtype=subject.weight_type,
        vocab_size=geometry.vocab_size,
        max_context=geometry.max_context,
        max_sequences=max_sequences,
        max_batch_size=max_sequences,
        max_prefill_batch_size=max_sequences,
        num_kv_blocks=num_blocks,
        paged=True,
        max_prefill_tokens=runner.max_tokens,
        samples_on_device=isinstance(model, SamplingModel),
    )
    return FusedBackend(runner, spec)


def _prepare(
    subject: Subject, num_blocks: int, max_rows: int
) -> tuple[ModelRunner, GpuModel, Record]:
    """A runner whose KV cache holds zeros, so that every step is finite; graphs on a card."""
    started = time.perf_counter()
    computer, model = subject.build(max_rows)
    geometry = subject.weights.geometry
    cache = allocate_kv_cache(
        geometry, num_blocks, dtype=computer.kv_dtype, device=subject.device
    ).zero_()
    if subject.device.type == "cuda":
        gpu.record_graphs(model, cache, progress=False)
        cache.zero_()
    runner = ModelRunner(
        model, geometry, cache, max_tokens=_MAX_PREFILL_TOKENS, max_segments=max_rows
    )
    record = _model_record(subject, computer, time.perf_counter() - started)
    return runner, model, {**record, "graphs": _recorded(model)}


def _time_batch(
    subject: Subject,
    runner: ModelRunner,
    rows: timing.Rows,
    batch: int,
    context: int,
    steps: int,
    *,
    graphs: bool,
) -> Record:
    tables = rows.tables[:batch]
    token_ids = timing.prompt_of(runner.geometry.vocab_size, batch)
    # The first steps are not counted: they wake the card up, and outside graphs they may compile.
    timing.time_steps(runner, token_ids, [context] * batch, tables, min(steps, 4))
    times = timing.time_steps(runner, token_ids, [context] * batch, tables, steps)
    return {
        "kind": "decode",
        "backend": subject.backend,
        "batch_size": batch,
        "context_tokens": context,
        "graphs": graphs,
        "step_ms": [round(ms, 4) for ms in times],
        "tokens_per_s": round(1000 * batch / statistics.median(times), 3),
    }


def _recorded(model: GpuModel) -> bool:
    return bool(model.recorded_buckets)


def _model_record(subject: Subject, computer: Computer, seconds: float) -> Record:
    return {
        "kind": "model",
        "backend": subject.backend,
        "geometry": subject.geometry_name,
        "num_parameters": count_parameters(subject.weights.geometry),
        "nbytes": computer.model.nbytes,
        "dtype": subject.weight_type,
        "device": str(subject.device),
        "computes": computer.description,
        "interpreted": subject.device.type == "cpu",
        "seconds": round(seconds, 2),
    }


def _memory(device: torch.device) -> Record:
    if device.type != "cuda":
        return {"kind": "memory", "free_bytes": None, "total_bytes": None}
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device)
    return {"kind": "memory", "free_bytes": free, "total_bytes": total, "torch_peak_bytes": peak}


def _numbers(text: str) -> list[int]:
    return [int(entry) for entry in text.split(",")]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="the fused backend's kernels on random weights")
    parser.add_argument("what", choices=("parity", "latency", "profile"))
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="gpt-j-6b")
    parser.add_argument("--weight-type", choices=WEIGHT_TYPES, default="float16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cells", type=parse_cells, default=[], help="input:output,…")
    parser.add_argument("--batches", type=_numbers, default=[1], help="1,2,4,…")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each cell")
    parser.add_argument("--steps", type=int, default=48, help="timed steps of each batch")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the records. Exit codes: 0 done, 1 failed, 2 this machine cannot run it."""
    flags = build_parser().parse_args(arguments)

    def records() -> Iterator[Record]:
        subject = subject_of(flags.geometry, flags.weight_type, flags.device)
        if flags.what == "parity":
            yield from measure_parity(subject)
        elif flags.what == "profile":
            yield from measure_profile(subject, steps=flags.steps)
        else:
            yield from measure_latency(
                subject,
                cells=flags.cells,
                batches=flags.batches,
                repeats=flags.repeats,
                steps=flags.steps,
            )

    return print_records(records)


if __name__ == "__main__":
    sys.exit(main())
