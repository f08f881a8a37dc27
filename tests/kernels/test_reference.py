"""The reference functions against the mathematics, written out."""

from __future__ import annotations

import math

import pytest
import torch

from gptjet.kernels import reference
from gptjet.kernels.batch import INT8_KV_ROWS
from gptjet.kernels.weights import (
    DenseWeight,
    Int4Weight,
    Weight,
    dequantize,
    quantize_int4,
    quantize_int8,
)

GENERATOR = torch.Generator().manual_seed(7)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def in_every_format(values: torch.Tensor, bias: torch.Tensor | None) -> list[Weight]:
    return [
        DenseWeight(values, bias),
        DenseWeight(values.half(), bias),
        DenseWeight(values.bfloat16(), bias),
        quantize_int8(values, bias),
        quantize_int4(values, bias),
        quantize_int4(values, bias, group=32),
    ]


@pytest.mark.parametrize("inputs", [128, 256, 96, 131])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_multiplies_by_the_values_a_weight_stands_for(inputs: int, has_bias: bool) -> None:
    x = random(5, inputs)
    bias = random(70) if has_bias else None
    for weight in in_every_format(random(70, inputs), bias):
        expected = x.double() @ dequantize(weight).double().T + (bias if bias is not None else 0.0)
        got = reference.linear(x, weight)
        assert got.dtype == torch.float32
        assert torch.allclose(got.double(), expected, atol=2e-4), type(weight)


def test_linear_in_slices_equals_linear_at_once_and_reuses_its_buffer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, scratch = random(3, 256), reference.Scratch()
    for weight in in_every_format(random(50, 256), random(50)):
        at_once = reference.linear(x, weight)
        with monkeypatch.context() as patch:
            patch.setattr(reference, "_SCRATCH_ELEMENTS", 256 * 7)
            assert torch.allclose(reference.linear(x, weight, scratch), at_once, atol=1e-5)
    assert scratch.nbytes == 256 * 7 * 4
    scratch.release()
    assert scratch.nbytes == 0


def test_linear_computes_in_the_dtype_of_its_input() -> None:
    weight = quantize_int8(random(16, 64), random(16))
    got = reference.linear(random(2, 64).bfloat16(), weight)
    assert got.dtype == torch.bfloat16


def test_layer_norm_linear_normalises_every_row() -> None:
    x, scale, shift = random(4, 64) * 3 + 1, random(64), random(64)
    weight = DenseWeight(random(10, 64), random(10))
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    normed = (x - mean) / (variance + 1e-3).sqrt() * scale + shift
    got = reference.layer_norm_linear(x, scale, shift, 1e-3, weight)
    assert weight.bias is not None
    assert torch.allclose(got, normed @ weight.weight.T + weight.bias, atol=1e-4)


