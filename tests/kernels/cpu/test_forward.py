"""The C forward against plain PyTorch, over geometries, weight formats and instruction sets."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from gptjet.kernels.cpu import CpuModel
from gptjet.kernels.weights import DenseWeight, HeadWeights, LayerWeights

Pack = Callable[..., CpuModel]

# Against float64 with the same (dequantised) weights. The integer kernels add the rounding of
# activations to 16 bits: about max / mean of a group (4) / 2^16 a product, and 2 layers of two
# products and the head amplify that a little. 8-bit activations would be at 1e-2.
BOUNDS = {"fp32": 2e-6, "int8": 3e-4, "int4": 3e-4}


@pytest.mark.parametrize("kind", list(BOUNDS))
def test_logits_of_a_full_context_equal_the_plain_model(
    plain: ModuleType, pack: Pack, isa: str, name: str, kind: str
) -> None:
    """Blocks are out of order, and what must not be read is NaN."""
    model = plain.random_model(plain.GEOMETRIES[name], kind)
    ids = plain.random_ids(model.geometry, model.geometry.max_context)
    sequences = plain.Sequences(model.geometry, [ids])
    logits = pack(model).forward(sequences.batch({0: len(ids)}), sequences.kv_cache)
    assert logits.dtype == torch.float32
    assert plain.relative_error(logits, plain.plain_logits(model, ids)) < BOUNDS[kind]


def test_a_prompt_of_one_token(plain: ModuleType, pack: Pack, isa: str, name: str) -> None:
    model = plain.random_model(plain.GEOMETRIES[name], "fp32")
    ids = plain.random_ids(model.geometry, 1)
    sequences = plain.Sequences(model.geometry, [ids])
    logits = pack(model).forward(sequences.batch({0: 1}), sequences.kv_cache)
    assert plain.relative_error(logits, plain.plain_logits(model, ids)) < BOUNDS["fp32"]


@pytest.mark.parametrize("kind", list(BOUNDS))
def test_decoding_to_the_end_of_the_context_equals_the_plain_model(
    plain: ModuleType, pack: Pack, isa: str, kind: str
) -> None:
    model = plain.random_model(plain.GEOMETRIES["head48"], kind)
    ids = plain.random_ids(model.geometry, model.geometry.max_context)
    sequences = plain.Sequences(model.geometry, [ids])
    packed = pack(model)
    steps = [packed.forward(sequences.batch({0: 1}), sequences.kv_cache) for _ in ids]
    truth = plain.plain_logits(model, ids)
    assert plain.relative_error(torch.cat(steps), truth) < BOUNDS[kind]


@pytest.mark.parametrize("group", [32, 50, 128, 300])
def test_int4_of_any_group(plain: ModuleType, pack: Pack, isa: str, group: int) -> None:
    model = plain.random_model(plain.GEOMETRIES["odd-inputs"], "int4", group=group)
    ids = plain.random_ids(model.geometry, 20)
    sequences = plain.Sequences(model.geometry, [ids])
    logits = pack(model).forward(sequences.batch({0: 20}), sequences.kv_cache)
    assert plain.relative_error(logits, plain.plain_logits(model, ids)) < BOUNDS["int4"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dense_weights_of_16_bits_are_taken_at_their_value(
    plain: ModuleType, pack: Pack, dtype: torch.dtype
) -> None:
    model = plain.random_model(plain.GEOMETRIES["head32"], "fp32")

    def narrow(weight: DenseWeight) -> DenseWeight:
        return DenseWeight(weight.weight.to(dtype), weight.bias)

    layers = [
        LayerWeights(x.norm_weight, x.norm_bias, narrow(x.w_in), narrow(x.w_out))
        for x in model.layers
    ]
    head = model.head
    head = HeadWeights(
        head.embedding.to(dtype), head.norm_weight, head.norm_bias, narrow(head.lm_head)
    )
    model = plain.PlainModel(model.geometry, head, layers)
    ids = plain.random_ids(model.geometry, 20)
    sequences = plain.Sequences(model.geometry, [ids])
    logits = pack(model).forward(sequences.batch({0: 20}), sequences.kv_cache)
    assert plain.relative_error(logits, plain.plain_logits(model, ids)) < BOUNDS["fp32"]


def test_weights_without_a_bias(plain: ModuleType, pack: Pack) -> None:
    model = plain.random_model(plain.GEOMETRIES["head32"], "fp32")
    layers = [
        LayerWeights(
            x.norm_weight, x.norm_bias, DenseWeight(x.w_in.weight), DenseWeight(x.w_out.weight)
        )
        for x in model.layers
    ]
    model = plain.PlainModel(model.geometry, model.head, layers)
    ids = plain.random_ids(model.geometry, 20)
    sequences = plain.Sequences(model.geometry, [ids])
    logits = pack(model).forward(sequences.batch({0: 20}), sequences.kv_cache)
    assert plain.relative_error(logits, plain.plain_logits(model, ids)) < BOUNDS["fp32"]


def test_an_outlier_among_the_activations_costs_the_others_nothing(
    plain: ModuleType, pack: Pack, isa: str
) -> None:
    """GPT-J's LayerNorm has such features; with 8-bit activations they drown their group."""
    model = plain.random_model(plain.GEOMETRIES["head128"], "int8")
    for layer in model.layers:
        layer.norm_weight[5] = 60.0
        layer.w_in.quantized[:, 5] = 0
    ids = plain.random_ids(model.geometry, 30)
    sequences = plain.Sequences(model.geometry, [ids])
    logits = pack(model).forward(sequences.batch({0: 30}), sequences.kv_cache)
    assert plain.relative_error(logits, plain.plain_logits(model, ids)) < 3e-3


