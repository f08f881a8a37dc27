"""The choice of a route with a timer whose times are known, the file, and the real ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptjet.benchmarks.gpu_evidence.kernel_cases import TINY
from gptjet.benchmarks.tune import route_table
from gptjet.benchmarks.tune.__main__ import main
from gptjet.benchmarks.tune.route_card import PassTensors
from gptjet.benchmarks.tune.route_search import (
    LADDER,
    RouteCard,
    choose_route,
    search_route,
    ways_of,
)
from gptjet.benchmarks.tune.search import RefusedTileError
from gptjet.kernels.gpu.routes import ROUTES_PATH, Route, Way, read_routes
from gptjet.kernels.gpu.tuning import TuningError


class FakeCard:
    """GEMV takes 10 us for eight rows; dot_linear 15 us, and a tenth more a row beyond 64; cuBLAS
    50 us for any."""

    name = "Fake H100"

    def __init__(self, capability: int = 90, refused: tuple[Way, ...] = ()) -> None:
        self.capability = capability
        self.refused = refused
        self.timed: list[tuple[Way, int]] = []

    def prepare_passes(self, weight_type: str) -> None:
        self.weight_type = weight_type

    def pass_seconds(self, way: Way, rows: int) -> float:
        self.timed.append((way, rows))
        if way in self.refused:
            raise RefusedTileError("the first pass differs from the reference by 1, limit 0.1")
        if way == "gemv":
            return 1e-5 * -(-rows // 8)
        if way == "dot":
            return 1.5e-5 * (1 + max(0, rows - 64) / 10)
        return 5e-5


def test_each_number_of_rows_goes_the_fastest_way() -> None:
    card = FakeCard()
    found = search_route("int8", card)
    # 16 rows of GEMV take 20 us. At 96, dot_linear takes 63 us.
    assert found.route == Route(90, "int8", 8, "measured on Fake H100", (9, 64))
    assert sorted(set(card.timed)) == sorted(card.timed), "each is timed once"
    assert set(found.seconds) == set(LADDER)
    assert ("gemv", 512) not in card.timed


def test_below_sm_80_dot_linear_is_neither_timed_nor_chosen() -> None:
    card = FakeCard(capability=75)
    found = search_route("int8", card)
    # 32 rows are 40 us, 48 are 60.
    assert found.route == Route(75, "int8", 32, "measured on Fake H100", None)
    assert "dot" not in {way for way, _ in card.timed}
    assert ways_of(16, 75) == ("cublas", "gemv")


def test_a_way_whose_result_is_wrong_is_never_chosen() -> None:
    notes: list[str] = []
    found = search_route("int4", FakeCard(refused=("dot",)), notes.append)
    assert found.route.dot_rows is None
    assert found.route.max_gemv_rows == 32
    assert len(notes) == len(LADDER)
    assert notes[0].startswith("int4 rows 8 by dot: the first pass differs from the reference")
    with pytest.raises(TuningError, match="cuBLAS gives no time for int4 at 8 rows"):
        search_route("int4", FakeCard(refused=("cublas",)))


def times(**by_way: float) -> dict[Way, float]:
    return {way: by_way[way] for way in ("gemv", "dot", "cublas") if way in by_way}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("seconds", "max_gemv_rows", "dot_rows"),
    [
        pytest.param(
            {16: times(gemv=1, dot=0.99, cublas=2), 32: times(gemv=3, dot=1.99, cublas=2)},
            16,
            None,
            id="noise: GEMV keeps its rows, and cuBLAS those beyond",
        ),
        pytest.param(
            {16: times(gemv=2, dot=3, cublas=1), 32: times(gemv=4, dot=1, cublas=2)},
            8,
            (17, 32),
            id="cuBLAS between",
        ),
        pytest.param(
            {
                16: times(gemv=2, dot=1, cublas=2),
                32: times(gemv=4, dot=1, cublas=2),
                48: times(gemv=6, dot=3, cublas=2),
                64: times(gemv=8, dot=1, cublas=2),
            },
            8,
            (9, 32),
            id="a second run is not taken",
        ),
        pytest.param(
            {16: times(gemv=2, dot=3, cublas=1), 32: times(gemv=1, dot=3, cublas=2)},
            8,
            None,
            id="GEMV again after another way",
        ),
        pytest.param(
            {8: times(gemv=9, dot=1, cublas=2), 16: times(gemv=9, dot=1, cublas=2)},
            8,
            (9, 16),
            id="up to eight rows there is GEMV alone",
        ),
        pytest.param({16: times(cublas=1), 32: times(cublas=1)}, 8, None, id="cuBLAS alone"),
    ],
)
def test_what_is_made_of_times(
    seconds: dict[int, dict[Way, float]], max_gemv_rows: int, dot_rows: tuple[int, int] | None
) -> None:
    route = choose_route("int8", 80, seconds, "measured on X")
    assert (route.max_gemv_rows, route.dot_rows) == (max_gemv_rows, dot_rows)


def test_the_written_routes_are_read_as_the_same_and_the_comment_stays(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "routes.toml"
    held = read_routes(ROUTES_PATH)
    route_table.update(path, held)
    assert set(read_routes(path)) == set(held)
    path.write_text(ROUTES_PATH.read_text(encoding="utf-8"), encoding="utf-8")
    tuned = [
        Route(90, "int8", 8, 'measured on "H100"', (9, 128)),
        Route(80, "int4", 24, "measured on A100"),
    ]
    route_table.update(path, tuned)
    routes = read_routes(path)
    assert [route for route in routes if route.source.startswith("measured")] == [
        tuned[1],
        tuned[0],
    ]
    assert len(routes) == len(held) + 1
    assert path.read_text(encoding="utf-8").startswith("# Which way a pass of so many rows goes.")
    assert list(path.parent.iterdir()) == [path], "no unfinished file is left"


def test_the_committed_routes_are_as_the_command_writes_them() -> None:
    text = ROUTES_PATH.read_text(encoding="utf-8")
    assert text == route_table.render(read_routes(ROUTES_PATH), route_table.header_of(text))


def test_the_command_writes_each_route_with_the_card_as_its_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "routes.toml"
    flags = ["--only", "routes", "--routes-output", str(path)]
    assert main(flags, route_card=FakeCard()) == 0
    routes = read_routes(path)
    assert [route.weight_type for route in routes] == ["float16", "int8", "int4"]
    assert {route.source for route in routes} == {"measured on Fake H100"}
    told = " ".join(capsys.readouterr().err.split())
    assert "rows 32: cublas 50.0 us, gemv 40.0 us, dot 15.0 us: dot" in told
    assert "int4 on sm_90: GEMV up to 8 rows, dot_linear 9 to 64, everything else cuBLAS" in told
    assert main([*flags, "--weight-type", "int8"], route_card=FakeCard(capability=80)) == 0
    assert len(read_routes(path)) == 4


def test_a_weight_type_without_times_leaves_the_others_written(tmp_path: Path) -> None:
    class Half(FakeCard):
        def pass_seconds(self, way: Way, rows: int) -> float:
            if self.weight_type == "int8":
                raise RefusedTileError("no")
            return super().pass_seconds(way, rows)

    path = tmp_path / "routes.toml"
    assert main(["--only", "routes", "--routes-output", str(path)], route_card=Half()) == 1
    assert [route.weight_type for route in read_routes(path)] == ["float16", "int4"]


def test_routes_that_cannot_be_read_are_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "routes.toml"
    path.write_text("[[route]]\ncapability = 80\n", encoding="utf-8")
    assert main(["--only", "routes", "--routes-output", str(path)], route_card=FakeCard()) == 2
    assert path.read_text(encoding="utf-8") == "[[route]]\ncapability = 80\n"
    assert "weight_type is missing" in " ".join(capsys.readouterr().err.split())


def test_what_names_tiles_leaves_routes_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--dry-run", "--capability", "90", "--rows", "8"]) == 0
    assert "route of" not in capsys.readouterr().out
    assert main(["--dry-run", "--capability", "90", "--only", "routes"]) == 0
    out = capsys.readouterr().out
    assert "route of int8 on sm_90" in out
    assert "rows 64: cublas, gemv, dot" in out
    assert "Tile(" not in out
    with pytest.raises(SystemExit):
        main(["--only", "routes", "--rows", "8"])
    assert "--kernel and --rows name tiles" in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
def test_without_a_card_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "routes.toml"
    assert main(["--only", "routes", "--routes-output", str(path)]) == 2
    assert "there is no CUDA device" in " ".join(capsys.readouterr().err.split())
    assert not path.exists()


@pytest.mark.parametrize("weight_type", ["float16", "int8", "int4"])
def test_every_way_is_checked_with_the_real_kernels(weight_type: str) -> None:
    """On the CPU, through the interpreter; then against weights that are not those expected."""
    cpu = torch.device("cpu")
    tensors = PassTensors(weight_type, cpu, working_set_bytes=1, geometry=TINY, most_rows=9)
    assert len(tensors.blocks) == 1
    ways: tuple[Way, ...] = ("cublas", "gemv", "dot")
    for way in ways:
        tensors.check(way, 9)
    other = PassTensors(weight_type, cpu, working_set_bytes=1, geometry=TINY, most_rows=9)
    tensors.blocks[0] = other.blocks[0]
    tensors._added += 1
    for way in ways:
        with pytest.raises(RefusedTileError, match="the second pass differs from the reference"):
            tensors.check(way, 9)


def _is_a_card(card: FakeCard) -> RouteCard:
    """The type checker's proof that the fake is one."""
    return card
