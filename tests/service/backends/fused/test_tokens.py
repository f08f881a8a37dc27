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
# Interpreted, the GPU kernels take tenths of a second a pass: less of everything, of the same.
SMALL = {
    "head-64-one-layer": {"n_head": 1, "n_layer": 1, "rotary_dim": 16, "n_positions": 18},
    "head-96-full": {"head_dim": 96, "n_head": 1, "n_layer": 1, "rotary_dim": 96, "n_positions": 8},
    "head-256": {"head_dim": 256, "n_head": 1, "n_layer": 1, "rotary_dim": 64, "n_positions": 9},
}
BUSY_SMALL = {"n_head": 1, "n_layer": 1, "n_positions": 96}
EVERYWHERE = [
    *((computer, family) for computer in ("kernels", "torch") for family in ("gptj", "codegen")),
    ("interpreted", "gptj"),
]


@pytest.fixture
def busy_folder(
    computer: str,
    family: str,
    make_gptj_checkpoint: Callable[..., Path],
    make_codegen_checkpoint: Callable[..., Path],
) -> Path:
    """A checkpoint for traffic, of each family."""
    if family == "codegen":
        return make_codegen_checkpoint(n_positions=96)
    return make_gptj_checkpoint(**(BUSY_SMALL if computer == "interpreted" else BUSY))


@pytest.fixture
def pick(computer: str) -> Callable[[int, int], int]:
    """`pick(usual, small)`: the second where every pass is slow."""
    return lambda usual, small: small if computer == "interpreted" else usual


on_every_computer = pytest.mark.parametrize(
    ("computer", "family"), EVERYWHERE, indirect=["computer"]
)


def random_prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize(
    ("computer", "geometry"),
    [
        *((computer, geometry) for computer in ("kernels", "torch") for geometry in GEOMETRIES),
        *(("interpreted", geometry) for geometry in SMALL),
    ],
    indirect=["computer"],
)
def test_tokens_equal_to_the_end_of_the_context_alone_and_together(
    geometry: str,
    make_gptj_checkpoint: Callable[..., Path],
    load_fused: Callable[..., Any],
    check_greedy: Callable[..., None],
    drive: Callable[..., Any],
    prompts: Callable[..., list[list[int]]],
) -> None:
    sizes = (GEOMETRIES | SMALL)[geometry]
    folder = make_gptj_checkpoint(**sizes)
    context = sizes["n_positions"]
    texts = prompts(context)
    loaded = load_fused(folder)
    assert loaded.backend.spec.max_context == context
    alone = drive(loaded)
    for prompt in texts:
        key = alone.add(prompt, max_new_tokens=context - len(prompt))
        alone.run()
        assert len(alone.tokens[key, 0]) == context - len(prompt)
        check_greedy(folder, prompt, alone.tokens[key, 0])
    together = drive(loaded, prefix_cache=False)
    keys = [together.add(prompt, max_new_tokens=context - len(prompt)) for prompt in texts]
    together.run()
    for key, prompt in zip(keys, texts, strict=True):
        assert len(together.tokens[key, 0]) == context - len(prompt)
        check_greedy(folder, prompt, together.tokens[key, 0])
    alone.check_nothing_is_held()
    together.check_nothing_is_held()


@pytest.mark.usefixtures("computer")
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


@on_every_computer
def test_staggered_arrivals_and_cancellations_change_no_token(
    busy_folder: Path,
    load_fused: Callable[..., Any],
    check_greedy: Callable[..., None],
    drive: Callable[..., Any],
    pick: Callable[[int, int], int],
) -> None:
    driver = drive(load_fused(busy_folder), max_prefill_tokens=16)
    texts, length = random_prompts(pick(14, 6), pick(60, 20)), pick(30, 8)
    keys = []
    for number, prompt in enumerate(texts):
        keys.append(driver.add(prompt, max_new_tokens=length))
        driver.run(steps=1 + number % 3)
        if number % 4 == 3:
            driver.engine.cancel(keys[number - 2])
            driver.engine.scheduler.block_manager.check_invariants()
    driver.run()
    cancelled = {keys[number - 2] for number in range(3, len(texts), 4)}
    for key, prompt in zip(keys, texts, strict=True):
        tokens = driver.tokens.get((key, 0), [])
        check_greedy(busy_folder, prompt, tokens)
        assert len(tokens) == length or key in cancelled
    driver.check_nothing_is_held()


@on_every_computer
def test_preemption_changes_no_token(
    busy_folder: Path,
    load_fused: Callable[..., Any],
    check_greedy: Callable[..., None],
    drive: Callable[..., Any],
    pick: Callable[[int, int], int],
) -> None:
    """Ten blocks for sequences that want five each in the end, and one to begin with.

    Or three blocks for two that want two each.
    """
    tokens = pick(160, 48)
    driver = drive(load_fused(busy_folder, kv_cache_tokens=tokens), prefix_cache=False)
    texts, length = random_prompts(pick(12, 3), 8, seed=1), pick(64, 18)
    keys = [driver.add(prompt, max_new_tokens=length) for prompt in texts]
    driver.run()
    assert driver.num_preemptions >= pick(3, 1)
    for key, prompt in zip(keys, texts, strict=True):
        assert len(driver.tokens[key, 0]) == length
        check_greedy(busy_folder, prompt, driver.tokens[key, 0])
    driver.check_nothing_is_held()