@pytest.mark.parametrize("kind", list(BOUNDS))
def test_a_value_that_is_not_a_number_is_seen_in_the_logits(
    plain: ModuleType, pack: Pack, isa: str, kind: str
) -> None:
    """A quantiser could turn it into an ordinary number."""
    model = plain.random_model(plain.GEOMETRIES["head32"], kind)
    model.head.embedding[3, 0] = torch.nan
    ids = torch.tensor([1, 3])
    sequences = plain.Sequences(model.geometry, [ids])
    logits = pack(model).forward(sequences.batch({0: 2}), sequences.kv_cache)
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()


def test_the_cache_holds_keys_and_values_where_the_block_table_says(
    plain: ModuleType, pack: Pack
) -> None:
    model = plain.random_model(plain.GEOMETRIES["head32"], "fp32")
    ids = plain.random_ids(model.geometry, 21)
    sequences = plain.Sequences(model.geometry, [ids])
    pack(model).forward(sequences.batch({0: 21}), sequences.kv_cache)
    written = ~sequences.kv_cache.isnan()
    expected = torch.zeros_like(written)
    for position in range(21):
        block = int(sequences.tables[0, position // 16])
        expected[:, :, block, :, position % 16] = True
    assert torch.equal(written, expected)


def test_only_the_rows_asked_for_have_logits_in_the_order_asked(
    plain: ModuleType, pack: Pack
) -> None:
    model = plain.random_model(plain.GEOMETRIES["head32"], "fp32")
    ids = plain.random_ids(model.geometry, 30)
    packed = pack(model)
    sequences = plain.Sequences(model.geometry, [ids])
    every = packed.forward(sequences.batch({0: 30}), sequences.kv_cache)
    for rows in ([], [29], [7, 3, 11, 0, 28, 15]):
        sequences = plain.Sequences(model.geometry, [ids])
        batch = sequences.batch({0: 30})
        wanted = type(batch)(
            batch.token_ids,
            batch.positions,
            batch.sequence_index,
            batch.block_tables,
            torch.tensor(rows, dtype=torch.int32),
        )
        logits = packed.forward(wanted, sequences.kv_cache)
        assert torch.equal(logits, every[rows])


def test_logits_are_the_callers_own(plain: ModuleType, pack: Pack) -> None:
    model = plain.random_model(plain.GEOMETRIES["tiny-vocabulary"], "fp32")
    packed = pack(model)
    sequences = plain.Sequences(model.geometry, [plain.random_ids(model.geometry, 2)])
    first = packed.forward(sequences.batch({0: 1}), sequences.kv_cache)
    kept = first.clone()
    packed.forward(sequences.batch({0: 1}), sequences.kv_cache)
    assert torch.equal(first, kept)
