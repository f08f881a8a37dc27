"""Bytes and FLOPs calculated by hand for a model small enough to do so."""

from __future__ import annotations

import pytest

from gptjet.benchmarks.geometry import config_of, geometry_from_config
from gptjet.benchmarks.hardware import measured_rates
from gptjet.benchmarks.roofline import (
    WEIGHT_TYPES,
    Rates,
    decode_work,
    kv_bytes_per_token,
    prefill_work,
    request_floor,
    streamed_bytes,
    weight_bytes,
)

# One layer, hidden 8, 2 heads, MLP 32, vocabulary 10: a layer has 4 x 64 + 2 x 256 = 768 matrix
# weights and 32 + 8 + 16 = 56 others; the head 80, the embedding 80, final norm and head bias 26.
TINY = geometry_from_config(
    {"model_type": "gptj", "n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 10}
)
FP16, FP32 = WEIGHT_TYPES["fp16"], WEIGHT_TYPES["fp32"]
INT8, INT4 = WEIGHT_TYPES["int8"], WEIGHT_TYPES["int4"]


def test_weights_in_memory() -> None:
    assert weight_bytes(TINY, FP32) == 4 * (768 + 56 + 80 + 80 + 26)
    assert weight_bytes(TINY, INT8) == 1 * (768 + 80) + 2 * (56 + 26 + 80)
    # 4 bits a weight and a 2-byte scale for each 128 of them.
    assert weight_bytes(TINY, INT4) == (0.5 + 2 / 128) * (768 + 80) + 2 * (56 + 26 + 80)


def test_a_step_reads_all_weights_but_the_embedding_table() -> None:
    assert streamed_bytes(TINY, FP16) == 2 * (768 + 56 + 80 + 26)


def test_kv_cache_is_keys_and_values_of_each_layer() -> None:
    assert kv_bytes_per_token(TINY, FP16) == 2 * 8 * 2
    assert kv_bytes_per_token(TINY, INT8) == 2 * 8 * 2, "only weights are quantised"


def test_decode_work() -> None:
    work = decode_work(TINY, FP16, 5)
    assert work.num_bytes == 2 * 930 + 5 * 32
    # 2 FLOPs a weight, 4 an element of width 8 a context token.
    assert work.flops == 2 * (768 + 80) + 4 * 8 * 5


def test_a_batch_shares_the_weights_and_nothing_else() -> None:
    alone, four = decode_work(TINY, FP16, 5), decode_work(TINY, FP16, 5, batch_size=4)
    assert four.num_bytes - alone.num_bytes == 3 * 5 * 32
    assert four.flops == 4 * alone.flops


def test_prefill_work() -> None:
    work = prefill_work(TINY, FP16, 3)
    assert work.num_bytes == 2 * 930 + 3 * 32
    # The head works on the last position only; position i attends to i positions: 1 + 2 + 3.
    assert work.flops == 2 * 3 * 768 + 2 * 80 + 4 * 8 * 6


def test_the_slower_of_moving_and_computing_decides() -> None:
    work = decode_work(TINY, FP16, 5)  # 2020 bytes, 1856 FLOP
    slow_memory, slow_units = Rates(1e-6, 1, "x"), Rates(1, 1e-9, "x")
    assert work.time_ms(slow_memory) == pytest.approx(1000 * 2020 / 1e3)
    assert work.bound(slow_memory) == "bandwidth"
    assert work.time_ms(slow_units) == pytest.approx(1000 * 1856 / 1e3)
    assert work.bound(slow_units) == "compute"


def test_a_request_is_a_prefill_and_a_step_for_each_further_token() -> None:
    rates = Rates(1e-6, 1, "x")
    floor = request_floor(TINY, FP16, rates, 3, 3)
    steps = [decode_work(TINY, FP16, context).time_ms(rates) for context in (4, 5)]
    assert floor.ttft_ms == pytest.approx(prefill_work(TINY, FP16, 3).time_ms(rates))
    assert floor.e2e_ms == pytest.approx(floor.ttft_ms + sum(steps))
    assert floor.tpot_ms == pytest.approx(sum(steps) / 2)
    assert request_floor(TINY, FP16, rates, 3, 1).tpot_ms == 0


def test_gpt_j_6b_on_a_t4_is_bound_by_bandwidth_near_27_tokens_a_second() -> None:
    """11.69 GB of streamed FP16 weights at 320 GB/s are 36.5 ms."""
    geometry = geometry_from_config(config_of("gpt-j-6b"))
    step = decode_work(geometry, FP16, 1)
    assert step.time_ms(Rates(320, 65, "datasheet")) == pytest.approx(36.53, abs=0.01)
    assert kv_bytes_per_token(geometry, FP16) == 448 * 1024


def test_measured_rates_take_the_best_bandwidth_so_that_a_floor_stays_one() -> None:
    bandwidth = {
        "copy_gb_s": 20.0,
        "read_gb_s": 22.0,
        "model_read_gb_s": 60.0,
        "matrix_tflops": {"fp32": 0.1, "bf16": 0.4},
    }
    assert measured_rates(bandwidth, FP32) == Rates(60.0, 0.1, "measured")
    assert measured_rates(bandwidth | {"model_read_gb_s": None}, WEIGHT_TYPES["bf16"]) == Rates(
        22.0, 0.4, "measured"
    )
    assert measured_rates(bandwidth, INT8) == Rates(60.0, 0.1, "measured"), "no FP16 units: FP32's"
    assert measured_rates(None, FP32) is None
