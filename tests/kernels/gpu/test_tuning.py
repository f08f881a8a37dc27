from __future__ import annotations

from pathlib import Path

import pytest

from gptjet.benchmarks.kernels_report.limits import LIMITS
from gptjet.kernels.gpu import tuning
from gptjet.kernels.gpu.tuning import (
    CARDS,
    DOT_ROWS,
    MODELLED,
    TABLE_PATH,
    WEIGHT_TYPES,
    Launch,
    Tile,
    TuningError,
    choose_tile,
    default_tile,
    read_table,
)

LINE = {
    "kernel": '"layer_norm_linear"',
    "capability": "75",
    "rows": "1",
    "n": "28672",
    "k": "4096",
    "weight_type": '"fp16"',
    "block_n": "4",
    "block_k": "4096",
    "num_warps": "8",
    "num_stages": "2",
    "split_k": "1",
    "source": '"measured on Tesla T4"',
}


def written(tmp_path: Path, *lines: dict[str, str], text: str = "") -> Path:
    path = tmp_path / "tuning.toml"
    tables = ",\n".join(
        "{ " + ", ".join(f"{k} = {v}" for k, v in line.items()) + " }" for line in lines
    )
    path.write_text(text or f"tiles = [\n{tables}\n]\n", encoding="utf-8")
    return path


