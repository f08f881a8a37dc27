"""A decode step of the transformers backend, as a share of the measured copy bandwidth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptjet.benchmarks.geometry import geometry_from_config
from gptjet.benchmarks.make_checkpoint import write_checkpoint
from gptjet.benchmarks.roofline import WEIGHT_TYPES, decode_work
from gptjet.service.backends.factory import load_backend
from gptjet.service.engine.backend import Phase, ScheduledBatch
from gptjet.service.engine.request import SamplingParams, new_request
from gptjet.service.engine.sequence import Sequence

_CONTEXT = 64


@pytest.mark.parametrize("geometry", ["small", "medium"])
def bench_decode_step(bench: Any, copy_gb_s: float, tmp_path: Path, geometry: str) -> None:
    """At a context of 64 tokens; the cache grows by one a call, whose bytes are not counted."""
    import torch
    from transformers import AutoModelForCausalLM

    write_checkpoint(tmp_path, geometry, context=100_000)
    loaded = load_backend("huggingface", str(tmp_path), device="cpu", dtype="float32")
    backend = loaded.backend
    nothing: Any = None
    prompt = tuple(range(1, _CONTEXT + 1))
    request = new_request(prompt, SamplingParams(max_new_tokens=50_000))
    sequence = Sequence(0, request, 0, nothing, nothing)
    batch = ScheduledBatch(Phase.DECODE, (sequence,))

    def start() -> None:
        sequence.output_token_ids.clear()
        logits = backend.prefill(ScheduledBatch(Phase.PREFILL, (sequence,))).logits
        sequence.output_token_ids.append(int(logits[0].argmax()))

    def step() -> None:
        logits = backend.decode(batch)
        sequence.output_token_ids.append(int(logits[0].argmax()))

    def check() -> None:
        """The greedy tokens of transformers' own generate."""
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
        ids = torch.tensor([prompt])
        expected = model.generate(ids, do_sample=False, min_new_tokens=8, max_new_tokens=8)
        start()
        for _ in range(7):
            step()
        assert sequence.output_token_ids == expected[0, _CONTEXT:].tolist()

    config = json.loads((tmp_path / "config.json").read_text())
    work = decode_work(geometry_from_config(config), WEIGHT_TYPES["fp32"], _CONTEXT)
    bench(step, check, bytes_moved=work.num_bytes, copy_gb_s=copy_gb_s)
    backend.close()
