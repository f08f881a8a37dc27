"""A row's logits are the same, bit for bit, whatever stands beside it and whoever computes it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from gptjet.kernels.cpu import CpuModel

Pack = Callable[..., CpuModel]
KINDS = ("fp32", "int8", "int4")


def in_passes(plain: ModuleType, packed: CpuModel, ids: torch.Tensor, size: int) -> torch.Tensor:
    """Logits of every token, computed `size` tokens at a time."""
    sequences = plain.Sequences(packed.geometry, [ids])
    parts = []
    while (left := len(ids) - sequences.written[0]) > 0:
        batch = sequences.batch({0: min(size, left)})
        parts.append(packed.forward(batch, sequences.kv_cache))
    return torch.cat(parts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_one_pass_or_in_chunks_of_any_size(
    plain: ModuleType, pack: Pack, isa: str, name: str, kind: str
) -> None:
    model = plain.random_model(plain.GEOMETRIES[name], kind)
    packed = pack(model)
    ids = plain.random_ids(model.geometry, min(model.geometry.max_context, 96))
    whole = in_passes(plain, packed, ids, len(ids))
    for size in (1, 2, 3, 5, 7, 11, 16, 31):
        assert torch.equal(in_passes(plain, packed, ids, size), whole), size


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_longer_than_one_pass_of_the_library(
    plain: ModuleType, pack: Pack, isa: str, kind: str
) -> None:
    """The library itself cuts after 512 rows, a multiple neither of 12 nor of 100."""
    model = plain.random_model(plain.GEOMETRIES["long"], kind)
    packed = pack(model)
    ids = plain.random_ids(model.geometry, 700)
    whole = in_passes(plain, packed, ids, 700)
    for size in (100, 511, 513):
        assert torch.equal(in_passes(plain, packed, ids, size), whole), size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("company", [*range(2, 14), 31, 40])
def test_a_row_alone_or_in_a_batch(
    plain: ModuleType, pack: Pack, isa: str, kind: str, company: int
) -> None:
    """Sequences of different lengths, some with several rows in the pass."""
    model = plain.random_model(plain.GEOMETRIES["odd-inputs"], kind)
    packed = pack(model)
    prompts = [plain.random_ids(model.geometry, 4 + s % 30, seed=s) for s in range(company)]
    together = plain.Sequences(model.geometry, prompts)
    rows: list[list[torch.Tensor]] = [[] for _ in prompts]
    step = 0
    while any(done < len(ids) for done, ids in zip(together.written, prompts, strict=True)):
        counts = {
            s: min(1 + (s + step) % 3 * (s % 2), len(ids) - together.written[s])
            for s, ids in enumerate(prompts)
            if together.written[s] < len(ids)
        }
        logits = packed.forward(together.batch(counts), together.kv_cache)
        for s, part in zip(counts, logits.split(list(counts.values())), strict=True):
            rows[s].append(part)
        step += 1
    for s in range(min(company, 3)):
        alone = in_passes(plain, packed, prompts[s], 1)
        assert torch.equal(torch.cat(rows[s]), alone), s


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_threads(plain: ModuleType, pack: Pack, isa: str, kind: str) -> None:
    for name in ("embedded", "odd-inputs", "head256-one", "tiny-vocabulary"):
        model = plain.random_model(plain.GEOMETRIES[name], kind)
        ids = plain.random_ids(model.geometry, model.geometry.max_context)
        for size in (1, len(ids)):
            one, *others = (
                in_passes(plain, pack(model, num_threads=threads), ids, size)
                for threads in (1, 2, 3, 7)
            )
            assert all(torch.equal(logits, one) for logits in others), (name, size)


def test_generic_and_native_integers_agree(
    plain: ModuleType, pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ways of the same sums, exact within a group: only float rounding may differ."""
    model = plain.random_model(plain.GEOMETRIES["embedded"], "int8")
    ids = plain.random_ids(model.geometry, 20)
    logits = []
    for isa in ("native", "generic"):
        monkeypatch.setenv("GPTJET_CPU_ISA", isa)
        logits.append(in_passes(plain, pack(model), ids, 20))
    assert plain.relative_error(*logits) < 1e-4