def test_a_line_of_the_table_is_a_tile(tmp_path: Path) -> None:
    (entry,) = read_table(written(tmp_path, LINE))
    assert entry.tile == Tile(4, 4096, 8, 2, 1, tiles_per_program=1, load_bytes=16)
    assert entry.launch == Launch("layer_norm_linear", 75, 1, 28672, 4096, "fp16")
    assert entry.source == "measured on Tesla T4"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_n": "0"}, "block_n must be 1 to 256, not 0"),
        ({"block_n": "3"}, "block_n must be a power of two, not 3"),
        ({"block_n": '"4"'}, "block_n must be 1 to 256, not '4'"),
        ({"block_n": "true"}, "block_n must be 1 to 256, not True"),
        ({"num_warps": "64"}, "num_warps must be 1 to 32, not 64"),
        ({"num_stages": "7"}, "num_stages must be 1 to 6, not 7"),
        ({"load_bytes": "12"}, "load_bytes must be 4, 8 or 16, not 12"),
        ({"block_k": "2048"}, "split_k must be 2 for 4096 features in tiles of block_k = 2048"),
        ({"split_k": "2"}, "split_k must be 1 for 4096 features"),
        ({"rows": "0"}, "rows must be an integer of at least 1, not 0"),
        ({"rows": "1.0"}, "rows must be an integer of at least 1, not 1.0"),
        ({"kernel": "1"}, "kernel must be a string, not 1"),
        ({"weight_type": '"fp8"'}, "weight_type must be one of fp16, int8, int4, not 'fp8'"),
        ({"source": '"a guess"'}, 'source must be "modelled" or "measured on <card>"'),
        ({"block_m": "1"}, "unknown key 'block_m'"),
    ],
)
def test_a_bad_line_is_named_with_its_key_and_limit(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    path = written(tmp_path, {**LINE, "rows": "2"}, {**LINE, **changes})
    with pytest.raises(TuningError) as error:
        read_table(path)
    assert str(error.value).startswith(f"{path}: tiles[1]: ")
    assert message in str(error.value)


DOT_LINE = {
    **LINE,
    "kernel": '"dot_linear"',
    "capability": "80",
    "rows": "64",
    "block_m": "64",
    "block_n": "128",
    "block_k": "64",
    "num_stages": "3",
    "tiles_per_program": "32",
    "split_k": "2",
    "source": '"measured on A100"',
}


def test_a_line_of_dot_linear_is_a_tile_of_rows_too(tmp_path: Path) -> None:
    (entry,) = read_table(written(tmp_path, DOT_LINE))
    assert entry.tile == Tile(128, 64, 8, 3, 2, tiles_per_program=32, block_m=64)
    assert entry.tile.chunks(28672) == 224


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_m": "8"}, "block_m must be 16 to 256 for dot_linear, not 8"),
        ({"block_m": "48"}, "block_m must be a power of two, not 48"),
        ({"block_m": "true"}, "block_m must be 16 to 256 for dot_linear, not True"),
        ({"block_n": "8"}, "block_n must be 16 to 256 for dot_linear, not 8"),
        ({"block_k": "32"}, "block_k must be 64 to 256 for dot_linear, not 32"),
        ({"split_k": "3"}, "split_k must be 2 for 4096 features in 32 tiles of block_k = 64"),
        ({"capability": "75"}, "dot_linear needs sm_80 or newer, not sm_75"),
    ],
)
def test_a_bad_line_of_dot_linear_is_named(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    path = written(tmp_path, {**DOT_LINE, **changes})
    with pytest.raises(TuningError, match=r"tiles\[0\]: ") as error:
        read_table(path)
    assert message in str(error.value)


def test_a_line_of_dot_linear_needs_its_rows(tmp_path: Path) -> None:
    line = {name: value for name, value in DOT_LINE.items() if name != "block_m"}
    with pytest.raises(TuningError, match="block_m is missing"):
        read_table(written(tmp_path, line))


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_a_default_of_dot_linear_covers_any_shape_and_fits_shared_memory(
    capability: int, weight_type: str
) -> None:
    most = LIMITS[max(known for known in LIMITS if known <= capability)].shared_per_block
    for rows in DOT_ROWS:
        for n, k in ((1, 1), (5, 17), (64, 256), (28672, 4096), (4096, 20480), (50257, 4100)):
            tile = default_tile(Launch("dot_linear", capability, rows, n, k, weight_type))
            tile.require_features(k)
            assert tile.block_m >= 16
            assert rows <= tile.block_m or tile.split_k == 1, "many rows are not split"
            step = tile.block_k * (2 * tile.block_m + WEIGHT_TYPES[weight_type] * tile.block_n)
            assert tile.num_stages * step <= most
            assert weight_type != "int4" or tile.block_k <= 128


def test_rows_between_take_the_tile_of_the_next_number() -> None:
    def tile(rows: int) -> Tile:
        return choose_tile("dot_linear", 90, rows, 28672, 4096, "int8")

    assert [tile(rows).block_m for rows in (1, 9, 16, 17, 33, 64, 65, 4096)] == [
        16,
        16,
        16,
        32,
        64,
        64,
        128,
        128,
    ]


def test_the_few_outputs_of_w_out_are_split_until_they_fill_the_card() -> None:
    """4,096 outputs are 32 or 64 programs, of which an H100 runs more than 132 at once."""
    for rows in (16, 32, 64):
        tile = choose_tile("dot_linear", 90, rows, 4096, 20480, "int4")
        assert tile.chunks(4096) * tile.split_k >= 2 * CARDS[90].multiprocessors


@pytest.mark.parametrize("key", sorted(LINE))
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    line = {name: value for name, value in LINE.items() if name != key}
    with pytest.raises(TuningError, match=f"{key} is missing"):
        read_table(written(tmp_path, line))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tiles = [", "tuning.toml: "),
        ("tiles = 3", "tiles must be a list of tables"),
        ("tiles = [3]", r"tiles\[0\]: must be a table, not 3"),
        ("tiles = []\ntile = 1", "unknown key 'tile'"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TuningError, match=message):
        read_table(written(tmp_path, text=text))
    with pytest.raises(TuningError, match="nowhere"):
        read_table(tmp_path / "nowhere")


def test_a_launch_stands_in_the_table_once(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"tiles\[1\]: .*in the table already"):
        read_table(written(tmp_path, LINE, LINE))


def test_the_table_comes_before_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, {**LINE, "block_n": "1", "tiles_per_program": "3"})
    monkeypatch.setattr(tuning, "TABLE_PATH", path)
    tuning._table.cache_clear()
    tuning._choose.cache_clear()
    try:
        assert choose_tile("layer_norm_linear", 75, 1, 28672, 4096, "fp16").tiles_per_program == 3
        other = Launch("layer_norm_linear", 75, 2, 28672, 4096, "fp16")
        assert choose_tile("layer_norm_linear", 75, 2, 28672, 4096, "fp16") == default_tile(other)
    finally:
        tuning._table.cache_clear()
        tuning._choose.cache_clear()


def test_what_is_modelled_in_the_table_is_what_the_model_says() -> None:
    entries = read_table(TABLE_PATH)
    modelled = [entry for entry in entries if entry.source == MODELLED]
    assert {entry.launch.capability for entry in modelled} >= {70, 75}
    stale = [entry.launch for entry in modelled if entry.tile != default_tile(entry.launch)]
    assert stale == [], "run `python -m gptjet.benchmarks.tune --modelled 70 --modelled 75`"


@pytest.mark.parametrize("capability", [60, 70, 72, 75, 80, 86, 89, 90, 120])
@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_a_default_covers_any_shape_with_tiles_that_registers_hold(
    capability: int, weight_type: str
) -> None:
    for rows in range(1, 9):
        for n, k in ((1, 1), (5, 17), (64, 256), (28672, 4096), (4096, 20480), (50257, 4100)):
            tile = default_tile(Launch("layer_norm_linear", capability, rows, n, k, weight_type))
            tile.require_features(k)
            assert tile.block_k % 128 == 0
            assert tile.chunks(n) * tile.tiles_per_program * tile.block_n >= n
            held = tile.block_n * tile.block_k * WEIGHT_TYPES[weight_type]
            assert held <= 32 << 10


@pytest.mark.parametrize("capability", CARDS)
def test_a_default_keeps_the_memory_busy_at_one_row(capability: int) -> None:
    """Little's law: two programs' tiles are at least bandwidth times latency."""
    card = CARDS[capability]
    needed = card.bandwidth_gb_s * 1e9 * tuning.LATENCY_S / card.multiprocessors
    for weight_type, size in WEIGHT_TYPES.items():
        tile = default_tile(Launch("layer_norm_linear", capability, 1, 28672, 4096, weight_type))
        assert 2 * tile.block_n * tile.block_k * size >= needed
        assert tile.chunks(28672) >= card.multiprocessors


@pytest.mark.parametrize(
    ("k", "block_k", "split_k"),
    [(4096, 4096, 1), (2560, 4096, 1), (20480, 4096, 5), (5120, 1024, 5), (6144, 2048, 3)],
)
def test_the_splits_of_a_default_are_of_one_length(k: int, block_k: int, split_k: int) -> None:
    """5,120 features as 4,096 and 1,024 would leave half of the programs idle."""
    tile = default_tile(Launch("gelu_linear_residual", 75, 1, 4096, k, "fp16"))
    assert (tile.block_k, tile.split_k) == (block_k, split_k)


def test_many_rows_wait_in_shared_memory_only_where_there_are_asynchronous_copies() -> None:
    for capability in CARDS:
        for rows in range(1, 9):
            tile = default_tile(Launch("layer_norm_linear", capability, rows, 28672, 4096, "fp16"))
            assert tile.num_stages == (3 if capability >= 80 and rows > 2 else 2)
