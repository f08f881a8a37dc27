"""Greedy tokens of the fused backend equal transformers FP32, whatever the traffic around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# Head sizes 32 to 256; rotary_dim absent (transformers then turns 64), least, partial and full; odd
# numbers of heads, layers and positions; contexts that end inside a KV block, at its end and in the
# first one; the vocabulary a prime (263, see conftest).
GEOMETRIES: dict[str, dict[str, Any]] = {
    "head-32-full": {"head_dim": 32, "n_head": 3, "rotary_dim": 32, "n_positions": 37},
    "head-32-least": {"head_dim": 32, "n_head": 4, "rotary_dim": 2, "n_positions": 29},
    "head-32-one-layer": {"head_dim": 32, "n_head": 1, "n_layer": 1, "n_positions": 48},
    "head-48-partial": {"head_dim": 48, "n_head": 5, "rotary_dim": 20, "n_positions": 35},
    "head-64-partial": {"head_dim": 64, "n_layer": 3, "rotary_dim": 16, "n_positions": 61},
    "head-64-absent": {"head_dim": 64, "n_head": 3, "rotary_dim": None, "n_positions": 48},
    "head-80-partial": {"head_dim": 80, "n_head": 2, "rotary_dim": 32, "n_positions": 45},
    "head-96-full": {"head_dim": 96, "n_head": 3, "rotary_dim": 96, "n_positions": 33},
    "head-128-absent": {"head_dim": 128, "n_head": 2, "rotary_dim": None, "n_positions": 41},
    "head-128-full": {"head_dim": 128, "n_head": 1, "rotary_dim": 128, "n_positions": 33},
    "head-256-partial": {"head_dim": 256, "n_head": 2, "rotary_dim": 64, "n_positions": 53},
    "head-256-full": {"head_dim": 256, "n_head": 1, "rotary_dim": 256, "n_positions": 31},
    "tiny-context": {"head_dim": 32, "n_head": 2, "n_layer": 2, "n_positions": 13},
}
BUSY = {"head_dim": 64, "n_head": 2, "n_layer": 2, "rotary_dim": 32, "n_positions": 96}

pytestmark = pytest.mark.usefixtures("computer")


@pytest.fixture(params=["gptj", "codegen"])
def busy_folder(
    request: pytest.FixtureRequest,
    make_gptj_checkpoint: Callable[..., Path],
    make_codegen_checkpoint: Callable[..., Path],
) -> Path:
    """A checkpoint for traffic, of each family."""
    if request.param == "gptj":
        return make_gptj_checkpoint(**BUSY)
    return make_codegen_checkpoint(n_positions=96)


def random_prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=list(GEOMETRIES))
def test_tokens_equal_to_the_end_of_the_context_alone_and_together(
    geometry: dict[str, Any],
    make_gptj_checkpoint: Callable[..., Path],
    load_fused: Callable[..., Any],
    reference_of: Callable[..., Any],
    drive: Callable[..., Any],
    prompts: Callable[..., list[list[int]]],
) -> None:
    folder = make_gptj_checkpoint(**geometry)
    context = geometry["n_positions"]
    texts = prompts(context)
    expected = [reference_of(folder).generate(p, context - len(p)) for p in texts]
    loaded = load_fused(folder)
    assert loaded.backend.spec.max_context == context
    alone = drive(loaded)
    for prompt, tokens in zip(texts, expected, strict=True):
        key = alone.add(prompt, max_new_tokens=len(tokens))
        alone.run()
        assert alone.tokens[key, 0] == tokens
    together = drive(loaded, prefix_cache=False)
    keys = [together.add(p, max_new_tokens=len(t)) for p, t in zip(texts, expected, strict=True)]
    together.run()
    assert [together.tokens[key, 0] for key in keys] == expected
    alone.check_nothing_is_held()
    together.check_nothing_is_held()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_embd": 256, "n_head": 8, "rotary_dim": 32, "n_positions": 41},
        {"n_embd": 256, "n_head": 4, "rotary_dim": 64, "n_layer": 3, "n_positions": 50},
    ],
    ids=["head-32-partial", "head-32-full", "head-64-full"],
)
def test_codegen_tokens_equal_to_the_end_of_the_context(
    fields: dict[str, Any],
    make_codegen_checkpoint: Callable[..., Path],
    load_fused: Callable[..., Any],
    reference_of: Callable[..., Any],
    drive: Callable[..., Any],
    prompts: Callable[..., list[list[int]]],
) -> None:
    folder = make_codegen_checkpoint(**fields)
    context = fields.get("n_positions", 64)
    texts = prompts(context)
    expected = [reference_of(folder).generate(p, context - len(p)) for p in texts]
    loaded = load_fused(folder)
    assert loaded.backend.spec.architecture == "CodeGenForCausalLM"
    driver = drive(loaded)
    keys = [driver.add(p, max_new_tokens=len(t)) for p, t in zip(texts, expected, strict=True)]
    driver.run()
    assert [driver.tokens[key, 0] for key in keys] == expected


def test_staggered_arrivals_and_cancellations_change_no_token(
    busy_folder: Path,
    load_fused: Callable[..., Any],
    reference_of: Callable[..., Any],
    drive: Callable[..., Any],
) -> None:
    driver = drive(load_fused(busy_folder), max_prefill_tokens=16)
    texts = random_prompts(14, 60)
    keys = []
    for number, prompt in enumerate(texts):
        keys.append(driver.add(prompt, max_new_tokens=30))
        driver.run(steps=1 + number % 3)
        if number % 4 == 3:
            driver.engine.cancel(keys[number - 2])
            driver.engine.scheduler.block_manager.check_invariants()
    driver.run()
    cancelled = {keys[number - 2] for number in range(3, len(texts), 4)}
    for key, prompt in zip(keys, texts, strict=True):
        expected = reference_of(busy_folder).generate(prompt, 30)
        tokens = driver.tokens.get((key, 0), [])
        assert tokens == expected[: len(tokens)]
        assert len(tokens) == 30 or key in cancelled
    driver.check_nothing_is_held()


def test_preemption_changes_no_token(
    busy_folder: Path,
    load_fused: Callable[..., Any],
    reference_of: Callable[..., Any],
    drive: Callable[..., Any],
) -> None:
    """Ten blocks for sequences that want five each in the end, and one to begin with."""
    driver = drive(load_fused(busy_folder, kv_cache_tokens=160), prefix_cache=False)
    texts = random_prompts(12, 8, seed=1)
    keys = [driver.add(prompt, max_new_tokens=64) for prompt in texts]
    driver.run()
    assert driver.num_preemptions >= 3
    expected = [reference_of(busy_folder).generate(prompt, 64) for prompt in texts]
    assert [driver.tokens[key, 0] for key in keys] == expected
    driver.check_nothing_is_held()


def test_prefix_hits_change_no_token(
    busy_folder: Path,
    load_fused: Callable[..., Any],
    reference_of: Callable[..., Any],
    drive: Callable[..., Any],
) -> None:
    driver = drive(load_fused(busy_folder))
    (shared,) = [torch.randint(0, 256, (50,), generator=torch.Generator().manual_seed(3)).tolist()]
    texts = [shared, [*shared, 7, 8], [*shared[:40], 1, 2, 3], shared[:33], shared]
    cached = []
    for prompt in texts:
        key = driver.add(prompt, max_new_tokens=12)
        driver.run()
        assert driver.tokens[key, 0] == reference_of(busy_folder).generate(prompt, 12)
        cached.append(driver.outputs[-1][1].summary.cached_prompt_tokens)
    assert cached == [0, 48, 32, 32, 48]
    driver.check_nothing_is_held()


def test_continuations_of_one_prompt_share_its_blocks_and_draw_what_each_draws_alone(
    busy_folder: Path, load_fused: Callable[..., Any], drive: Callable[..., Any]
) -> None:
    """Copy on write: the prompt ends inside a block that all four go on in."""
    loaded = load_fused(busy_folder)
    (prompt,) = random_prompts(1, 1)
    prompt = prompt * 21
    options: dict[str, Any] = {"n": 4, "temperature": 1.0, "seed": 11, "max_new_tokens": 30}
    shared = drive(loaded)
    key = shared.add(prompt, **options)
    peak = 0
    while shared.engine.has_work:
        shared.step()
        manager = shared.engine.scheduler.block_manager
        peak = max(peak, manager.num_blocks - manager.num_free_blocks)
    # 51 tokens are 4 blocks a sequence; the first is shared
    assert peak <= 1 + 4 * 3
    split = drive(loaded, prefix_cache=False, max_sequences=1)
    other = split.add(prompt, **options)
    split.run()
    together = [shared.tokens[key, index] for index in range(4)]
    assert together == [split.tokens[other, index] for index in range(4)]
    assert len({tuple(tokens) for tokens in together}) == 4
    shared.check_nothing_is_held()


def test_speculation_changes_no_token_and_is_accepted_where_text_repeats(
    busy_folder: Path,
    load_fused: Callable[..., Any],
    reference_of: Callable[..., Any],
    drive: Callable[..., Any],
) -> None:
    loaded = load_fused(busy_folder)
    (prompt,) = random_prompts(1, 1, seed=5)
    first = reference_of(busy_folder).generate(prompt, 30)
    # What the model says after the prompt stands in the prompt already, followed by the prompt.
    texts = [[*prompt, *first, *prompt], *random_prompts(3, 30, seed=6)]
    driver = drive(loaded)
    keys = [driver.add(p, max_new_tokens=30, prompt_lookup_tokens=6) for p in texts]
    driver.run()
    expected = [reference_of(busy_folder).generate(p, 30) for p in texts]
    assert [driver.tokens[key, 0] for key in keys] == expected
    speculation = [out.summary.speculation for _, out in driver.outputs if out.summary]
    assert sum(found.drafted_tokens for found in speculation) > 0
    driver.check_nothing_is_held()


def test_a_seeded_request_draws_the_same_tokens_alone_and_among_31_others(
    busy_folder: Path,
    computer: str,
    load_fused: Callable[..., Any],
    drive: Callable[..., Any],
) -> None:
    """And in chunks, and preempted. PyTorch's batched products promise it only when told to."""
    loaded = load_fused(busy_folder, deterministic=computer == "torch")
    prompt, *others = random_prompts(32, 50, seed=9)
    options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 40, "logprobs": 1}
    alone = drive(loaded)
    key = alone.add(prompt, seed=77, **options)
    alone.run()
    crowd = drive(loaded, max_prefill_tokens=5, prefix_cache=False)
    before = [crowd.add(p, seed=n, **options) for n, p in enumerate(others[:16])]
    crowd.run(steps=9)
    key_in_crowd = crowd.add(prompt, seed=77, **options)
    after = [crowd.add(p, seed=n, **options) for n, p in enumerate(others[16:])]
    while len(crowd.tokens.get((key_in_crowd, 0), [])) < 20:
        crowd.step()
    crowd.preempt(key_in_crowd)
    crowd.run()
    assert len(before) + len(after) == 31
    assert crowd.tokens[key_in_crowd, 0] == alone.tokens[key, 0]

    def logprobs(driver: Any, wanted: int) -> list[float]:
        return [
            entry.logprob
            for found, output in driver.outputs
            for entry in output.logprobs
            if found == wanted
        ]

    # To the bit, and not merely near enough to draw the same.
    assert logprobs(crowd, key_in_crowd) == logprobs(alone, key)
    crowd.check_nothing_is_held()


def test_echoed_prompt_has_the_logprobs_of_transformers_also_in_chunks(
    busy_folder: Path,
    load_fused: Callable[..., Any],
    reference_of: Callable[..., Any],
    drive: Callable[..., Any],
) -> None:
    driver = drive(load_fused(busy_folder), max_prefill_tokens=7)
    texts = [p for p in random_prompts(4, 40, seed=12) if len(p) > 1]
    keys = [driver.add(p, max_new_tokens=3, echo=True, logprobs=0) for p in texts]
    driver.run()
    for key, prompt in zip(keys, texts, strict=True):
        (echo,) = [out for found, out in driver.outputs if found == key and out.is_prompt]
        expected = reference_of(busy_folder).logprobs(prompt[:1], prompt[1:])
        found = torch.tensor([entry.logprob for entry in echo.logprobs[-len(expected) :]])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
