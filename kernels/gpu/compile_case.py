"""What is compiled ahead of time, without a card: the launches of GPT-J-6B.

Every kernel module has `compile_cases() -> tuple[CompileCase, ...]`; MODULES names the modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gptjet.kernels.batch import BlockGeometry

CAPABILITIES = (70, 75, 80, 86, 90)
"""What the kernels are compiled for: V100, T4, A100, A10 and H100."""

GPT_J_6B = BlockGeometry(
    num_layers=28,
    hidden_size=4096,
    num_heads=16,
    head_dim=256,
    rotary_dim=64,
    inner_size=16384,
    vocab_size=50400,
    max_context=2048,
)
"""The geometry whose launches are compiled."""

MODULES: tuple[str, ...] = (
    "copy_blocks",
    "dequantize",
    "dot_linear",
    "embedding",
    "gelu_linear_residual",
    "layer_norm_linear",
    "paged_attention",
    "rotary_kv",
    "sampling",
)
"""Modules of this package with `compile_cases`; a test compares the list with the folder."""


@dataclass(frozen=True, slots=True)
class CompileCase:
    """One specialisation of a kernel, as a launch at GPT-J-6B's sizes makes it.

    name              unique in its module: "int4 rows 1, layer_norm_linear in"
    kernel            the function that `triton.jit` made
    signature         argument -> Triton type ("*fp16", "i32", ...), or "constexpr"
    constexprs        value of each argument that is "constexpr" in the signature
    min_capability    the first capability that it is launched on; 80 for one with a `tl.dot`
    max_capability    the last one, where tiles differ from card to card
    programs          of the grid
    bytes_moved       that one launch reads and writes in all, and
    bytes_minimum     what no launch could do without: weights once, inputs once, outputs once
    divisible_by_16   integer arguments that are multiples of 16 in this launch, which the JIT
                      compiles for; pointers always are
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    num_warps: int
    programs: int
    bytes_moved: int
    bytes_minimum: int
    num_stages: int = 1
    min_capability: int = CAPABILITIES[0]
    max_capability: int = CAPABILITIES[-1]
    divisible_by_16: frozenset[str] = field(default_factory=frozenset)

    def is_for(self, capability: int) -> bool:
        """Whether a card of that capability launches it."""
        return self.min_capability <= capability <= self.max_capability
