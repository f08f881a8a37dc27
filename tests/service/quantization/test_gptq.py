"""Rounding against activations: less error than rounding to nearest, in the same format."""

from __future__ import annotations

import math

import pytest
import torch

from gptjet.kernels.weights import Int4Weight, dequantize, quantize_int4, unpack_int4
from gptjet.service.quantization import gptq
from gptjet.service.quantization.gptq import Hessian, choose_scales, gptq_int4


def correlated(tokens: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Activations as a model has them: few directions carry most, some inputs are much larger."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(inputs // 8, inputs, generator=generator)
    strength = torch.linspace(3, 0.1, inputs // 8)[:, None]
    x = torch.randn(tokens, inputs // 8, generator=generator) @ (strength * basis)
    x += 0.3 * torch.randn(tokens, inputs, generator=generator)
    x[:, ::17] *= 5
    return x


def weights(outputs: int, inputs: int) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))


def hessian_of(x: torch.Tensor) -> Hessian:
    hessian = Hessian(x.shape[1])
    hessian.add(x[: len(x) // 3])
    hessian.add(x[len(x) // 3 :])
    return hessian


def output_error(weight: Int4Weight, exact: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (dequantize(weight) - exact).T).square().mean().sqrt())


def test_hessian_is_the_sum_of_outer_products_over_all_pieces() -> None:
    x = correlated(90, 64)
    hessian = hessian_of(x)
    assert torch.allclose(hessian.blocks[0], x.T @ x, rtol=1e-4)
    assert torch.allclose(hessian.diagonal(), x.square().sum(0), rtol=1e-4)
    assert hessian.tokens == 90


@pytest.mark.parametrize("inputs", [64, 256, 320])
def test_outputs_err_far_less_than_with_rounding_to_nearest(inputs: int) -> None:
    """On activations that were not calibrated on, so it is not learnt by heart."""
    seen, unseen = correlated(3000, inputs).split(2000)
    exact = weights(48, inputs)
    rounded = gptq_int4(exact, hessian_of(seen))
    nearest = output_error(quantize_int4(exact), exact, unseen)
    assert output_error(rounded, exact, unseen) < 0.6 * nearest


def test_hessian_in_blocks_still_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    x, exact = correlated(2000, 320), weights(32, 320)
    whole = output_error(gptq_int4(exact, hessian_of(x)), exact, x)
    monkeypatch.setattr(gptq, "MAX_HESSIAN_WIDTH", 128)
    hessian = hessian_of(x)
    assert [len(block) for block in hessian.blocks] == [128, 128, 64]
    in_blocks = output_error(gptq_int4(exact, hessian), exact, x)
    nearest = output_error(quantize_int4(exact), exact, x)
    assert whole < in_blocks < nearest


def test_columns_in_pieces_are_rounded_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, exact = correlated(800, 96), weights(8, 96)
    at_once = gptq_int4(exact, hessian_of(x))
    monkeypatch.setattr(gptq, "_COLUMNS_AT_ONCE", 7)
    pieces = gptq_int4(exact, hessian_of(x))
    levels = [unpack_int4(weight.packed, 96) for weight in (at_once, pieces)]
    # the sums are ordered otherwise, and a value in the middle of two levels may go either way
    assert (levels[0] == levels[1]).float().mean() > 0.98


def test_uncorrelated_inputs_are_rounded_to_the_nearest_level() -> None:
    exact = weights(16, 128)
    hessian = Hessian(128)
    hessian.add(torch.eye(128))
    rounded = gptq_int4(exact, hessian)
    scale = rounded.scale.float().repeat_interleave(128, 1)
    expected = (exact / scale).round().clamp(-8, 7)
    assert torch.equal(unpack_int4(rounded.packed, 128).float(), expected)


@pytest.mark.parametrize("inputs", [131, 40])
def test_short_groups_and_odd_widths_keep_the_format(inputs: int) -> None:
    exact, bias = weights(6, inputs), torch.arange(6.0)
    rounded = gptq_int4(exact, hessian_of(correlated(500, inputs)), bias)
    assert rounded.shape == (6, inputs)
    assert rounded.packed.shape == (6, math.ceil(inputs / 2))
    assert rounded.scale.shape == (6, math.ceil(inputs / 128))
    assert rounded.scale.dtype == torch.float16
    assert rounded.bias is bias
    assert (dequantize(rounded) - exact).abs().max() < 1.5


def test_inputs_that_were_never_active_keep_their_values() -> None:
    x, exact = correlated(500, 128), weights(6, 128)
    x[:, 5:20] = 0
    rounded = dequantize(gptq_int4(exact, hessian_of(x)))
    step = exact.abs().amax(1, keepdim=True) / 7
    assert ((rounded - exact)[:, 5:20].abs() <= 0.55 * step).float().mean() > 0.9
    assert torch.isfinite(rounded).all()


def test_a_single_token_is_a_singular_hessian_and_works() -> None:
    exact = weights(6, 128)
    rounded = gptq_int4(exact, hessian_of(correlated(3, 128)[:1]))
    assert (dequantize(rounded) - exact).abs().max() < 1.5


def test_activations_that_are_not_finite_are_refused() -> None:
    x = correlated(10, 64)
    x[3, 3] = math.inf
    with pytest.raises(ValueError, match="not finite"):
        gptq_int4(weights(4, 64), hessian_of(x))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scale_gives_the_eighth_level_to_the_sign_that_needs_it(sign: float) -> None:
    """Sixteen levels from -8 to 7 hold these values exactly, whichever way round."""
    values = sign * 0.25 * torch.arange(-8.0, 8.0).repeat(8)[None]
    scale = choose_scales(values, torch.ones(128))
    assert scale.tolist() == [[sign * 0.25]]
    hessian = Hessian(128)
    hessian.add(torch.eye(128))
    assert torch.equal(dequantize(gptq_int4(values, hessian)), values)


def test_scales_of_zeros_are_finite() -> None:
    rounded = gptq_int4(torch.zeros(3, 128), hessian_of(correlated(50, 128)))
    assert torch.equal(dequantize(rounded), torch.zeros(3, 128))
