"""One library behind one protocol, in whatever environment it is installed: a stand-alone script.

    python worker.py ENGINE MODEL_FOLDER WEIGHT_TYPE THREADS

Standard library only, besides the library that is measured: the environment has nothing of ours.
One JSON line on standard input is one run: {"prompt": [ids], "output_tokens": n}. One line on
standard output answers it: {"tokens": [ids], "token_ms": [ms since the start, one a token],
"e2e_ms", "peak_memory_bytes"}; the first line of all says {"ready": true} or {"error"}.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

OnToken = Callable[[int], None]
Generate = Callable[[Sequence[int], int, OnToken], None]
"""Greedy, exactly so many tokens whatever they are, each reported as soon as it is known."""


def open_transformers(folder: str, weight_type: str, threads: int) -> Generate:
    """transformers' own `generate`, eager, with a streamer."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[weight_type]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.eval()

    class Streamer:
        def __init__(self, on_token: OnToken) -> None:
            self._on_token = on_token
            self._is_prompt = True

        def put(self, value: Any) -> None:
            if not self._is_prompt:
                for token in value.reshape(-1).tolist():
                    self._on_token(token)
            self._is_prompt = False

        def end(self) -> None:
            pass

    def generate(prompt: Sequence[int], output_tokens: int, on_token: OnToken) -> None:
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=output_tokens,
                min_new_tokens=output_tokens,
                # No id ends it: the length is what is compared.
                eos_token_id=None,
                pad_token_id=0,
                streamer=Streamer(on_token),
            )

    return generate


def open_transformers_compiled(folder: str, weight_type: str, threads: int) -> Generate:
    """transformers with its static cache and a step under torch.compile; the prompt runs eager.

    The first run of a length compiles, which takes from tens of seconds to minutes: warm it up.
    """
    import torch
    from transformers import AutoModelForCausalLM, StaticCache

    torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[weight_type]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.eval()
    step: Any = torch.compile(model.forward)
    caches: dict[int, Any] = {}

    def cache_for(tokens: int) -> Any:
        # Attention runs over the whole cache, so one made for the context would be read in vain.
        length = -(-tokens // 64) * 64
        if length not in caches:
            caches[length] = StaticCache(model.config, max_cache_len=length)
        caches[length].reset()
        return caches[length]

    def generate(prompt: Sequence[int], output_tokens: int, on_token: OnToken) -> None:
        ids, position = torch.tensor([list(prompt)]), torch.arange(len(prompt))
        compute = model.forward
        with torch.inference_mode():
            cache = cache_for(len(prompt) + output_tokens)
            for made in range(output_tokens):
                logits = compute(
                    input_ids=ids,
                    past_key_values=cache,
                    cache_position=position,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits
                ids = logits[:, -1:].argmax(-1)
                on_token(int(ids))
                position, compute = torch.tensor([len(prompt) + made]), step

    return generate


def open_ctranslate2(folder: str, weight_type: str, threads: int) -> Generate:
    """CTranslate2's Generator on a converted folder, tokens by its callback."""
    import ctranslate2

    compute_type = {"fp32": "float32", "int8": "int8", "bf16": "bfloat16"}[weight_type]
    generator: Any = ctranslate2.Generator(
        folder, device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=threads
    )
    # It takes tokens, not ids; a converted folder lists them in the order of their ids.
    pieces: list[str] = json.loads((Path(folder) / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(prompt: Sequence[int], output_tokens: int, on_token: OnToken) -> None:
        def on_step(step: Any) -> bool:
            on_token(step.token_id)
            return False  # go on

        generator.generate_batch(
            [[pieces[token] for token in prompt]],
            max_length=output_tokens,
            min_length=output_tokens,
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
            callback=on_step,
        )

    return generate


def open_openvino(folder: str, weight_type: str, threads: int) -> Generate:
    """OpenVINO GenAI's LLMPipeline on an exported folder, tokens by its streamer."""
    import numpy
    import openvino
    import openvino_genai

    if weight_type not in {"fp32", "int8"}:
        raise ValueError(f"OpenVINO's folder is made in fp32 or int8, not {weight_type}")
    # The CPU plugin computes in BF16 where the processor can, unless it is told not to.
    pipeline: Any = openvino_genai.LLMPipeline(
        folder, "CPU", INFERENCE_NUM_THREADS=threads, INFERENCE_PRECISION_HINT="f32"
    )

    class Streamer(openvino_genai.StreamerBase):  # type: ignore[misc]
        def __init__(self, on_token: OnToken) -> None:
            super().__init__()
            self._on_token = on_token

        def write(self, token: int | list[int]) -> Any:
            for each in token if isinstance(token, list) else [token]:
                self._on_token(each)
            return openvino_genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    def generate(prompt: Sequence[int], output_tokens: int, on_token: OnToken) -> None:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = output_tokens
        config.ignore_eos = True
        config.do_sample = False
        ids = numpy.array([list(prompt)], dtype=numpy.int64)
        inputs = openvino_genai.TokenizedInputs(
            openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids))
        )
        pipeline.generate(inputs, config, Streamer(on_token))

    return generate


ENGINES: dict[str, Callable[[str, str, int], Generate]] = {
    "transformers": open_transformers,
    "transformers-compiled": open_transformers_compiled,
    "ctranslate2": open_ctranslate2,
    "openvino": open_openvino,
}


def run(generate: Generate, prompt: Sequence[int], output_tokens: int) -> dict[str, Any]:
    """One run, timed on a monotonic clock."""
    tokens: list[int] = []
    times_ns: list[int] = []

    def on_token(token: int) -> None:
        times_ns.append(time.perf_counter_ns())
        tokens.append(token)

    started_ns = time.perf_counter_ns()
    generate(prompt, output_tokens, on_token)
    ended_ns = time.perf_counter_ns()
    return {
        "tokens": tokens,
        "token_ms": [(when - started_ns) / 1e6 for when in times_ns],
        "e2e_ms": (ended_ns - started_ns) / 1e6,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def peak_memory_bytes(pid: int | str = "self") -> int | None:
    """Most memory a process ever held (Linux: VmHWM); None where the system does not say."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


@contextlib.contextmanager
def own_stdout() -> Iterator[Any]:
    """The protocol's own channel: what a library prints goes to standard error instead."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)
        yield channel


def main() -> int:
    """Answer until the input ends."""
    engine, folder, weight_type, threads = sys.argv[1:]
    with own_stdout() as channel:

        def say(fields: dict[str, Any]) -> None:
            channel.write(json.dumps(fields) + "\n")
            channel.flush()

        try:
            generate = ENGINES[engine](folder, weight_type, int(threads))
            say({"ready": True})
            for line in sys.stdin:
                asked = json.loads(line)
                say(run(generate, asked["prompt"], asked["output_tokens"]))
        except Exception as error:  # noqa: BLE001 - the parent reads JSON lines, not tracebacks
            say({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