@pytest.mark.parametrize("rotary_dim", [0, 2, 8, 16])
def test_rotary_turns_each_pair_by_its_angle_and_leaves_the_rest(rotary_dim: int) -> None:
    x, positions = random(6, 2, 16), torch.tensor([0, 1, 5, 9, 30, 63])
    cos, sin = reference.rotary_tables(64, rotary_dim)
    got = reference.rotary(x, cos[positions], sin[positions])
    for token, position in enumerate(positions.tolist()):
        for pair in range(rotary_dim // 2):
            angle = position * 10000 ** (-2 * pair / rotary_dim)
            turn = complex(math.cos(angle), math.sin(angle))
            for head in range(2):
                before = complex(*x[token, head, 2 * pair : 2 * pair + 2].tolist())
                after = complex(*got[token, head, 2 * pair : 2 * pair + 2].tolist())
                assert abs(before * turn - after) < 1e-4
    assert torch.equal(got[..., rotary_dim:], x[..., rotary_dim:])


def test_write_kv_fills_the_tokens_slots_and_no_others() -> None:
    cache = torch.full((2, 6, 2, 16, 4), math.nan)
    positions = torch.tensor([14, 15, 16, 0], dtype=torch.int32)
    rows = torch.tensor([0, 0, 0, 1], dtype=torch.int32)
    tables = torch.tensor([[3, 1], [5, 999]], dtype=torch.int32)
    slots = reference.slot_mapping(positions, rows, tables)
    assert slots.tolist() == [3 * 16 + 14, 3 * 16 + 15, 16, 5 * 16]
    keys, values = random(4, 2, 4), random(4, 2, 4)
    reference.write_kv(cache, keys, values, slots)
    for token, slot in enumerate(slots.tolist()):
        assert torch.equal(cache[0, slot // 16, :, slot % 16], keys[token])
        assert torch.equal(cache[1, slot // 16, :, slot % 16], values[token])
    assert int(torch.isfinite(cache).sum()) == 2 * 4 * 2 * 4


def test_paged_attention_equals_softmax_over_each_tokens_own_past() -> None:
    """Three sequences: a prompt, one decode token across three blocks, and a chunk with drafts."""
    heads, width = 2, 8
    spans = [(0, 20), (40, 41), (15, 18)]  # positions [first, last) computed of each
    tables = torch.tensor([[4, 2, 0], [7, 9, 1], [3, 8, 0]], dtype=torch.int32)
    cache = torch.full((2, 10, heads, 16, width), math.nan)
    keys = [random(stop, heads, width) for _, stop in spans]
    values = [random(stop, heads, width) for _, stop in spans]
    for row, (_, stop) in enumerate(spans):
        everything = torch.arange(stop)
        slots = reference.slot_mapping(everything, torch.full((stop,), row), tables)
        reference.write_kv(cache, keys[row], values[row], slots)
    positions = torch.cat([torch.arange(*span) for span in spans]).int()
    rows = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(spans)]).int()
    queries = random(len(positions), heads, width)

    got = reference.paged_attention(queries, cache, positions, rows, tables)

    for token, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        for head in range(heads):
            past = keys[row][: position + 1, head] @ queries[token, head] / math.sqrt(width)
            expected = torch.softmax(past, 0) @ values[row][: position + 1, head]
            assert torch.allclose(
                got[token, head * width : (head + 1) * width], expected, atol=1e-5
            )


def test_half_precision_cache_is_read_in_the_queries_dtype() -> None:
    cache = torch.zeros(2, 1, 1, 16, 8, dtype=torch.float16)
    position = torch.tensor([0], dtype=torch.int32)
    value = random(1, 1, 8)
    reference.write_kv(cache, random(1, 1, 8), value, torch.tensor([0]))
    got = reference.paged_attention(random(1, 1, 8), cache, position, position, position[None])
    assert got.dtype == torch.float32
    assert torch.equal(got, value.half().float().view(1, 8))


def test_gelu_is_the_tanh_approximation_of_gpt2() -> None:
    x = torch.linspace(-6, 6, 101)
    inside = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    assert torch.allclose(reference.gelu(x), 0.5 * x * (1 + torch.tanh(inside)), atol=1e-6)


def test_second_pass_adds_to_the_residual_in_place() -> None:
    residual, attended, inner = random(3, 8), random(3, 8), random(3, 20)
    weight = DenseWeight(random(8, 28), random(8))
    assert weight.bias is not None
    joined = torch.cat((attended, reference.gelu(inner)), 1)
    expected = residual + joined @ weight.weight.T + weight.bias
    reference.gelu_linear_residual(residual, attended, inner, weight)
    assert torch.allclose(residual, expected, atol=1e-5)


def test_int4_group_of_a_short_row_is_read_with_its_own_scale() -> None:
    values = torch.cat((torch.full((1, 128), 7.0), torch.full((1, 3), 0.07)), dim=1)
    weight = quantize_int4(values)
    assert isinstance(weight, Int4Weight)
    got = reference.linear(torch.eye(131), weight)
    assert torch.allclose(got.T, values, rtol=1e-3)


def test_int8_kv_is_within_half_a_level_of_what_was_written() -> None:
    x = random(3, 2, 64) * torch.tensor([1e-3, 1.0, 1e4])[:, None, None]
    levels, scales = reference.quantize_kv(x)
    assert levels.dtype == torch.int8
    assert scales.shape == (3, 2)
    assert torch.equal(levels.abs().amax(-1), torch.full((3, 2), 127, dtype=torch.int8))
    error = (levels.float() * scales[..., None] - x).abs()
    assert bool((error <= 0.5001 * scales[..., None]).all())


def test_int8_kv_of_zeros_is_zero_and_of_nan_or_infinity_is_nan() -> None:
    x = torch.zeros(3, 1, 64)
    x[1, 0, 5], x[2, 0, 5] = math.nan, math.inf
    levels, scales = reference.quantize_kv(x)
    values = levels.float() * scales[..., None]
    assert torch.equal(values[0], x[0])
    assert values[1:].isnan().all()


def test_int8_cache_holds_levels_and_scales_of_the_tokens_slots_and_no_others() -> None:
    cache = torch.zeros(2, 3, 2, INT8_KV_ROWS, 64, dtype=torch.int8)
    keys, values = random(2, 2, 64), random(2, 2, 64)
    slots = torch.tensor([2 * 16 + 15, 3])
    reference.write_kv(cache, keys, values, slots)
    scales = reference.int8_kv_scales(cache)
    assert scales.shape == (2, 3, 2, 16)
    for token, slot in enumerate(slots.tolist()):
        for held, given in ((0, keys), (1, values)):
            levels, scale = reference.quantize_kv(given[token : token + 1])
            assert torch.equal(cache[held, slot // 16, :, slot % 16], levels[0])
            assert torch.equal(scales[held, slot // 16, :, slot % 16], scale[0])
    assert int(scales.count_nonzero()) == 2 * 2 * 2
    assert int(cache[..., :16, :].any(-1).count_nonzero()) == 2 * 2 * 2


def test_attention_reads_an_int8_cache_as_the_values_it_stands_for() -> None:
    int8 = torch.zeros(2, 3, 2, INT8_KV_ROWS, 64, dtype=torch.int8)
    floats = torch.zeros(2, 3, 2, 16, 64)
    tables = torch.tensor([[2, 0]], dtype=torch.int32)
    positions, rows = torch.arange(20).int(), torch.zeros(20, dtype=torch.int32)
    slots = reference.slot_mapping(positions, rows, tables)
    reference.write_kv(int8, random(20, 2, 64), random(20, 2, 64), slots)
    floats[:] = int8[..., :16, :].float() * reference.int8_kv_scales(int8)[..., None]
    queries = random(20, 2, 64)
    expected = reference.paged_attention(queries, floats, positions, rows, tables)
    got = reference.paged_attention(queries, int8, positions, rows, tables)
    assert torch.allclose(got, expected, atol=1e-6)
