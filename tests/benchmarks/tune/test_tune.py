"""The search with a timer whose best tile is known, the table, and the command without a card."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from gptjet.benchmarks.tune import table
from gptjet.benchmarks.tune.__main__ import main
from gptjet.benchmarks.tune.card import LaunchTensors
from gptjet.benchmarks.tune.search import (
    RefusedTileError,
    is_sensible,
    launches,
    search,
    steps,
)
from gptjet.kernels.gpu.gemv_launch import Workspace, workspace_needs
from gptjet.kernels.gpu.tuning import (
    MODELLED,
    TABLE_PATH,
    Entry,
    Launch,
    Tile,
    TuningError,
    default_tile,
    read_table,
)

LAUNCH = Launch("layer_norm_linear", 75, 1, 28672, 4096, "fp16")
SMALL = ["--kernel", "layer_norm_linear", "--weight-type", "fp16", "--rows", "1"]


class FakeCard:
    """Fastest at 16 warps, 4 outputs, one stage and 2 programs a multiprocessor."""

    name = "Fake T4"
    capability = 75

    def __init__(self, refused: int | None = None) -> None:
        self.refused = refused
        self.timed: list[Tile] = []

    def prepare(self, launch: Launch) -> None:
        self.launch = launch

    def seconds(self, launch: Launch, tile: Tile) -> float:
        assert launch == self.launch
        assert tile not in self.timed, "a tile is timed once"
        self.timed.append(tile)
        if self.refused in (tile.num_warps, -1):
            raise RefusedTileError("differs from the reference by 1, limit 0.001")
        programs = tile.chunks(launch.n) * tile.split_k
        away = (
            abs(math.log2(tile.num_warps / 16))
            + abs(math.log2(tile.block_n / 4))
            + abs(tile.num_stages - 1)
            + abs(math.log2(programs / 80))
            + abs(math.log2(tile.block_k / 4096))
        )
        return 1e-4 * (1 + away)


def test_the_search_finds_the_best_tile_a_step_at_a_time() -> None:
    found = search(LAUNCH, FakeCard())
    assert (found.tile.num_warps, found.tile.block_n, found.tile.num_stages) == (16, 4, 1)
    assert found.tile.chunks(LAUNCH.n) * found.tile.split_k == 80
    assert found.default_seconds is not None
    assert found.seconds < found.default_seconds


def test_a_tile_whose_result_is_wrong_is_never_chosen() -> None:
    notes: list[str] = []
    card = FakeCard(refused=16)
    found = search(LAUNCH, card, notes.append)
    assert found.tile.num_warps == 8
    assert found.refused == len(notes) > 0
    assert "differs from the reference" in notes[0]


def test_a_launch_without_a_single_tile_that_works_is_an_error() -> None:
    with pytest.raises(TuningError, match="no tile of Launch"):
        search(LAUNCH, FakeCard(refused=-1))


DOT = Launch("dot_linear", 80, 64, 4096, 20480, "int4")


class FakeA100(FakeCard):
    """Fastest in tiles of 32 rows by 64 outputs by 64 features, two splits, four stages."""

    name = "Fake A100"
    capability = 80

    def seconds(self, launch: Launch, tile: Tile) -> float:
        values = {"block_m": 32, "block_n": 64, "block_k": 64, "split_k": 2, "num_stages": 4}
        away = sum(abs(math.log2(getattr(tile, name) / best)) for name, best in values.items())
        return 1e-4 * (1 + away)


def test_the_search_finds_the_best_tile_of_dot_linear() -> None:
    found = search(DOT, FakeA100())
    assert found.tile == Tile(64, 64, found.tile.num_warps, 4, 2, 160, block_m=32)
    assert all(tile.block_m for tile in steps_of(DOT))


def steps_of(launch: Launch) -> list[Tile]:
    return [tile for _, tiles in steps(launch, default_tile(launch)) for tile in tiles]


def test_tiles_of_dot_linear_are_only_tried_where_shared_memory_holds_them() -> None:
    """99 KiB on an A10: three stages of 128 rows and 128 outputs by 128 features need 120."""
    wide = Tile(128, 128, 8, 3, 1, 160, block_m=128)
    for capability, is_one in ((80, True), (86, False), (90, True)):
        launch = Launch("dot_linear", capability, 128, 4096, 20480, "int4")
        assert is_sensible(launch, wide) == is_one
    launch = Launch("dot_linear", 90, 128, 4096, 20480, "int4")
    assert not is_sensible(launch, Tile(64, 256, 8, 2, 1, 80, block_m=16)), "two groups of INT4"
    assert not is_sensible(launch, Tile(64, 64, 8, 2, 1, 320, block_m=256)), "half of it no rows"


def test_dot_linear_is_tuned_from_sm_80_on() -> None:
    for capability in (70, 75, 80, 86, 90):
        kernels = {launch.kernel for launch in launches(capability)}
        assert ("dot_linear" in kernels) == (capability >= 80)


def test_the_tiles_of_dot_linear_are_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "tuning.toml"
    flags = ["--output", str(path), "--kernel", "dot_linear", "--weight-type", "int4"]
    assert main([*flags, "--rows", "64"], FakeA100()) == 0
    entries = read_table(path)
    assert len(entries) == 3
    assert {entry.tile.block_m for entry in entries} == {32}
    assert "block_m = 32" in path.read_text(encoding="utf-8")
    table.update(path, table.modelled(launches(75)))
    assert path.read_text(encoding="utf-8").count("block_m") == 3


def test_noise_is_no_gain() -> None:
    class Noisy(FakeCard):
        def seconds(self, launch: Launch, tile: Tile) -> float:
            self.timed.append(tile)
            return 1e-4 * (1 - 1e-5 * len(self.timed))

    assert search(LAUNCH, Noisy()).tile == default_tile(LAUNCH)


def test_every_step_is_a_tile_that_covers_the_launch() -> None:
    for capability in (70, 75, 80, 86, 90):
        for launch in launches(capability):
            start = default_tile(launch)
            assert is_sensible(launch, start), launch
            for _, tiles in steps(launch, start):
                for tile in tiles:
                    tile.require_features(launch.k)
                    assert tile != start
                    assert tile.num_stages <= 2 or capability >= 80


def test_the_written_table_is_read_as_the_same_entries(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tuning.toml"
    first = table.modelled(launches(75))
    table.update(path, first)
    assert set(read_table(path)) == set(first)
    tuned = table.measured(LAUNCH, Tile(2, 2048, 4, 1, 2, 9, 16), 'a "T4"')
    table.update(path, [tuned])
    entries = read_table(path)
    assert len(entries) == len(first)
    assert [entry for entry in entries if entry.source != MODELLED] == [tuned]
    assert list(path.parent.iterdir()) == [path], "no unfinished file is left"


def test_a_table_that_cannot_be_read_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "tuning.toml"
    path.write_text("tiles = 1\n", encoding="utf-8")
    assert main(["--output", str(path), *SMALL], FakeCard()) == 2
    assert path.read_text(encoding="utf-8") == "tiles = 1\n"


def test_the_committed_table_is_as_the_command_writes_it() -> None:
    assert TABLE_PATH.read_text(encoding="utf-8") == table.render(read_table(TABLE_PATH))


def test_the_command_writes_what_it_measured_with_the_card_as_its_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tuning.toml"
    assert main(["--output", str(path), *SMALL], FakeCard()) == 0
    entries = read_table(path)
    assert {entry.source for entry in entries} == {"measured on Fake T4"}
    assert {(entry.launch.n, entry.launch.k) for entry in entries} == {(28672, 4096), (50400, 4096)}
    assert {entry.tile.num_warps for entry in entries} == {16}
    assert "GB/s" in capsys.readouterr().err


def test_a_launch_that_fails_leaves_the_others_written(tmp_path: Path) -> None:
    class Half(FakeCard):
        def seconds(self, launch: Launch, tile: Tile) -> float:
            if launch.n == 28672:
                raise RefusedTileError("no")
            return super().seconds(launch, tile)

    path = tmp_path / "tuning.toml"
    assert main(["--output", str(path), *SMALL], Half()) == 1
    assert [entry.launch.n for entry in read_table(path)] == [50400]


def test_the_modelled_tiles_are_written_as_modelled(tmp_path: Path) -> None:
    path = tmp_path / "tuning.toml"
    assert main(["--modelled", "70", "--modelled", "75", "--output", str(path)]) == 0
    entries = read_table(path)
    assert {entry.source for entry in entries} == {MODELLED}
    assert {entry.launch.capability for entry in entries} == {70, 75}
    assert Entry(LAUNCH, default_tile(LAUNCH), MODELLED) in entries


def test_a_dry_run_prints_the_space_without_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--capability", "90", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "layer_norm_linear [28672, 4096] fp16 rows 1 on sm_90, from Tile(" in out
    assert "num_stages: 3 more" in out
    assert "2 launches" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
def test_without_a_card_the_command_says_so_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tuning.toml"
    assert main(["--output", str(path)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert message.startswith("tuning needs a card: there is no CUDA device. --dry-run shows")
    assert not path.exists()


@pytest.mark.parametrize("weight_type", ["fp16", "int8", "int4"])
@pytest.mark.parametrize(("kernel", "n"), [("layer_norm_linear", 6), ("gelu_linear_residual", 64)])
def test_a_tile_is_checked_with_the_real_kernels(kernel: str, n: int, weight_type: str) -> None:
    """On the CPU, through the interpreter; then against a weight that is not the one expected."""
    launch = Launch(kernel, 75, 2, n, 128, weight_type)
    tensors = LaunchTensors(launch, torch.device("cpu"), working_set_bytes=1)
    assert len(tensors.weights) == 1
    tile = Tile(32, 128, 4, 2, 1)
    workspace = Workspace.allocate("cpu", 1, 1)
    tensors.check(tile, workspace)
    tensors.weights[0] = tensors._weight()
    with pytest.raises(RefusedTileError, match="differs from the reference by"):
        tensors.check(tile, workspace)


@pytest.mark.parametrize("weight_type", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("n", [33, 150])
def test_a_tile_of_dot_linear_is_checked_with_the_real_kernel(n: int, weight_type: str) -> None:
    """Added to the residual stream, where there are more features than outputs, or not."""
    launch = Launch("dot_linear", 80, 9, n, 128, weight_type)
    tensors = LaunchTensors(launch, torch.device("cpu"), working_set_bytes=1)
    tile = Tile(64, 64, 4, 3, 2, 1, block_m=16)
    workspace = Workspace.allocate("cpu", *workspace_needs(9, n, tile))
    tensors.check(tile, workspace)
    tensors.weights[0] = tensors._weight()
    with pytest.raises(RefusedTileError, match="differs from the reference by"):
        tensors.check(tile, workspace)
