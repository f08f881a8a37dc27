"""From a checkpoint to a proven backend, through the gate, with the stand-in for the card."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.proto.v1 import text_generation_pb2_grpc as pb_grpc
from gptjet.service.backends.deepspeed import injection, loader
from gptjet.service.backends.deepspeed.backend import DeepSpeedBackend
from gptjet.service.backends.deepspeed.guards import Platform
from gptjet.service.backends.factory import LoadedModel, LoadOptions, load_backend
from gptjet.service.config import ServerConfig
from gptjet.service.engine.backend import ParityStatus
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.rpc.server import Server

SIZES = {"head_dim": 16, "n_head": 2, "n_layer": 2, "rotary_dim": 8, "n_positions": 64}


def stand_in_platform(free_bytes: int = 10**12) -> Platform:
    return Platform(
        device=torch.device("cpu"),
        dtype=torch.float32,
        name="stand-in",
        capability=None,
        free_bytes=lambda: free_bytes,
        is_stand_in=True,
    )


def load(folder: Path, platform: Platform | None = None, **options: Any) -> LoadedModel:
    return loader.load(
        LoadOptions(model=str(folder), progress=False, **options),
        platform=platform or stand_in_platform(),
    )


@pytest.fixture
def checkpoint(make_gptj_checkpoint: Callable[..., Path]) -> Path:
    return make_gptj_checkpoint(**SIZES)


@pytest.fixture
def loaded(op: Any, checkpoint: Path) -> Iterator[LoadedModel]:
    model = load(checkpoint)
    yield model
    model.backend.close()


@pytest.fixture
def wrong_rotary(stand_in_module: Any, install_op: Callable[[Any], Any]) -> Any:
    return install_op(stand_in_module.WrongRotaryOp())


def test_passing_gate_serves_injected_blocks_and_says_with_what(loaded: LoadedModel) -> None:
    spec = loaded.backend.spec
    assert isinstance(loaded.backend, DeepSpeedBackend)
    assert (spec.name, spec.max_sequences, spec.max_batch_size) == ("deepspeed", 1, 1)
    assert (spec.max_context, spec.num_kv_blocks * spec.block_size) == (64, 64)
    assert spec.parity.status is ParityStatus.PASSED
    assert spec.parity.tokens_agreed == spec.parity.tokens_compared > 0
    assert spec.parity.max_relative_error < 1e-4
    for word in ("deepspeed 0.", "torch 2.", "transformers 5.", "stand-in"):
        assert word in spec.parity.detail


def test_wrong_rotary_is_caught_and_huggingface_serves_instead(
    wrong_rotary: Any, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model = load(checkpoint)
    spec = model.backend.spec
    assert spec.name == "huggingface"
    assert spec.parity.status is ParityStatus.FAILED
    assert spec.parity.max_relative_error > 0.1
    assert spec.parity.detail.startswith("asked for deepspeed, serving huggingface: ")
    assert "serving with the huggingface backend instead" in caplog.text
    assert injection._open_model is None  # the injected weights are gone


def test_wrong_rotary_stops_the_start_with_strict_parity(
    wrong_rotary: Any, checkpoint: Path
) -> None:
    with pytest.raises(BackendLoadError, match=r"parity with transformers failed.*--strict-parity"):
        load(checkpoint, strict_parity=True)
    assert injection._open_model is None


def test_checkpoint_too_large_for_the_card_is_refused_with_the_plan(
    op: Any, checkpoint: Path
) -> None:
    with pytest.raises(
        BackendLoadError, match=r"does not fit stand-in: weights .* free; "
    ) as error:
        load(checkpoint, platform=stand_in_platform(free_bytes=1000))
    assert "\n" not in str(error.value)
    assert op.allocations == 0


def test_kv_cache_tokens_bound_the_context_that_is_served(op: Any, checkpoint: Path) -> None:
    backend = load(checkpoint, kv_cache_tokens=32).backend
    assert backend.spec.max_context == 32
    assert op.workspace.max_tokens == 32


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"rotary_dim": 12}, "rotary_dim is 12"),
        ({"n_inner": 100}, "n_inner is 100"),
    ],
)
def test_geometry_is_refused_before_a_weight_is_read(
    fields: dict[str, int], problem: str, op: Any, make_causal_lm_checkpoint: Callable[..., Path]
) -> None:
    folder = make_causal_lm_checkpoint(
        "gptj",
        **{"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 300, "n_positions": 32}
        | {"rotary_dim": 8}
        | fields,
    )
    with pytest.raises(BackendLoadError, match=problem):
        load(folder)


def test_cpu_is_refused_naming_what_to_use_instead(checkpoint: Path) -> None:
    for device in ("auto", "cpu"):
        with pytest.raises(BackendLoadError) as error:
            load_backend("deepspeed", str(checkpoint), device=device)
        assert "--backend huggingface" in str(error.value)
        assert "--backend fused" in str(error.value)


@contextlib.asynccontextmanager
async def serving(model: LoadedModel) -> AsyncIterator[Any]:
    """A stub of a gRPC server of the model."""
    server = Server(ServerConfig(port=0, backend="deepspeed"))
    await server.start()
    try:
        await server.attach(model.backend, model.tokenizer)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield pb_grpc.TextGenerationStub(channel)
    finally:
        await server.drain(0.0)


async def stream(
    stub: Any, prompt: str, *, max_new_tokens: int = 12, **more: Any
) -> tuple[list[int], Any]:
    """Ids and the summary of one stream."""
    request = pb.GenerateStreamRequest(
        text=prompt,
        sampling_params=pb.SamplingParams(
            max_new_tokens=max_new_tokens, temperature=0.0, ignore_eos=True, **more
        ),
    )
    ids: list[int] = []
    summary = None
    async for response in stub.GenerateStream(request):
        if response.HasField("chunk"):
            ids += response.chunk.token_ids
        else:
            summary = response.summary
    return ids, summary


async def test_concurrent_grpc_streams_equal_what_they_give_alone(
    loaded: LoadedModel, checkpoint: Path, greedy_reference: Any
) -> None:
    """On one injected model, and alone means transformers' own greedy tokens."""
    from transformers import AutoModelForCausalLM

    prompts = ["The food was", "x", "Never again! " * 2, "a longer prompt to fill"]
    reference = AutoModelForCausalLM.from_pretrained(checkpoint)
    expected = [greedy_reference(reference, loaded.tokenizer.encode(p), 12)[0] for p in prompts]
    async with serving(loaded) as stub:
        alone = [(await stream(stub, prompt))[0] for prompt in prompts]
        together = await asyncio.gather(*(stream(stub, p) for p in prompts))
        model = await stub.GetModel(pb.GetModelRequest())
    assert [ids for ids, _ in together] == alone == expected
    queue_ms = sorted(summary.timings.queue_ms for _, summary in together)
    assert queue_ms[-1] > queue_ms[0]  # one at a time: the others waited, and it shows
    assert model.backend == "deepspeed"
    assert model.parity.status == pb.ParityVerdict.STATUS_PASSED