@on_every_computer
def test_prefix_hits_change_no_token(
    busy_folder: Path,
    load_fused: Callable[..., Any],
    check_greedy: Callable[..., None],
    drive: Callable[..., Any],
    pick: Callable[[int, int], int],
) -> None:
    driver, length = drive(load_fused(busy_folder)), pick(12, 2)
    (shared,) = [torch.randint(0, 256, (50,), generator=torch.Generator().manual_seed(3)).tolist()]
    texts = [shared, [*shared, 7, 8], [*shared[:40], 1, 2, 3], shared[:33], shared]
    cached = []
    for prompt in texts:
        key = driver.add(prompt, max_new_tokens=length)
        driver.run()
        assert len(driver.tokens[key, 0]) == length
        check_greedy(busy_folder, prompt, driver.tokens[key, 0])
        cached.append(driver.outputs[-1][1].summary.cached_prompt_tokens)
    assert cached == [0, 48, 32, 32, 48]
    driver.check_nothing_is_held()


@on_every_computer
def test_continuations_of_one_prompt_share_its_blocks_and_draw_what_each_draws_alone(
    busy_folder: Path,
    computer: str,
    load_fused: Callable[..., Any],
    drive: Callable[..., Any],
    pick: Callable[[int, int], int],
) -> None:
    """Copy on write: the prompt ends inside a block that all four go on in."""
    # In float16 a row of a batch may differ in its last bit from the same row alone.
    loaded = load_fused(busy_folder, deterministic=computer == "interpreted")
    (prompt,) = random_prompts(1, 1)
    prompt = prompt * pick(21, 3)
    options: dict[str, Any] = {"n": 4, "temperature": 1.0, "seed": 11}
    options["max_new_tokens"] = pick(30, 5)
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


@on_every_computer
def test_speculation_changes_no_token_and_is_accepted_where_text_repeats(
    busy_folder: Path,
    load_fused: Callable[..., Any],
    reference_of: Callable[..., Any],
    check_greedy: Callable[..., None],
    drive: Callable[..., Any],
    pick: Callable[[int, int], int],
) -> None:
    loaded, length = load_fused(busy_folder), pick(30, 10)
    (prompt,) = random_prompts(1, 1, seed=5)
    first = reference_of(busy_folder).generate(prompt, length)
    # What the model says after the prompt stands in the prompt already, followed by the prompt.
    texts = [[*prompt, *first, *prompt], *random_prompts(pick(3, 1), length, seed=6)]
    driver = drive(loaded)
    keys = [driver.add(p, max_new_tokens=length, prompt_lookup_tokens=6) for p in texts]
    driver.run()
    for key, text in zip(keys, texts, strict=True):
        assert len(driver.tokens[key, 0]) == length
        check_greedy(busy_folder, text, driver.tokens[key, 0])
    speculation = [out.summary.speculation for _, out in driver.outputs if out.summary]
    assert sum(found.drafted_tokens for found in speculation) > 0
    driver.check_nothing_is_held()


@on_every_computer
def test_a_seeded_request_draws_the_same_tokens_alone_and_among_31_others(
    busy_folder: Path,
    computer: str,
    load_fused: Callable[..., Any],
    drive: Callable[..., Any],
    pick: Callable[[int, int], int],
) -> None:
    """And in chunks, and preempted. PyTorch's batched products promise it only when told to.

    (Interpreted: among three others.)
    """
    loaded = load_fused(busy_folder, deterministic=computer != "kernels")
    prompt, *others = random_prompts(pick(32, 4), pick(50, 8), seed=9)
    length, half = pick(40, 4), pick(16, 2)
    options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": length, "logprobs": 1}
    alone = drive(loaded)
    key = alone.add(prompt, seed=77, **options)
    alone.run()
    crowd = drive(loaded, max_prefill_tokens=5, prefix_cache=False)
    before = [crowd.add(p, seed=n, **options) for n, p in enumerate(others[:half])]
    crowd.run(steps=pick(9, 2))
    key_in_crowd = crowd.add(prompt, seed=77, **options)
    after = [crowd.add(p, seed=n, **options) for n, p in enumerate(others[half:])]
    while len(crowd.tokens.get((key_in_crowd, 0), [])) < length // 2:
        crowd.step()
    crowd.preempt(key_in_crowd)
    crowd.run()
    assert len(before) + len(after) == pick(31, 3)
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


@on_every_computer
def test_echoed_prompt_has_the_logprobs_of_transformers_also_in_chunks(
    busy_folder: Path,
    load_fused: Callable[..., Any],
    reference_of: Callable[..., Any],
    drive: Callable[..., Any],
    pick: Callable[[int, int], int],
    computer: str,
) -> None:
    driver = drive(load_fused(busy_folder), max_prefill_tokens=7)
    texts = [p for p in random_prompts(pick(4, 2), pick(40, 20), seed=12) if len(p) > 1]
    keys = [driver.add(p, max_new_tokens=3, echo=True, logprobs=0) for p in texts]
    driver.run()
    for key, prompt in zip(keys, texts, strict=True):
        (echo,) = [out for found, out in driver.outputs if found == key and out.is_prompt]
        expected = reference_of(busy_folder).logprobs(prompt[:1], prompt[1:])
        found = torch.tensor([entry.logprob for entry in echo.logprobs[-len(expected) :]])
        limit = 0.1 if computer == "interpreted" else 1e-4  # float16; of numbers about 10
        torch.testing.assert_close(found, expected, atol=limit, rtol=0)
