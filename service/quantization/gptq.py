"""Rounding weights to INT4 against what the model really multiplies them with.

GPTQ (Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers"): for inputs x of a matrix, the error of its outputs is (w - q) H (w - q)^T with
H = sum of x x^T. Columns are rounded one after the other, the heaviest first, and what each loses
is made up for by those that are not rounded yet, through the Cholesky factor of H's inverse.

The scales are chosen before, a group at a time, so that a group's columns need not be rounded
together ("static groups"): the one of a few candidates whose rounding error, weighted by H's
diagonal, is smallest. A scale may be negative, which gives the eighth negative level to whichever
sign the largest weight has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gptjet.kernels.weights import INT4_GROUP, Int4Weight, pack_int4

# Inputs whose correlations are kept together; across such blocks they are taken for uncorrelated,
# which bounds the memory (64 MiB) and the time of a matrix as wide as GPT-J's second pass.
MAX_HESSIAN_WIDTH = 4096
# Share of the mean diagonal that is added to it (the paper's 1 %), and more where that is singular.
_DAMPING = (0.01, 0.1, 1.0)
_COLUMNS_AT_ONCE = 128
# Scales tried, as shares of the one that just holds the largest weight.
_SHARES = tuple(1.0 - 0.03 * step for step in range(10))


class Hessian:
    """H of a matrix with K inputs, in blocks along its diagonal, summed over calibration tokens."""

    def __init__(self, inputs: int) -> None:
        self.blocks = [
            torch.zeros(width, width)
            for start in range(0, inputs, MAX_HESSIAN_WIDTH)
            for width in [min(MAX_HESSIAN_WIDTH, inputs - start)]
        ]
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Take the activations x [T, K] float32 into account."""
        start = 0
        for block in self.blocks:
            part = x[:, start : start + len(block)]
            block.addmm_(part.T, part)
            start += len(block)
        self.tokens += len(x)

    def diagonal(self) -> torch.Tensor:
        """[K]"""
        return torch.cat([block.diagonal() for block in self.blocks])


def gptq_int4(
    weight: torch.Tensor,
    hessian: Hessian,
    bias: torch.Tensor | None = None,
    group: int = INT4_GROUP,
) -> Int4Weight:
    """Round weight [N, K] float32 to INT4, given the activations it will meet.

    Raises ValueError where the Hessian is not finite.
    """
    outputs, inputs = weight.shape
    diagonal = hessian.diagonal()
    if not torch.isfinite(diagonal).all():
        raise ValueError("the calibration activations are not finite")
    scale = choose_scales(weight, diagonal, group)
    levels = torch.empty(outputs, inputs, dtype=torch.int8)
    column_scale = scale.float().repeat_interleave(group, dim=1)[:, :inputs]
    start = 0
    for block in hessian.blocks:
        stop = start + len(block)
        levels[:, start:stop] = _round_columns(
            weight[:, start:stop], column_scale[:, start:stop], block
        )
        start = stop
    return Int4Weight(pack_int4(levels), scale, inputs, group, bias)


def choose_scales(
    weight: torch.Tensor, importance: torch.Tensor, group: int = INT4_GROUP
) -> torch.Tensor:
    """Scales [N, ceil(K / group)] float16 with the least squared error, weighted by importance [K].

    Inputs that never were active count a little, for they may be one day.
    """
    outputs, inputs = weight.shape
    floor = 1e-3 * importance.mean() + torch.finfo(torch.float32).tiny
    padding = (0, -inputs % group)
    groups = F.pad(weight, padding).view(outputs, -1, group)
    cost = F.pad(importance + floor, padding).view(1, -1, group)
    # What the level -8 has to hold: the largest magnitude, whatever its sign.
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
    smallest = torch.finfo(torch.float16).tiny
    best = torch.full_like(extreme, smallest, dtype=torch.float16)
    least = torch.full_like(extreme, torch.inf)
    for full_scale in (extreme / -8, extreme.abs() / 7):
        for share in _SHARES:
            scale = full_scale * share
            scale = torch.where(scale.abs() < smallest, smallest, scale).half()
            step = scale.float().unsqueeze(2)
            error = (groups / step).round_().clamp_(-8, 7).mul_(step).sub_(groups).square_()
            total = error.mul_(cost).sum(2)
            is_better = total < least
            best = torch.where(is_better, scale, best)
            least = torch.where(is_better, total, least)
    return best


def _round_columns(
    weight: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    """Levels [N, K] int8 of weight [N, K] with the scale of each entry; hessian [K, K]."""
    order = hessian.diagonal().argsort(descending=True)
    factor = _inverse_factor(hessian[order][:, order])
    remaining = weight[:, order].clone()
    scale = scale[:, order]
    levels = torch.empty_like(remaining)
    width = remaining.shape[1]
    for start in range(0, width, _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, width)
        errors = torch.empty(len(remaining), stop - start)
        for column in range(start, stop):
            value, step = remaining[:, column], scale[:, column]
            level = (value / step).round_().clamp_(-8, 7)
            levels[:, column] = level
            error = (value - level * step) / factor[column, column]
            errors[:, column - start] = error
            # Within these columns at once, on the others when these are done: fewer passes.
            remaining[:, column:stop] -= error[:, None] * factor[column, column:stop]
        remaining[:, stop:] -= errors @ factor[start:stop, stop:]
    restored = torch.empty(levels.shape, dtype=torch.int8)
    restored[:, order] = levels.to(torch.int8)
    return restored


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the damped Hessian's inverse."""
    mean = hessian.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    # Scaled first: the factor's scale drops out, and float32 holds it whatever the activations are.
    scaled = hessian / mean
    for damping in _DAMPING:
        damped = scaled + damping * torch.eye(len(scaled))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper: torch.Tensor
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper
    raise ValueError("the Hessian of the calibration activations is not positive definite")
