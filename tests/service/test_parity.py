"""Tokens over gRPC equal `transformers.generate`: the whole server, from the wire to the logits.

The reference loads the same folder in transformers' plainest way and calls `generate`; nothing of
ours is in it. Every comparison is of token ids, and exact.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptjet.service.backends.factory import load_backend
from gptjet.service.client import AsyncClient, FinishReason
from gptjet.service.config import ServerConfig
from gptjet.service.embedded import build_prompt, embedded_path
from gptjet.service.rpc.server import Server

# Head sizes 32 to 256; rotary_dim absent (transformers then turns 64), partial and full; odd
# numbers of heads, layers and positions; the vocabulary a prime (263, see conftest).
GEOMETRIES: dict[str, dict[str, Any]] = {
    "head-32-full": {"head_dim": 32, "n_head": 3, "rotary_dim": 32, "n_positions": 37},
    "head-32-least": {"head_dim": 32, "n_head": 4, "rotary_dim": 2, "n_positions": 29},
    "head-64-partial": {"head_dim": 64, "n_layer": 3, "rotary_dim": 16, "n_positions": 61},
    "head-64-absent": {"head_dim": 64, "n_head": 3, "rotary_dim": None, "n_positions": 48},
    "head-128-absent": {"head_dim": 128, "n_head": 2, "rotary_dim": None, "n_positions": 41},
    "head-128-full": {"head_dim": 128, "n_head": 1, "rotary_dim": 128, "n_positions": 33},
    "head-256-partial": {"head_dim": 256, "n_head": 2, "rotary_dim": 64, "n_positions": 53},
    "head-256-full": {"head_dim": 256, "n_head": 1, "rotary_dim": 256, "n_positions": 31},
}


class Reference:
    """transformers' own model of a folder, and its greedy `generate`."""

    def __init__(self, folder: Path, dtype: str = "float32") -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.eos_token_id = self.model.generation_config.eos_token_id

    def generate(
        self, prompt: Sequence[int], max_new_tokens: int, *, ignore_eos: bool = True
    ) -> tuple[list[int], torch.Tensor]:
        """New token ids, and the logits [steps, V] they were chosen by."""
        self.model.generation_config.eos_token_id = None if ignore_eos else self.eos_token_id
        with torch.inference_mode():
            output = self.model.generate(
                torch.tensor([list(prompt)]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return output.sequences[0, len(prompt) :].tolist(), torch.cat(output.logits).float()


@contextlib.asynccontextmanager
async def serving(
    folder: Path, dtype: str = "float32", backend: str = "huggingface"
) -> AsyncIterator[AsyncClient]:
    """A client of a real server on a loopback port that serves `folder` on the CPU."""
    server = Server(ServerConfig(port=0, reflection=False))
    await server.start()
    try:
        loaded = await asyncio.to_thread(
            load_backend, backend, str(folder), device="cpu", dtype=dtype, cpu_threads=1
        )
        await server.attach(loaded.backend, loaded.tokenizer)
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            yield client
    finally:
        await server.drain(0.0)


def prompts_for(context: int) -> list[list[int]]:
    """Prompts of one token, odd lengths, and one token short of the context."""
    generator = torch.Generator().manual_seed(context)
    lengths = [1, 7, 2 * (context // 5) + 1, context - 1]
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


async def stream_tokens(client: AsyncClient, prompt: Sequence[int], **options: Any) -> list[int]:
    tokens: list[int] = []
    async with client.generate_stream(prompt, **options) as stream:
        async for chunk in stream:
            tokens += chunk.token_ids
    return tokens


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=list(GEOMETRIES))
async def test_greedy_tokens_equal_generate_to_the_end_of_the_context(
    make_gptj_checkpoint: Callable[..., Path], geometry: dict[str, Any]
) -> None:
    folder = make_gptj_checkpoint(**geometry)
    context = geometry["n_positions"]
    prompts = prompts_for(context)
    reference = Reference(folder)
    expected = [reference.generate(p, context - len(p))[0] for p in prompts]
    # A comparison of one token repeated would prove little.
    assert len(set(expected[1])) >= 10
    options = [{"max_new_tokens": context - len(p), "ignore_eos": True} for p in prompts]
    async with serving(folder) as client:
        info = await client.get_model()
        assert (info.max_context, info.vocab_size) == (context, 263)
        for prompt, option, tokens in zip(prompts, options, expected, strict=True):
            result = await client.generate(prompt, **option)
            assert list(result.token_ids) == tokens
            assert len(prompt) + len(tokens) == context
            assert result.summary.finish_reason is FinishReason.LENGTH
        together = await asyncio.gather(
            *(stream_tokens(client, p, **o) for p, o in zip(prompts, options, strict=True))
        )
    assert together == expected


async def test_concurrent_streams_interleave_and_each_equals_generate(
    make_gptj_checkpoint: Callable[..., Path],
) -> None:
    folder = make_gptj_checkpoint(n_positions=64)
    prompts = prompts_for(64)[:3]
    reference = Reference(folder)
    arrivals: list[int] = []
    received: list[list[int]] = [[] for _ in prompts]

    async def follow(number: int, client: AsyncClient) -> None:
        options: dict[str, Any] = {"max_new_tokens": 30, "ignore_eos": True}
        async with client.generate_stream(prompts[number], **options) as stream:
            async for chunk in stream:
                arrivals.append(number)
                received[number] += chunk.token_ids

    async with serving(folder) as client:
        await asyncio.gather(*(follow(number, client) for number in range(len(prompts))))
    assert received == [reference.generate(prompt, 30)[0] for prompt in prompts]
    switches = sum(a != b for a, b in itertools.pairwise(arrivals))
    assert switches >= 30, "the three streams ran one after the other"


async def test_generation_stops_where_generate_stops_at_end_of_text(
    make_gptj_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """End-of-text is declared to be the token that greedy decoding reaches after some steps."""
    folder = Path(shutil.copytree(make_gptj_checkpoint(), tmp_path / "model"))
    prompt = prompts_for(64)[1]
    free = Reference(folder).generate(prompt, 20)[0]
    first_time = next(step for step in range(4, 20) if free[step] not in free[:step])
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [free[first_time], 256]})
    )
    expected, _ = Reference(folder).generate(prompt, 20, ignore_eos=False)
    assert expected == free[: first_time + 1]
    async with serving(folder) as client:
        result = await client.generate(prompt, max_new_tokens=20)
    assert result.summary.finish_reason is FinishReason.STOP_TOKEN
    assert result.summary.sequences[0].stop_match == free[first_time]
    assert list(result.token_ids)[:first_time] == expected[:-1]


async def test_bf16_tokens_equal_generate_in_bf16(
    make_gptj_checkpoint: Callable[..., Path],
) -> None:
    folder = make_gptj_checkpoint()
    prompt = prompts_for(64)[1]
    expected, _ = Reference(folder, "bfloat16").generate(prompt, 57)
    async with serving(folder, "bfloat16") as client:
        assert (await client.get_model()).dtype == "bfloat16"
        result = await client.generate(prompt, max_new_tokens=57, ignore_eos=True)
    assert list(result.token_ids) == expected


async def test_logprobs_are_those_of_the_logits_of_generate(
    make_gptj_checkpoint: Callable[..., Path],
) -> None:
    folder = make_gptj_checkpoint()
    prompt = prompts_for(64)[1]
    expected, logits = Reference(folder).generate(prompt, 12)
    logprobs = logits.log_softmax(-1)
    async with serving(folder) as client:
        result = await client.generate(prompt, max_new_tokens=12, ignore_eos=True, logprobs=3)
    entries = result.sequences[0].logprobs
    assert [entry.token_id for entry in entries] == expected
    assert len(expected) == 12
    for step, entry in enumerate(entries):
        top = logprobs[step].topk(3)
        assert entry.logprob == pytest.approx(float(logprobs[step, expected[step]]), abs=1e-5)
        assert [token_id for token_id, _ in entry.top] == top.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(top.values.tolist(), abs=1e-5)


async def test_logprobs_of_an_echoed_prompt_are_those_of_the_model(
    make_gptj_checkpoint: Callable[..., Path],
) -> None:
    folder = make_gptj_checkpoint()
    prompt = prompts_for(64)[1]
    with torch.inference_mode():
        logprobs = Reference(folder).model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    async with serving(folder) as client:
        result = await client.generate(prompt, max_new_tokens=1, echo=True, logprobs=0)
    entries = result.sequences[0].logprobs[: len(prompt)]
    assert [entry.token_id for entry in entries] == prompt
    assert entries[0].logprob is None
    for position in range(1, len(prompt)):
        expected = float(logprobs[position - 1, prompt[position]])
        assert entries[position].logprob == pytest.approx(expected, abs=1e-5)


async def test_seeded_sampling_is_the_same_alone_and_among_others(
    make_gptj_checkpoint: Callable[..., Path],
) -> None:
    prompt, *others = prompts_for(64)[:3]
    options: dict[str, Any] = {"max_new_tokens": 25, "ignore_eos": True, "temperature": 1.0}
    async with serving(make_gptj_checkpoint()) as client:
        alone = await stream_tokens(client, prompt, seed=5, **options)
        other_seed = await stream_tokens(client, prompt, seed=6, **options)
        crowd = [stream_tokens(client, p, seed=5 + n, **options) for n, p in enumerate(others)]
        crowd += [stream_tokens(client, prompt, max_new_tokens=25, ignore_eos=True)]
        together, *_ = await asyncio.gather(
            stream_tokens(client, prompt, seed=5, **options), *crowd
        )
    assert together == alone
    assert other_seed != alone


EMBEDDED_PROMPTS = [
    build_prompt("The film was a delight from the first scene to the last."),
    build_prompt("Dreadful service, cold food, and nobody cared :("),
    "Once upon a time",
    "a",
    "Größe, 東京, naïve 🙂\n",
]


@pytest.mark.parametrize("backend", ["huggingface", "auto"])
async def test_embedded_checkpoint_equals_generate(backend: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_path())
    reference = Reference(embedded_path())
    prompts = [tokenizer(text)["input_ids"] for text in EMBEDDED_PROMPTS]
    expected = [reference.generate(p, 24, ignore_eos=False)[0] for p in prompts]
    context = reference.model.config.n_positions
    long_prompt = [token for prompt in prompts for token in prompt * context][: context - 41]
    last_tokens = reference.generate(long_prompt, 41)[0]
    async with serving(embedded_path(), backend=backend) as client:
        info = await client.get_model()
        assert info.backend == ("fused" if backend == "auto" else backend)
        alone = [await client.generate(text, max_new_tokens=24) for text in EMBEDDED_PROMPTS]
        together = await asyncio.gather(
            *(stream_tokens(client, text, max_new_tokens=24) for text in EMBEDDED_PROMPTS)
        )
        to_the_end = await client.generate(long_prompt, max_new_tokens=41, ignore_eos=True)
    eos = reference.eos_token_id
    assert [_without(eos, r.token_ids) for r in alone] == [_without(eos, t) for t in expected]
    assert [_without(eos, t) for t in together] == [_without(eos, t) for t in expected]
    assert list(to_the_end.token_ids) == last_tokens


def _without(eos: int, tokens: Sequence[int]) -> list[int]:
    """Tokens up to end-of-text, which `generate` returns as one."""
    return list(tokens[:-1]) if tokens and tokens[-1] == eos else list(tokens)
