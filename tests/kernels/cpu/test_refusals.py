"""What the model does not take: each a ValueError that names the field, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from gptjet.kernels.cpu import CpuModel
from gptjet.kernels.weights import Int4Weight, Int8Weight, LayerWeights

Pack = Callable[..., CpuModel]


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# Of a batch of 3 tokens of sequence 0, positions 0 to 2, in a context of 64 and 300 words.
BAD_BATCHES = {
    "token-past-vocabulary": ({"token_ids": int32(1, 257, 2)}, r"token_ids\[1\] is 257"),
    "token-negative": ({"token_ids": int32(-1, 2, 2)}, r"token_ids\[0\] is -1"),
    "token-dtype": ({"token_ids": torch.tensor([1, 2, 3])}, "token_ids must be contiguous int32"),
    "token-2d": ({"token_ids": int32(1, 2, 3)[None]}, "token_ids must be"),
    "token-strided": ({"token_ids": int32(1, 0, 2, 0, 3, 0)[::2]}, "token_ids must be contiguous"),
    "position-past-context": ({"positions": int32(62, 63, 64)}, r"positions\[2\] is 64"),
    "position-negative": ({"positions": int32(-1, 0, 1)}, r"positions\[0\] is -1"),
    "position-count": ({"positions": int32(0, 1)}, "positions has 2 rows"),
    "position-gap": ({"positions": int32(0, 1, 3)}, "row 2 does not follow"),
    "sequence-apart": ({"sequence_index": int32(0, 1, 0)}, "row 2 does not follow"),
    "sequence-unknown": ({"sequence_index": int32(0, 0, 2)}, r"sequence_index\[2\] is 2"),
    "sequence-negative": ({"sequence_index": int32(-1, 0, 0)}, r"sequence_index\[0\] is -1"),
    "block-past-cache": (
        {"block_tables": torch.full((2, 4), 99, dtype=torch.int32)},
        r"block_tables\[0, 0\] is 99",
    ),
    "block-negative": (
        {"block_tables": torch.full((2, 4), -1, dtype=torch.int32)},
        r"block_tables\[0, 0\] is -1",
    ),
    "table-too-narrow": (
        {"block_tables": torch.zeros(2, 0, dtype=torch.int32)},
        r"positions\[0\] is 0",
    ),
    "table-dtype": ({"block_tables": torch.zeros(2, 4)}, "block_tables must be"),
    "logits-row-past-batch": ({"logits_rows": int32(3)}, r"logits_rows\[0\] is 3"),
    "logits-row-negative": ({"logits_rows": int32(0, -1)}, r"logits_rows\[1\] is -1"),
    "logits-row-twice": ({"logits_rows": int32(1, 1)}, r"logits_rows\[1\] is 1"),
}


@pytest.mark.parametrize(("change", "message"), BAD_BATCHES.values(), ids=list(BAD_BATCHES))
def test_a_bad_batch_is_refused_and_the_cache_left_alone(
    plain: ModuleType, pack: Pack, change: dict[str, torch.Tensor], message: str
) -> None:
    model = plain.random_model(plain.GEOMETRIES["head32"], "fp32")
    packed = pack(model)
    ids = plain.random_ids(model.geometry, 3)
    sequences = plain.Sequences(model.geometry, [ids, ids])
    batch = sequences.batch({0: 3})
    with pytest.raises(ValueError, match=message):
        packed.forward(replace(batch, **change), sequences.kv_cache)
    assert sequences.kv_cache.isnan().all()
    assert packed.forward(batch, sequences.kv_cache).isfinite().all()


@pytest.mark.parametrize(
    "cache",
    [
        pytest.param(torch.zeros(2, 2, 4, 4, 16, 32, dtype=torch.float16), id="dtype"),
        pytest.param(torch.zeros(1, 2, 4, 4, 16, 32), id="layers"),
        pytest.param(torch.zeros(2, 2, 4, 16, 4, 32), id="order"),
        pytest.param(torch.zeros(2, 2, 4, 4, 16, 64)[..., ::2], id="strided"),
        pytest.param(torch.zeros(2, 2, 4, 4, 16), id="dimensions"),
    ],
)
def test_a_bad_cache_is_refused(plain: ModuleType, pack: Pack, cache: torch.Tensor) -> None:
    model = plain.random_model(plain.GEOMETRIES["head32"], "fp32")
    sequences = plain.Sequences(model.geometry, [plain.random_ids(model.geometry, 3)])
    with pytest.raises(ValueError, match="kv_cache must be contiguous float32"):
        pack(model).forward(sequences.batch({0: 3}), cache)


def test_an_empty_batch_has_no_logits(plain: ModuleType, pack: Pack) -> None:
    model = plain.random_model(plain.GEOMETRIES["head32"], "fp32")
    sequences = plain.Sequences(model.geometry, [plain.random_ids(model.geometry, 3)])
    batch = sequences.batch({0: 3})
    none = int32()
    batch = replace(batch, token_ids=none, positions=none, sequence_index=none, logits_rows=none)
    assert pack(model).forward(batch, sequences.kv_cache).shape == (0, 257)


def test_layers_are_taken_one_at_a_time(plain: ModuleType) -> None:
    """So that a checkpoint can be read shard by shard."""
    model = plain.random_model(plain.GEOMETRIES["head32"], "int8")
    alive: list[int] = []

    class Layer:
        """Counts how many of its kind there are."""

        def __init__(self, layer: LayerWeights) -> None:
            self.norm_weight, self.norm_bias = layer.norm_weight, layer.norm_bias
            self.w_in, self.w_out = layer.w_in, layer.w_out
            alive.append(1)
            assert sum(alive) == 1

        def __del__(self) -> None:
            alive.append(-1)

    def stream() -> Iterator[Layer]:
        for layer in model.layers:
            yield Layer(layer)

    packed = CpuModel.pack(model.geometry, model.head, stream(), num_threads=1)  # type: ignore[arg-type]
    assert sum(alive) == 0
    packed.close()


@pytest.mark.parametrize("kind", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("take", [False, True])
def test_weights_are_emptied_once_they_are_packed_where_that_is_asked(
    plain: ModuleType, kind: str, take: bool
) -> None:
    model = plain.random_model(plain.GEOMETRIES["embedded"], kind)
    layer = model.layers[0]
    names = {"fp32": "weight", "int8": "quantized", "int4": "packed"}
    matrices = [model.head.embedding]
    matrices += [getattr(w, names[kind]) for w in (model.head.lm_head, layer.w_in, layer.w_out)]
    CpuModel.pack(model.geometry, model.head, model.layers, num_threads=1, take=take).close()
    assert [matrix.numel() == 0 for matrix in matrices] == [take] * 4


@pytest.mark.parametrize(("kind", "bits"), [("fp32", 32), ("int8", 8), ("int4", 4)])
def test_packed_size_is_that_of_the_format(
    plain: ModuleType, pack: Pack, kind: str, bits: int
) -> None:
    """256 inputs and whole panels of 64: the formats' own bytes, scales, biases and norms."""
    model = plain.random_model(plain.GEOMETRIES["embedded"], kind)
    weights = [model.head.lm_head] + [w for x in model.layers for w in (x.w_in, x.w_out)]
    values = sum(w.shape[0] * w.shape[1] for w in weights)
    outputs = sum(w.shape[0] for w in weights)
    norms = 2 * 256 * 4 * (len(model.layers) + 1)
    embedding = 512 * 256 * (4 if kind == "fp32" else 2)
    scales = {"fp32": 0, "int8": outputs * 4, "int4": values // 128 * 2}[kind]
    assert pack(model).nbytes == values * bits // 8 + outputs * 4 + norms + embedding + scales


def test_a_closed_model_refuses_and_closes_again(plain: ModuleType, pack: Pack) -> None:
    model = plain.random_model(plain.GEOMETRIES["head32"], "fp32")
    packed = pack(model)
    packed.close()
    packed.close()
    sequences = plain.Sequences(model.geometry, [plain.random_ids(model.geometry, 3)])
    with pytest.raises(ValueError, match="closed"):
        packed.forward(sequences.batch({0: 3}), sequences.kv_cache)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_layers_is_refused(plain: ModuleType, count: int) -> None:
    model = plain.random_model(plain.GEOMETRIES["head32"], "fp32")
    layers = (model.layers * 2)[:count]
    with pytest.raises(ValueError, match="layers"):
        CpuModel.pack(model.geometry, model.head, layers, num_threads=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 33}, "head_dim is 33"),
        ({"rotary_dim": 15}, "rotary_dim is 15"),
        ({"rotary_dim": 34}, "rotary_dim is 34"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"inner_size": 513}, r"layer 0: w_in is \[896, 128\], not \[897, 128\]"),
        ({"vocab_size": 258}, r"embedding is \[257, 128\], not \[258, 128\]"),
    ],
)
def test_weights_that_do_not_fit_the_geometry_are_refused(
    plain: ModuleType, change: dict[str, int], message: str
) -> None:
    model = plain.random_model(plain.GEOMETRIES["head32"], "fp32")
    with pytest.raises(ValueError, match=message):
        CpuModel.pack(replace(model.geometry, **change), model.head, model.layers, num_threads=1)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            Int8Weight(torch.zeros(896, 128, dtype=torch.uint8), torch.ones(896)),
            "quantized is torch.uint8",
        ),
        (
            Int8Weight(torch.zeros(896, 128, dtype=torch.int8), torch.ones(895)),
            r"w_in.scale is \[895\]",
        ),
        (
            Int4Weight(torch.zeros(896, 65, dtype=torch.uint8), torch.ones(896, 1), 128),
            r"w_in.packed is \[896, 65\]",
        ),
        (
            Int4Weight(torch.zeros(896, 64, dtype=torch.uint8), torch.ones(896, 3), 128),
            r"w_in.scale is \[896, 3\]",
        ),
        (
            Int4Weight(torch.zeros(896, 64, dtype=torch.uint8), torch.ones(896, 1), 128, group=0),
            "w_in.group is 0",
        ),
    ],
)
def test_a_malformed_weight_is_refused(
    plain: ModuleType, weight: Int8Weight | Int4Weight, message: str
) -> None:
    model = plain.random_model(plain.GEOMETRIES["head32"], "fp32")
    layers = [replace(model.layers[0], w_in=weight), model.layers[1]]
    with pytest.raises(ValueError, match=message):
        CpuModel.pack(model.geometry, model.head, layers, num_threads=1)


@pytest.mark.parametrize("threads", [0, -1, 257])
def test_an_impossible_number_of_threads_is_refused(plain: ModuleType, threads: int) -> None:
    model = plain.random_model(plain.GEOMETRIES["head32"], "fp32")
    with pytest.raises(ValueError, match=f"num_threads is {threads}"):
        CpuModel.pack(model.geometry, model.head, model.layers, num_threads=threads)
