"""The huggingface backend against transformers itself: same bits, one cache a sequence."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gptjet.service.backends import huggingface
from gptjet.service.backends.factory import LoadedModel, load_backend
from gptjet.service.backends.huggingface import HuggingFaceBackend
from gptjet.service.engine.backend import Phase, ScheduledBatch
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.engine.request import SamplingParams, new_request
from gptjet.service.engine.sequence import Sequence
from gptjet.service.models.checkpoint import resolve_checkpoint
from gptjet.service.models.transformers_loader import load_causal_lm

CPU = torch.device("cpu")
PROMPT = [72, 101, 108, 108, 111]
OTHER_PROMPT = [200, 3, 77]


def load(folder: Path, **options: Any) -> HuggingFaceBackend:
    return cast(HuggingFaceBackend, load_backend("huggingface", str(folder), **options).backend)


@pytest.fixture
def backend(make_gptj_checkpoint: Callable[..., Path]) -> Iterator[HuggingFaceBackend]:
    backend = load(make_gptj_checkpoint(), max_sequences=4)
    yield backend
    backend.close()


def sequence_of(prompt: list[int], sequence_id: int = 1, **params: Any) -> Sequence:
    """A sequence as the engine would make it; the backend looks at neither of its helpers."""
    request = new_request(tuple(prompt), SamplingParams(max_new_tokens=32, **params))
    return Sequence(
        sequence_id,
        request,
        index=0,
        detokenizer=cast(Any, None),
        sampling_state=cast(Any, None),
    )


def prefill(backend: HuggingFaceBackend, sequence: Sequence) -> torch.Tensor:
    return backend.prefill(ScheduledBatch(Phase.PREFILL, (sequence,))).logits


def decode(backend: HuggingFaceBackend, sequence: Sequence) -> torch.Tensor:
    return backend.decode(ScheduledBatch(Phase.DECODE, (sequence,)))


def greedy_steps(backend: HuggingFaceBackend, sequence: Sequence) -> Iterator[torch.Tensor]:
    """Logits [V] of each step; the likeliest token is appended before the next one."""
    logits = prefill(backend, sequence)
    while True:
        yield logits[0]
        sequence.output_token_ids.append(int(logits.argmax()))
        logits = decode(backend, sequence)


def greedy_logits(backend: HuggingFaceBackend, sequence: Sequence, steps: int) -> torch.Tensor:
    """Logits [steps, V] of greedy steps, the sequence released afterwards."""
    rows = [row for row, _ in zip(greedy_steps(backend, sequence), range(steps), strict=False)]
    backend.release(sequence)
    return torch.stack(rows)


def generate_logits(folder: Path, prompt: list[int], steps: int, dtype: str) -> torch.Tensor:
    """The same of transformers' own greedy `generate`, the model loaded its plainest way."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
    return torch.cat(output.logits).float()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_of_every_step_are_those_of_generate_to_the_bit(
    make_gptj_checkpoint: Callable[..., Path], dtype: str
) -> None:
    folder = make_gptj_checkpoint()
    logits = greedy_logits(load(folder, dtype=dtype), sequence_of(PROMPT), 20)
    assert logits.dtype is torch.float32
    assert torch.equal(logits, generate_logits(folder, PROMPT, 20, dtype))
    # The random weights are no degenerate case: tokens vary and no step is a near-tie.
    best = logits.topk(2).values
    assert len(set(logits.argmax(-1).tolist())) >= 8
    if dtype == "float32":
        assert (best[:, 0] - best[:, 1]).min() > 1e-3