async def test_cancelled_stream_leaves_the_next_one_clean(loaded: LoadedModel) -> None:
    async with serving(loaded) as stub:
        expected, _ = await stream(stub, "The food")
        request = pb.GenerateStreamRequest(
            text="something else", sampling_params=pb.SamplingParams(max_new_tokens=40)
        )
        call = stub.GenerateStream(request)
        await call.read()
        call.cancel()
        assert (await stream(stub, "The food"))[0] == expected


async def test_echoed_prompt_has_the_logprobs_transformers_gives(
    loaded: LoadedModel, checkpoint: Path
) -> None:
    from transformers import AutoModelForCausalLM

    ids = loaded.tokenizer.encode("echo this")
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(checkpoint)(torch.tensor([ids])).logits[0]
    logprobs = torch.log_softmax(logits.float(), -1)
    expected = [float(logprobs[i, token]) for i, token in enumerate(ids[1:])]
    async with serving(loaded) as stub:
        response = await stub.Generate(
            pb.GenerateRequest(
                text="echo this",
                sampling_params=pb.SamplingParams(max_new_tokens=1, echo=True, logprobs=1),
            )
        )
    got = [entry.logprob for entry in response.sequences[0].logprobs[1 : len(ids)]]
    assert got == pytest.approx(expected, abs=1e-4)


def test_gate_detail_is_json_and_one_line(loaded: LoadedModel) -> None:
    parity = loaded.backend.spec.parity
    assert "\n" not in parity.detail
    json.loads(json.dumps({"error": parity.max_relative_error}, allow_nan=False))
