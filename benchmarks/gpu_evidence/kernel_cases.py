"""The launches of every kernel at a geometry's sizes: tensors, the reference's result, and bytes.

A case is made on the device that runs it, and holds several copies of what it reads, so that a
timing can take the next one each time and none of it is in a cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from gptjet.benchmarks.tune.card import LaunchTensors
from gptjet.benchmarks.tune.search import RefusedTileError
from gptjet.kernels import reference
from gptjet.kernels.batch import BLOCK_SIZE, BlockGeometry
from gptjet.kernels.gpu.compile_case import GPT_J_6B
from gptjet.kernels.gpu.dequantize import dequantize_rows
from gptjet.kernels.gpu.embedding import embed
from gptjet.kernels.gpu.gemv_launch import Workspace, capability_of, workspace_needs
from gptjet.kernels.gpu.paged_attention import paged_attention
from gptjet.kernels.gpu.rotary_kv import rotary_write_kv
from gptjet.kernels.gpu.sampling import SamplingParameters, SamplingWorkspace, sample
from gptjet.kernels.gpu.tuning import Launch, choose_tile
from gptjet.kernels.weights import DenseWeight, Int4Weight, Int8Weight, Weight

TINY = BlockGeometry(
    num_layers=1,
    hidden_size=64,
    num_heads=1,
    head_dim=64,
    rotary_dim=16,
    inner_size=64,
    vocab_size=61,
    max_context=64,
)
"""What an interpreted kernel does in under a second."""

GEOMETRIES = {"gpt-j-6b": GPT_J_6B, "tiny": TINY}

DTYPES = {"fp16": "float16", "int8": "int8", "int4": "int4"}
"""The tuning table's name of a weight type -> the one that people say."""

# Of the largest value: a float16 result is rounded by 2^-11, and what it is made of once more.
_HALF_TOLERANCE = 2e-3
_SEED = 6


class Launchable(Protocol):
    """One launch, made on its device.

    num_bytes  that no launch could do without: weights once, inputs once, outputs once
    copies     of what it reads
    """

    num_bytes: int
    copies: int

    def launch(self, copy: int) -> None:
        """Launch it over one of the copies."""
        ...

    def error(self) -> tuple[float, float]:
        """(largest difference from the reference, limit), of the first copy."""
        ...


@dataclass(frozen=True, slots=True)
class KernelCase:
    """subject: what is proven by it, "kernels/int8". make(device, working_set_bytes): launches that
    read little have one copy whatever they are asked for."""

    subject: str
    kernel: str
    name: str
    make: Callable[[torch.device, int], Launchable]
    rows: int = 1
    is_timed: bool = False

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.kernel}, {self.name}"


def kernel_cases(geometry: BlockGeometry, rows: tuple[int, ...]) -> Iterator[KernelCase]:
    """Every kernel: the weight passes by weight type first, then what all of them share."""
    hidden, width = geometry.hidden_size, geometry.num_heads * geometry.head_dim
    shapes = (
        ("layer_norm_linear", "w_in", 3 * width + geometry.inner_size, hidden),
        ("gelu_linear_residual", "w_out", hidden, hidden + geometry.inner_size),
        ("layer_norm_linear", "lm_head", geometry.vocab_size, hidden),
    )
    for kind, dtype in DTYPES.items():
        for kernel, weight, n, k in shapes:
            for count in rows:
                yield KernelCase(
                    f"kernels/{dtype}",
                    kernel,
                    f"{weight} {dtype}, rows {count}",
                    _weight_pass(kernel, n, k, kind, count),
                    rows=count,
                    is_timed=count == 1 or count == rows[-1],
                )
    yield from _shared_cases(geometry)