FAMILIES: dict[str, dict[str, Any]] = {
    "codegen": {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8, "n_positions": 64},
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 64},
    "gpt_neo": {
        "hidden_size": 32,
        "num_heads": 2,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": 64,
    },
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "ffn_dim": 64,
        "max_position_embeddings": 64,
    },
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
    },
    "bloom": {"hidden_size": 32, "n_head": 2, "n_layer": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_causal_models_equal_generate_to_the_bit(
    make_causal_lm_checkpoint: Callable[..., Path], family: str
) -> None:
    folder = make_causal_lm_checkpoint(family, vocab_size=96, **FAMILIES[family])
    model = load_causal_lm(resolve_checkpoint(str(folder)), device=CPU, dtype=torch.float32)
    backend = HuggingFaceBackend(model, model_name=family)
    assert backend.spec.max_context == (2048 if family == "bloom" else 64)  # bloom has no limit
    assert backend.spec.vocab_size == 96
    prompt = [5, 17, 60, 2, 2, 90, 33]
    expected = generate_logits(folder, prompt, 20, "float32")
    assert torch.equal(greedy_logits(backend, sequence_of(prompt), 20), expected)


def test_interleaved_sequences_compute_what_each_computes_alone(
    backend: HuggingFaceBackend,
) -> None:
    prompts = [PROMPT, OTHER_PROMPT, [9], PROMPT]
    alone = [greedy_logits(backend, sequence_of(p, i), 12) for i, p in enumerate(prompts)]
    streams = [greedy_steps(backend, sequence_of(p, 10 + i)) for i, p in enumerate(prompts)]
    interleaved: list[list[torch.Tensor]] = [[] for _ in prompts]
    # Sequence i starts i steps late, so prefills fall between the decode steps of others.
    for step in range(12 + len(prompts)):
        for position, stream in enumerate(streams):
            if position <= step < position + 12:
                interleaved[position].append(next(stream))
    for expected, rows in zip(alone, interleaved, strict=True):
        assert torch.equal(torch.stack(rows), expected)


def test_failed_step_leaves_the_other_sequence_intact(backend: HuggingFaceBackend) -> None:
    undisturbed = greedy_logits(backend, sequence_of(PROMPT), 6)
    survivor, victim = sequence_of(PROMPT, 1), sequence_of(OTHER_PROMPT, 2)
    steps = greedy_steps(backend, survivor)
    rows = [next(steps), next(steps)]
    victim.output_token_ids.append(int(prefill(backend, victim).argmax()))

    def fail(*_: object) -> None:
        raise RuntimeError("the second layer failed")

    # After the first layer has extended its cache: the sequence's state is half a step ahead.
    hook = backend._model.transformer.h[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="second layer"):
        decode(backend, victim)
    hook.remove()
    with pytest.raises(RuntimeError, match="sequence 2 has 4 tokens and a KV cache of 0"):
        decode(backend, victim)
    rows += [next(steps) for _ in range(4)]
    assert torch.equal(torch.stack(rows), undisturbed)


def test_failed_prefill_keeps_no_cache(backend: HuggingFaceBackend) -> None:
    with pytest.raises(IndexError):
        prefill(backend, sequence_of([1, 100_000]))
    assert backend._caches == {}


def test_prefill_of_a_sequence_with_output_computes_prompt_and_output(
    backend: HuggingFaceBackend,
) -> None:
    sequence = sequence_of(PROMPT)
    steps = greedy_steps(backend, sequence)
    rows = [next(steps) for _ in range(6)]
    backend.release(sequence)
    # The same five outputs in one forward: equal up to the rounding of another summation order.
    torch.testing.assert_close(prefill(backend, sequence)[0], rows[5], rtol=1e-4, atol=1e-4)
    sequence.output_token_ids.append(int(rows[5].argmax()))
    assert decode(backend, sequence).shape == (1, 263)


def test_prompt_logits_are_given_for_every_position_but_the_last(
    backend: HuggingFaceBackend,
) -> None:
    sequence = sequence_of(PROMPT, echo=True, logprobs=0)
    result = backend.prefill(ScheduledBatch(Phase.PREFILL, (sequence,)))
    with torch.inference_mode():
        expected = backend._model(torch.tensor([PROMPT])).logits[0]
    prompt_logits = result.prompt_logits[0]
    assert prompt_logits is not None
    assert prompt_logits.shape == (len(PROMPT) - 1, 263)
    assert torch.equal(prompt_logits, expected[:-1])
    assert torch.equal(result.logits, expected[-1:])


def test_prompt_of_one_token_has_no_prompt_logits_to_give(backend: HuggingFaceBackend) -> None:
    sequence = sequence_of([7], echo=True, logprobs=0)
    result = backend.prefill(ScheduledBatch(Phase.PREFILL, (sequence,)))
    assert result.prompt_logits[0] is not None
    assert result.prompt_logits[0].shape == (0, 263)


def test_only_the_last_position_goes_through_the_head(backend: HuggingFaceBackend) -> None:
    shapes: list[torch.Size] = []
    backend._model.lm_head.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    result = backend.prefill(ScheduledBatch(Phase.PREFILL, (sequence_of(PROMPT),)))
    assert result.prompt_logits == (None,)
    assert shapes == [(1, 1, 128)]


def test_logits_may_be_changed_in_place_without_changing_the_next_step(
    backend: HuggingFaceBackend,
) -> None:
    expected = greedy_logits(backend, sequence_of(PROMPT), 3)
    sequence = sequence_of(PROMPT)
    for row, logits in zip(expected, greedy_steps(backend, sequence), strict=False):
        assert not logits.is_inference()
        assert torch.equal(logits, row)
        logits[int(logits.argmin())] = -float("inf")


def test_release_forgets_the_cache_and_unknown_sequences_are_fine(
    backend: HuggingFaceBackend,
) -> None:
    sequence = sequence_of(PROMPT)
    backend.release(sequence)
    sequence.output_token_ids.append(int(prefill(backend, sequence).argmax()))
    decode(backend, sequence)
    backend.release(sequence)
    assert backend._caches == {}
    with pytest.raises(RuntimeError, match="KV cache of 0"):
        decode(backend, sequence)


def test_decode_out_of_step_with_its_cache_is_refused(backend: HuggingFaceBackend) -> None:
    sequence = sequence_of(PROMPT)
    prefill(backend, sequence)
    sequence.output_token_ids += [1, 2]
    with pytest.raises(RuntimeError, match="has 7 tokens and a KV cache of 5"):
        decode(backend, sequence)


def test_warm_up_leaves_no_cache_behind(backend: HuggingFaceBackend) -> None:
    backend.warm_up()
    assert backend._caches == {}


def test_context_can_be_filled_to_its_end(make_gptj_checkpoint: Callable[..., Path]) -> None:
    folder = make_gptj_checkpoint(n_positions=13)
    logits = greedy_logits(load(folder), sequence_of(PROMPT), 8)  # 5 + 8 = 13
    assert torch.equal(logits, generate_logits(folder, PROMPT, 8, "float32"))


def test_spec_says_what_the_checkpoint_says(backend: HuggingFaceBackend) -> None:
    spec = backend.spec
    assert (spec.name, spec.architecture) == ("huggingface", "GPTJForCausalLM")
    assert (spec.device, spec.dtype) == ("cpu", "float32")
    assert (spec.max_batch_size, spec.max_prefill_batch_size, spec.max_sequences) == (1, 1, 4)
    assert (spec.vocab_size, spec.max_context, spec.block_size) == (263, 64, 16)
    assert spec.eos_token_ids == (256,)
    assert spec.num_kv_blocks == 4 * 64 // 16  # four full contexts, which fit here
    assert spec.num_parameters == sum(p.numel() for p in backend._model.parameters())


def test_num_parameters_counts_a_tied_head_once(
    make_causal_lm_checkpoint: Callable[..., Path],
) -> None:
    folder = make_causal_lm_checkpoint("gpt2", vocab_size=96, **FAMILIES["gpt2"])
    checkpoint = resolve_checkpoint(str(folder))
    model = load_causal_lm(checkpoint, device=CPU, dtype=torch.float32)
    assert (
        HuggingFaceBackend(model, model_name="x").spec.num_parameters == checkpoint.num_parameters
    )


def test_kv_blocks_cover_odd_contexts_whole(make_gptj_checkpoint: Callable[..., Path]) -> None:
    folder = make_gptj_checkpoint(n_positions=37)
    assert load(folder, max_sequences=2).spec.num_kv_blocks == 2 * 3  # ceil(37 / 16)
    assert load(folder, kv_cache_tokens=100).spec.num_kv_blocks == 7  # ceil(100 / 16)


# A token's keys and values: 2 layers x 2 x 128 wide x 4 bytes.
KV_BYTES_PER_BLOCK = 16 * 2 * 2 * 128 * 4
WEIGHT_BYTES = 462_855 * 4


def test_kv_blocks_are_half_of_what_the_weights_leave_free(
    make_gptj_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = WEIGHT_BYTES + 2 * 5 * KV_BYTES_PER_BLOCK
    monkeypatch.setattr(huggingface, "free_bytes", lambda _: free)
    spec = load(make_gptj_checkpoint()).spec
    assert spec.num_parameters == WEIGHT_BYTES // 4
    assert spec.num_kv_blocks == 5


@pytest.mark.parametrize(
    ("free", "options", "expected"),
    [
        (WEIGHT_BYTES - 1, {}, "its weights take 1.8 MiB in float32, 1.8 MiB are free"),
        (WEIGHT_BYTES, {}, "16 tokens take 32.0 KiB, 0 B are free"),
        (
            WEIGHT_BYTES + 4 * KV_BYTES_PER_BLOCK,
            {"kv_cache_tokens": 48},
            "48 tokens take 96.0 KiB, 64.0 KiB are free",
        ),
    ],
)
def test_model_that_does_not_fit_is_refused_with_the_numbers(
    make_gptj_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    options: dict[str, int],
    expected: str,
) -> None:
    monkeypatch.setattr(huggingface, "free_bytes", lambda _: free)
    with pytest.raises(BackendLoadError, match=expected):
        load(make_gptj_checkpoint(), **options)


def test_model_that_keeps_no_cache_is_refused(
    make_gptj_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = resolve_checkpoint(str(make_gptj_checkpoint()))
    model = load_causal_lm(checkpoint, device=CPU, dtype=torch.float32)
    forward = model.forward

    def without_cache(**arguments: Any) -> Any:
        return forward(**{**arguments, "past_key_values": None, "use_cache": False})

    monkeypatch.setattr(model, "forward", without_cache)
    with pytest.raises(BackendLoadError, match="keeps no KV cache"):
        HuggingFaceBackend(model, model_name="x")


def test_tokenizer_of_another_model_is_refused(make_gptj_checkpoint: Callable[..., Path]) -> None:
    # The byte tokenizer's end-of-text is id 256, which a vocabulary of 250 does not have.
    with pytest.raises(BackendLoadError, match="tokenizer has 257 ids and the model 250"):
        load(make_gptj_checkpoint(vocab_size=250))


def test_eos_ids_come_from_the_generation_config_first(
    make_gptj_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(make_gptj_checkpoint(), tmp_path / "model"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 3, 70000]}')
    assert load(folder).spec.eos_token_ids == (3, 9)
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')
    assert load(folder).spec.eos_token_ids == (256,)


def test_pickle_is_loaded_only_with_the_flag(
    make_gptj_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    original = make_gptj_checkpoint()
    folder = Path(shutil.copytree(original, tmp_path / "model"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackendLoadError, match="--allow-pickle"):
        load(folder)
    from_pickle = greedy_logits(load(folder, allow_pickle=True), sequence_of(PROMPT), 5)
    from_safetensors = greedy_logits(load(original), sequence_of(PROMPT), 5)
    torch.testing.assert_close(from_pickle, from_safetensors)


def test_pickle_that_lacks_a_tensor_is_refused_after_loading(
    make_gptj_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(make_gptj_checkpoint(), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.ln_f.bias"]
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackendLoadError, match=r"missing transformer\.ln_f\.bias"):
        load(folder, allow_pickle=True)


def test_close_gives_the_model_back(make_gptj_checkpoint: Callable[..., Path]) -> None:
    loaded: LoadedModel = load_backend("huggingface", str(make_gptj_checkpoint()))
    backend = cast(HuggingFaceBackend, loaded.backend)
    model = weakref.ref(backend._model)
    backend.close()
    gc.collect()
    assert model() is None
