"""One launch of each kernel: its tensors, what the reference makes of them, and the bytes it moves.

Each is a `kernel_cases.Launchable`.
"""

from __future__ import annotations

import torch

from gptjet.benchmarks.tune.card import LaunchTensors
from gptjet.kernels import reference
from gptjet.kernels.batch import BLOCK_SIZE, BlockGeometry
from gptjet.kernels.gpu.copy_blocks import copy_blocks
from gptjet.kernels.gpu.dequantize import dequantize_rows
from gptjet.kernels.gpu.embedding import embed
from gptjet.kernels.gpu.gemv_launch import Workspace, workspace_needs
from gptjet.kernels.gpu.paged_attention import paged_attention
from gptjet.kernels.gpu.rotary_kv import rotary_write_kv
from gptjet.kernels.gpu.sampling import SamplingParameters, SamplingWorkspace, sample
from gptjet.kernels.gpu.tuning import Launch, choose_tile
from gptjet.kernels.weights import DenseWeight, Int4Weight, Int8Weight, Weight

# Of the largest value: a float16 result is rounded by 2^-11, and what it is made of once more.
_HALF_TOLERANCE = 2e-3
_SEED = 6


class WeightPass:
    """A GEMV kernel over a random weight, with the tile that the table gives it."""

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
        """See Launchable."""
        self._tensors.run(self._tensors.weights[copy], self._tile, self._workspace)

    def error(self) -> tuple[float, float]:
        """See Launchable."""
        return self._tensors.difference(self._tile, self._workspace)


class Attention:
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
        """See Launchable."""
        paged_attention(
            self._queries,
            self._cache,
            self._positions,
            self._rows,
            self._tables[copy],
            self._out,
        )

    def error(self) -> tuple[float, float]:
        """See Launchable."""
        self._out.fill_(torch.nan)
        self.launch(0)
        expected = reference.paged_attention(
            self._queries.float(), self._cache, self._positions, self._rows, self._tables[0]
        )
        return _difference(self._out, expected, _HALF_TOLERANCE)


class RotaryWrite:
    """Five tokens, one of them padding, turned and written to blocks in no order."""

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
        """See Launchable."""
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
        """See Launchable."""
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


class CopyBlocks:
    """Three KV blocks of random bytes over three others, in all layers: not a byte may differ."""

    copies = 1
    _PAIRS = ((4, 1), (0, 5), (4, 3))
    _NUM_BLOCKS = 6

    def __init__(
        self, geometry: BlockGeometry, kv: torch.dtype, device: torch.device, _: int
    ) -> None:
        torch.manual_seed(_SEED)
        shape = geometry.kv_cache_shape(self._NUM_BLOCKS, kv)
        self._before = torch.randint(-128, 128, shape, dtype=torch.int8, device=device).to(kv)
        self._cache = self._before.clone()
        self._pairs = torch.tensor(self._PAIRS, dtype=torch.int32, device=device)
        self.num_bytes = 2 * len(self._PAIRS) * self._before[:, :, 0].nbytes

    def launch(self, copy: int) -> None:
        """See Launchable."""
        del copy
        copy_blocks(self._cache, self._pairs)

    def error(self) -> tuple[float, float]:
        """See Launchable."""
        self._cache.copy_(self._before)
        self.launch(0)
        expected = self._before.clone()
        for source, destination in self._PAIRS:
            expected[:, :, destination] = self._before[:, :, source]
        return float((self._cache != expected).sum()), 0.5


class Embed:
    """Three tokens, one of which the pass before sampled."""

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
        """See Launchable."""
        del copy
        embed(self._ids, self._sources, self._sampled, self._embedding, self._out)

    def error(self) -> tuple[float, float]:
        """See Launchable."""
        self._out.fill_(torch.nan)
        self.launch(0)
        last = len(self._embedding) - 1
        return _difference(self._out, self._embedding[[3, last - 1, last]].float(), 1e-6)


class Dequantize:
    """Some rows of a quantised weight as float16."""

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
        """See Launchable."""
        del copy
        dequantize_rows(self._weight, 0, self._out.shape[0], self._out)

    def error(self) -> tuple[float, float]:
        """See Launchable."""
        self._out.fill_(torch.nan)
        self.launch(0)
        expected = torch.empty(self._out.shape, device=self._out.device)
        reference.dequantize_rows(self._weight, 0, expected.shape[0], expected)
        return _difference(self._out, expected, 1e-3)


class Sampling:
    """Ids against what PyTorch allows: the likeliest one, or any of the set that is kept.

    Which of the set is drawn is the engine's business: the kernel's own tests hold it to the
    engine's sampler, id by id, through the interpreter.
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
        """See Launchable."""
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
        """See Launchable."""
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