def _shared_cases(geometry: BlockGeometry) -> Iterator[KernelCase]:
    shared = "kernels/shared"
    most = geometry.max_context
    contexts = sorted({min(c, most) for c in (1, 15, 16, 17, most // 2, most - 1, most)})
    for kv in (torch.float16, torch.int8):
        name = str(kv).removeprefix("torch.")
        yield KernelCase(
            shared,
            "paged_attention",
            f"{name} KV, contexts {', '.join(map(str, contexts))}",
            functools.partial(_Attention, geometry, contexts, kv),
            rows=len(contexts),
        )
        yield KernelCase(
            shared,
            "paged_attention",
            f"{name} KV, context {most}",
            functools.partial(_Attention, geometry, [most], kv),
            is_timed=True,
        )
        yield KernelCase(
            shared,
            "rotary_write_kv",
            f"{name} KV",
            functools.partial(_RotaryWrite, geometry, kv),
            rows=_RotaryWrite.ROWS,
        )
    yield KernelCase(shared, "embed", "rows 3", functools.partial(_Embed, geometry))
    for kind in ("int8", "int4"):
        yield KernelCase(
            shared,
            "dequantize_rows",
            kind,
            functools.partial(_Dequantize, geometry, kind),
        )
    for draws, filters in ((False, False), (True, False), (True, True)):
        name = "greedy" if not draws else ("top-k and top-p" if filters else "temperature")
        yield KernelCase(
            shared,
            "sample",
            name,
            functools.partial(_Sampling, geometry, (draws, filters)),
            is_timed=True,
        )


def _weight_pass(
    kernel: str, n: int, k: int, kind: str, rows: int
) -> Callable[[torch.device, int], Launchable]:
    def make(device: torch.device, working_set_bytes: int) -> Launchable:
        launch = Launch(kernel, capability_of(device), rows, n, k, kind)
        return _WeightPass(launch, device, working_set_bytes)

    return make


class _WeightPass:
    def __init__(self, launch: Launch, device: torch.device, working_set_bytes: int) -> None:
        self._tensors = LaunchTensors(launch, device, working_set_bytes)
        self._tile = choose_tile(
            launch.kernel, launch.capability, launch.rows, launch.n, launch.k, launch.weight_type
        )
        needs = workspace_needs(launch.rows, launch.n, self._tile)
        self._workspace = Workspace.allocate(device, *needs)
        self.copies = len(self._tensors.weights)
        # Activations in, results out: float16 or float32, a thousandth of the weights.
        activations = launch.rows * (2 * launch.k + 4 * launch.n)
        self.num_bytes = _stored_bytes(self._tensors.weights[0]) + activations

    def launch(self, copy: int) -> None:
        self._tensors.run(self._tensors.weights[copy], self._tile, self._workspace)

    def error(self) -> tuple[float, float]:
        try:
            difference, limit = self._tensors.difference(self._tile, self._workspace)
        except RefusedTileError as error:
            raise RuntimeError(str(error)) from error
        return difference, limit


class _Attention:
    """Rows of several contexts, their blocks in no order, in a cache of poison but for their KV."""

    def __init__(
        self,
        geometry: BlockGeometry,
        contexts: list[int],
        kv: torch.dtype,
        device: torch.device,
        working_set_bytes: int,
    ) -> None:
        heads, head_dim = geometry.num_heads, geometry.head_dim
        torch.manual_seed(_SEED)
        width = -(-geometry.max_context // BLOCK_SIZE)
        element = 2 if kv == torch.float16 else 1
        per_token = 2 * heads * head_dim * element
        one = per_token * sum(contexts)
        self.copies = max(1, -(-working_set_bytes // one))
        rows = len(contexts)
        blocks = self.copies * rows * width
        order = torch.randperm(blocks, device=device).int()
        tables = order.view(self.copies, rows, width)
        _, two, *block = geometry.kv_cache_shape(blocks, kv)
        self._cache = torch.full(
            (two, *block), -128 if kv == torch.int8 else torch.nan, dtype=kv, device=device
        )
        if kv == torch.int8:
            reference.int8_kv_scales(self._cache).fill_(torch.nan)
        for copy in range(self.copies):
            for row, context in enumerate(contexts):
                past = torch.arange(context, device=device)
                slots = reference.slot_mapping(past, torch.full_like(past, row), tables[copy])
                keys, values = torch.randn(2, context, heads, head_dim, device=device).half()
                reference.write_kv(self._cache, keys, values, slots)
        self._tables = tables
        self._queries = torch.randn(rows, heads, head_dim, device=device).half()
        self._positions = torch.tensor(contexts, dtype=torch.int32, device=device) - 1
        self._rows = torch.arange(rows, dtype=torch.int32, device=device)
        self._out = torch.empty(rows, heads * head_dim, dtype=torch.float16, device=device)
        self.num_bytes = one + 2 * 2 * rows * heads * head_dim

    def launch(self, copy: int) -> None:
        paged_attention(
            self._queries,
            self._cache,
            self._positions,
            self._rows,
            self._tables[copy],
            self._out,
        )

    def error(self) -> tuple[float, float]:
        self._out.fill_(torch.nan)
        self.launch(0)
        expected = reference.paged_attention(
            self._queries.float(), self._cache, self._positions, self._rows, self._tables[0]
        )
        return _difference(self._out, expected, _HALF_TOLERANCE)


class _RotaryWrite:
    ROWS = 5
    copies = 1

    def __init__(
        self, geometry: BlockGeometry, kv: torch.dtype, device: torch.device, _: int
    ) -> None:
        torch.manual_seed(_SEED)
        heads, head_dim = geometry.num_heads, geometry.head_dim
        width = heads * head_dim
        rows, blocks = self.ROWS, -(-geometry.max_context // BLOCK_SIZE)
        self._projected = torch.randn(rows, 3 * width + geometry.inner_size, device=device).half()
        self._cos, self._sin = reference.rotary_tables(
            geometry.max_context, geometry.rotary_dim, device
        )
        last = geometry.max_context - 1
        # The third row is padding: it must write nothing, and its queries are zeros.
        where = [0, min(17, last), -1, last // 2, last]
        self._positions = torch.tensor(where, dtype=torch.int32, device=device)
        self._rows = torch.arange(rows, dtype=torch.int32, device=device)
        order = torch.randperm(rows * blocks, device=device).int()
        self._tables = order.view(rows, blocks)
        _, two, *block = geometry.kv_cache_shape(rows * blocks, kv)
        self._cache = torch.zeros(two, *block, dtype=kv, device=device)
        self._expected = torch.zeros_like(self._cache)
        self._queries = torch.empty(rows, heads, head_dim, dtype=torch.float16, device=device)
        self.num_bytes = 2 * (3 * width + 3 * width) * rows

    def launch(self, copy: int) -> None:
        del copy
        rotary_write_kv(
            self._projected,
            self._cos,
            self._sin,
            self._positions,
            self._rows,
            self._tables,
            self._cache,
            self._queries,
        )

    def error(self) -> tuple[float, float]:
        self._queries.fill_(torch.nan)
        self.launch(0)
        rows, heads, head_dim = self._queries.shape
        width = heads * head_dim
        query, key, value = (
            part.reshape(rows, heads, head_dim).float()
            for part in torch.split(self._projected[:, : 3 * width], width, 1)
        )
        real = self._positions >= 0
        at = self._positions[real].long()
        expected = torch.zeros_like(query)
        expected[real] = reference.rotary(query[real], self._cos[at], self._sin[at])
        turned = reference.rotary(key[real], self._cos[at], self._sin[at])
        slots = reference.slot_mapping(self._positions[real], self._rows[real], self._tables)
        reference.write_kv(self._expected, turned.half(), value[real].half(), slots)
        difference, limit = _difference(self._queries, expected, _HALF_TOLERANCE)
        if self._cache.dtype == torch.int8:
            # A level more or less, where rounding the key to float16 first made the difference.
            rows_of_tokens = slice(0, BLOCK_SIZE)
            got = self._cache[:, :, :, rows_of_tokens].float() / 127
            stored = _difference(got, self._expected[:, :, :, rows_of_tokens].float() / 127, 1e-2)
        else:
            stored = _difference(self._cache, self._expected.float(), _HALF_TOLERANCE)
        return max((difference, limit), stored, key=lambda pair: pair[0] / pair[1])


class _Embed:
    copies = 1

    def __init__(self, geometry: BlockGeometry, device: torch.device, _: int) -> None:
        torch.manual_seed(_SEED)
        size = (geometry.vocab_size, geometry.hidden_size)
        self._embedding = torch.randn(*size, device=device).half()
        last = geometry.vocab_size - 1
        # Row 1 takes what was sampled for row 2 of the pass before.
        self._ids = torch.tensor([3, 0, last], dtype=torch.int32, device=device)
        self._sources = torch.tensor([-1, 2, -1], dtype=torch.int32, device=device)
        self._sampled = torch.tensor([1, 2, last - 1], dtype=torch.int32, device=device)
        self._out = torch.empty(3, geometry.hidden_size, device=device)
        self.num_bytes = 3 * geometry.hidden_size * (2 + 4)

    def launch(self, copy: int) -> None:
        del copy
        embed(self._ids, self._sources, self._sampled, self._embedding, self._out)

    def error(self) -> tuple[float, float]:
        self._out.fill_(torch.nan)
        self.launch(0)
        last = len(self._embedding) - 1
        return _difference(self._out, self._embedding[[3, last - 1, last]].float(), 1e-6)


class _Dequantize:
    copies = 1
    _ROWS = 512

    def __init__(self, geometry: BlockGeometry, kind: str, device: torch.device, _: int) -> None:
        torch.manual_seed(_SEED)
        n, k = min(self._ROWS, geometry.hidden_size), geometry.hidden_size
        self._weight: Int8Weight | Int4Weight
        if kind == "int8":
            levels = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
            self._weight = Int8Weight(levels, torch.rand(n, device=device))
        else:
            packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
            groups = -(-k // 128)
            self._weight = Int4Weight(packed, torch.randn(n, groups, device=device).half(), k)
        self._out = torch.empty(n, k, dtype=torch.float16, device=device)
        self.num_bytes = _stored_bytes(self._weight) + self._out.nbytes

    def launch(self, copy: int) -> None:
        del copy
        dequantize_rows(self._weight, 0, self._out.shape[0], self._out)

    def error(self) -> tuple[float, float]:
        self._out.fill_(torch.nan)
        self.launch(0)
        expected = torch.empty(self._out.shape, device=self._out.device)
        reference.dequantize_rows(self._weight, 0, expected.shape[0], expected)
        return _difference(self._out, expected, 1e-3)


class _Sampling:
    """Ids against what PyTorch allows: the likeliest one, or any of the set that is kept.

    Which of the set is drawn is the engine's business: the fused backend's parity stage holds the
    kernel to the engine's own sampler, id by id.
    """

    copies = 1
    _ROWS = 8

    def __init__(
        self, geometry: BlockGeometry, kinds: tuple[bool, bool], device: torch.device, _: int
    ) -> None:
        torch.manual_seed(_SEED)
        self._draws, self._filters = kinds
        vocab = geometry.vocab_size
        self._logits = 4 * torch.randn(self._ROWS, vocab, device=device)
        host = SamplingParameters.allocate(self._ROWS)
        self._top_k, self._top_p = min(20, vocab // 2), 0.7
        for row in range(self._ROWS):
            host.set_row(
                row,
                temperature=1.0 if self._draws else 0.0,
                top_k=self._top_k if self._filters and row % 2 else 0,
                top_p=self._top_p if self._filters and not row % 2 else 1.0,
                seed=_SEED,
                index=row,
            )
        self._parameters = SamplingParameters(host.packed.to(device))
        self._workspace = SamplingWorkspace.allocate(self._ROWS, vocab, device)
        self._out = torch.empty(self._ROWS, dtype=torch.int32, device=device)
        # Logits are read; weights (8 bytes an id) are written, and read by each search.
        self.num_bytes = self._logits.nbytes

    def launch(self, copy: int) -> None:
        del copy
        sample(
            self._logits,
            self._parameters,
            self._out,
            draws=self._draws,
            filters=self._filters,
            workspace=self._workspace,
        )

    def error(self) -> tuple[float, float]:
        self._out.fill_(-2)
        self.launch(0)
        wrong = 0
        probabilities = self._logits.double().softmax(1)
        for row, token in enumerate(self._out.tolist()):
            by_size = probabilities[row].sort(descending=True)
            rank = (by_size.indices == token).nonzero()
            if not len(rank):
                wrong += 1
                continue
            place = int(rank[0])
            if not self._draws:
                wrong += place != 0
            elif self._filters and row % 2:
                wrong += place >= self._top_k
            elif self._filters:
                # Kept where what is likelier does not reach top_p yet.
                wrong += float(by_size.values[:place].sum()) > self._top_p
        return float(wrong), 0.5


def _difference(got: torch.Tensor, expected: torch.Tensor, share: float) -> tuple[float, float]:
    """(largest difference, limit): NaN where the result has one, as nothing is within a limit."""
    return (
        float((got.float() - expected).abs().max()),
        share * max(float(expected.abs().max()), 1e-30),
    )


def _stored_bytes(weight: Weight) -> int:
    if isinstance(weight, DenseWeight):
        return weight.weight.nbytes
    held = weight.quantized if isinstance(weight, Int8Weight) else weight.packed
    return held.nbytes + weight.scale.nbytes
