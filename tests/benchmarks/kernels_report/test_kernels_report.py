"""The compile report: what fits on a multiprocessor, what the assembler's output says, and what a
compiler that hangs, dies or fails becomes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gptjet.benchmarks.kernels_report.collect import (
    CollectError,
    Compiled,
    Worker,
    collect,
    list_jobs,
)
from gptjet.benchmarks.kernels_report.limits import LIMITS, occupancy
from gptjet.benchmarks.kernels_report.machine_code import (
    LoadsInFlight,
    MachineCodeError,
    Usage,
    loads_in_flight,
    matrix_instructions,
    parse_usage,
)
from gptjet.benchmarks.kernels_report.report import in_flight_bytes, markdown, problems
from gptjet.kernels.gpu.compile_case import CAPABILITIES

CLEAN = Compiled(
    module="a",
    name="fp16 rows 1",
    capability=75,
    num_warps=8,
    programs=160,
    bytes_moved=105,
    bytes_minimum=100,
    registers=80,
    shared=8192,
    wide_loads_in_flight=4,
    bytes_in_flight=64,
)


@pytest.mark.parametrize(
    ("capability", "num_warps", "registers", "shared", "blocks", "limit"),
    [
        # 64 registers x 32 lanes = 2048 a warp: 32 warps; T4 holds 32 warps in all.
        pytest.param(75, 8, 64, 0, 4, "warps", id="T4 by warps"),
        # 80 x 32 = 2560: 25 warps, 24 in fours: 3 programs of 8.
        pytest.param(75, 8, 80, 0, 3, "registers", id="T4 by registers"),
        pytest.param(75, 4, 32, 20000, 3, "shared memory", id="T4 by shared memory"),
        pytest.param(75, 1, 32, 0, 16, "blocks", id="T4 by blocks"),
        # 168 x 32 = 5376: 12 warps.
        pytest.param(90, 8, 168, 0, 1, "registers", id="H100 by registers"),
        # A block's 1 KiB for the system: 228 / (75 + 1) = 3.
        pytest.param(90, 4, 32, 75 * 1024, 3, "shared memory", id="H100, the system's share"),
        pytest.param(90, 32, 255, 0, 0, "registers", id="does not fit at all"),
    ],
)
def test_occupancy_is_that_of_the_occupancy_calculator(
    capability: int, num_warps: int, registers: int, shared: int, blocks: int, limit: str
) -> None:
    found = occupancy(capability, num_warps, registers, shared)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.warps == blocks * num_warps
    assert found.share == blocks * num_warps / LIMITS[capability].warps


def test_every_capability_that_is_compiled_for_has_limits() -> None:
    assert set(LIMITS) == set(CAPABILITIES)


def test_resource_usage_is_read_from_cuobjdump() -> None:
    text = "Resource usage:\n Common:\n  GLOBAL:0\n Function k:\n  REG:64 STACK:16 SHARED:0 LOCAL:8"
    assert parse_usage(text) == Usage(64, 16, 8)
    with pytest.raises(MachineCodeError, match="no resource usage"):
        parse_usage("cuobjdump: error")


def sass(*lines: str) -> str:
    return "\n".join(
        line if line.startswith(".L") else f"        /*{16 * index:04x}*/    {line} ;"
        for index, line in enumerate(lines)
    )


def test_loads_wait_until_one_of_their_registers_is_read() -> None:
    code = sass(
        "LDG.E.128.SYS R4, [R2]",
        "@!P0 LDG.E.EF.128.SYS R8, [R2+0x10]",
        "@P1 LDG.E.64 R12, desc[UR4][R2.64]",
        # Reads the third register of the second load, which waits for the first one too.
        "FADD R20, R10, R21",
        "LDG.E.U16 R16, [R2]",
        "LDG.E.128 R24, [R2]",
    )
    assert loads_in_flight(code) == LoadsInFlight(wide=2, num_bytes=40)


def test_where_there_is_a_loop_only_its_loads_count() -> None:
    before = [f"LDG.E.128 R{4 * index}, [R90]" for index in range(1, 9)]
    read = [f"FADD R80, R80, R{4 * index}" for index in range(1, 9)]
    code = sass(
        *before,
        *read,
        ".L_x_0:",
        "LDG.E.128 R4, [R90]",
        "LDG.E.128 R8, [R90]",
        "FADD R80, R80, R4",
        "FADD R80, R80, R8",
        "@P0 BRA `(.L_x_0)",
        "EXIT",
        ".L_x_1:",
        "BRA `(.L_x_1)",
    )
    assert loads_in_flight(code) == LoadsInFlight(wide=2, num_bytes=32)


def test_copies_to_shared_memory_wait_in_groups() -> None:
    code = sass(
        "LDGSTS.E.BYPASS.128 [R1], [R2.64]",
        "LDGDEPBAR",
        "LDGSTS.E.BYPASS.128 [R1+0x10], [R2.64]",
        "LDGDEPBAR",
        "DEPBAR.LE SB0, 0x1",
        "LDGSTS.E.BYPASS.128 [R1+0x20], [R2.64]",
    )
    assert loads_in_flight(code) == LoadsInFlight(wide=2, num_bytes=32)


def test_a_clean_kernel_has_no_problems() -> None:
    assert problems([CLEAN]) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"stack": 8}, "spills 8 bytes a thread", id="stack"),
        pytest.param({"has_dot": True}, "a tl.dot, which sm_75 computes on the stack", id="dot"),
        pytest.param({"shared": 65537}, "65537 bytes of shared memory, limit 65536", id="T4"),
        pytest.param({"capability": 70, "shared": 98305}, "limit 98304", id="V100"),
        pytest.param({"capability": 80, "shared": 166913}, "limit 166912", id="A100"),
        # It compiled cleanly for sm_86 once.
        pytest.param({"capability": 86, "shared": 147456}, "limit 101376", id="A10"),
        pytest.param({"capability": 90, "shared": 232449}, "limit 232448", id="H100"),
        pytest.param({"num_warps": 32, "registers": 96}, "96 registers x 32 warps", id="registers"),
        pytest.param({"error": "killed by signal 6"}, "killed by signal 6", id="died"),
    ],
)
def test_what_a_card_would_not_run_is_named(changes: dict[str, object], message: str) -> None:
    (line,) = problems([CLEAN, replace(CLEAN, **changes)])  # type: ignore[arg-type]
    assert line.startswith("a: fp16 rows 1 on sm_")
    assert message in line


def test_a_dot_is_no_problem_from_sm_80_on_if_it_is_on_the_matrix_units() -> None:
    dot = replace(CLEAN, capability=80, has_dot=True)
    assert problems([replace(dot, matrix_instructions="16 HMMA")]) == []
    (line,) = problems([dot])
    assert line.endswith("on sm_80: a tl.dot, and no instruction of the matrix units")
    assert "| 16 HMMA |" in markdown([replace(dot, matrix_instructions="16 HMMA")])


def test_instructions_of_the_matrix_units_are_counted_in_the_loop() -> None:
    before = ("HMMA.16816.F32 R4, R8, R2, R4",)
    assert matrix_instructions(sass(*before, "HGMMA.64x16x16.F32 R24, gdesc[UR4]")) == (
        "1 HMMA, 1 HGMMA"
    )
    assert matrix_instructions(sass("IMAD R1, R2, R3, R4")) == ""
    loop = sass(*before, "HMMA.16816.F32 R4, R8, R2, R4", "HMMA.16816.F32 R4, R8, R2, R4")
    code = loop.splitlines()
    code.insert(1, ".L_x_1:")
    code.append("        /*0100*/              @P0 BRA `(.L_x_1) ;")
    assert matrix_instructions("\n".join(code)) == "2 HMMA"


def test_bytes_in_flight_are_those_of_the_resident_programs() -> None:
    """3 programs by registers, 4 a multiprocessor in the grid: 3 x 256 threads x 64 bytes."""
    assert in_flight_bytes(CLEAN) == 3 * 256 * 64
    assert in_flight_bytes(replace(CLEAN, programs=40)) == 256 * 64


def test_the_table_has_a_line_for_each_case_and_names_the_problems() -> None:
    text = markdown([CLEAN, replace(CLEAN, capability=90, error="it broke")])
    row = "| fp16 rows 1 | sm_75 T4 | 160 | 8 | 80 | 8192 | 0 | 24 of 32 (registers) | 4 | 48.0 |"
    assert row in text
    assert "| 1.050 |" in text
    assert "| fp16 rows 1 | sm_90 H100 | 160 | 8 | - |" in text
    assert "- a: fp16 rows 1 on sm_90: it broke" in text


JOB = {
    "module": "a",
    "name": "n",
    "capability": 75,
    "key": "k",
    "num_warps": 4,
    "programs": 1,
    "bytes_moved": 1,
    "bytes_minimum": 1,
}
RESULT = {
    "registers": 40,
    "stack": 0,
    "shared": 0,
    "wide_loads_in_flight": 1,
    "bytes_in_flight": 16,
    "has_dot": False,
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("capability", "name"), [(80, "HMMA"), (90, "HGMMA")])
def test_the_dot_kernel_is_on_the_matrix_units(capability: int, name: str, tmp_path: Path) -> None:
    """INT4 at 16 rows, of which every weight is a factor once it is unpacked in registers."""
    worker = Worker()
    try:
        jobs = list_jobs(worker, 300)
    finally:
        worker.close()
    of_dot = [job for job in jobs if job["module"] == "dot_linear"]
    assert {job["capability"] for job in of_dot} == {80, 86, 90}
    (job,) = (
        job
        for job in of_dot
        if (job["name"], job["capability"]) == ("w_in int4 rows 16", capability)
    )
    (made,) = collect([job], tmp_path / "cache", num_workers=1, timeout_s=300)
    assert problems([made]) == []
    assert made.has_dot
    assert made.matrix_instructions.endswith(f" {name}")


def fake(body: str) -> tuple[str, ...]:
    """A worker that runs `body` for each line that it is given."""
    loop = f"import json, os, sys, time\nfor line in sys.stdin:\n    job = json.loads(line)\n{body}"
    return (sys.executable, "-c", loop)


GOOD = f"    print(json.dumps({{'result': {RESULT!r}}}), flush=True)\n"


def test_a_result_is_kept_by_content_and_an_error_is_not(tmp_path: Path) -> None:
    arguments = {"num_workers": 2, "timeout_s": 30.0}
    failing = fake("    print(json.dumps({'error': 'no'}), flush=True)\n")
    (failed,) = collect([JOB], tmp_path, command=failing, **arguments)  # type: ignore[arg-type]
    assert failed.error == "no"
    (made,) = collect([JOB], tmp_path, command=fake(GOOD), **arguments)  # type: ignore[arg-type]
    assert (made.error, made.registers) == (None, 40)
    (held,) = collect([JOB], tmp_path, command=failing, **arguments)  # type: ignore[arg-type]
    assert held == made
    other = {**JOB, "key": "other"}
    (again,) = collect([other], tmp_path, command=failing, **arguments)  # type: ignore[arg-type]
    assert again.error == "no"


def test_a_broken_file_in_the_cache_is_compiled_again(tmp_path: Path) -> None:
    (tmp_path / "k.json").write_text('{"registers": 1', encoding="utf-8")
    (made,) = collect([JOB], tmp_path, num_workers=1, timeout_s=30, command=fake(GOOD))
    assert made.registers == 40
    assert json.loads((tmp_path / "k.json").read_text(encoding="utf-8")) == RESULT


def test_a_compiler_that_hangs_is_ended_and_the_next_case_is_compiled(tmp_path: Path) -> None:
    hang = "    if job['name'] == 'n': time.sleep(600)\n" + GOOD
    jobs = [JOB, {**JOB, "name": "m", "key": "m"}]
    started = time.monotonic()
    hung, good = collect(jobs, tmp_path, num_workers=1, timeout_s=5.0, command=fake(hang))
    assert hung.error == "the compiler took more than 5 s"
    assert good.error is None
    assert time.monotonic() - started < 60


def test_a_compiler_that_dies_is_reported_and_the_next_case_is_compiled(tmp_path: Path) -> None:
    dies = "    if job['name'] == 'n': os.abort()\n    if job['name'] == 'o': sys.exit(3)\n" + GOOD
    jobs = [{**JOB, "name": name, "key": name} for name in "nom"]
    first, second, third = collect(jobs, tmp_path, num_workers=1, timeout_s=30, command=fake(dies))
    assert first.error == "killed by signal 6"
    assert second.error == "the compiler died: exit code 3"
    assert third.error is None


def test_kernels_that_cannot_be_listed_say_why() -> None:
    worker = Worker(fake("    print(json.dumps({'error': 'SyntaxError: x'}), flush=True)\n"))
    with pytest.raises(CollectError, match="cannot be listed: SyntaxError: x"):
        list_jobs(worker, 30)
    worker.close()


@pytest.mark.timeout(600)
def test_a_spilling_kernel_and_a_dot_on_t4_fail_the_check(tmp_path: Path) -> None:
    """The real compiler on a planted module: 64 x 64 products on the FMA units keep a stack."""
    planted = tmp_path / "gptjet_planted_kernels.py"
    planted.write_text(
        "import triton, triton.language as tl\n"
        "from gptjet.kernels.gpu.compile_case import CompileCase\n"
        "@triton.jit\n"
        "def _kernel(x_ptr, out_ptr):\n"
        "    i = tl.arange(0, 64)\n"
        "    x = tl.load(x_ptr + i[:, None] * 64 + i[None, :])\n"
        "    tl.store(out_ptr + i[:, None] * 64 + i[None, :], tl.dot(x, x))\n"
        "def compile_cases():\n"
        "    signature = {'x_ptr': '*fp16', 'out_ptr': '*fp32'}\n"
        "    return (CompileCase('dot', _kernel, signature, {}, 1, 1, 1, 1),)\n",
        encoding="utf-8",
    )
    script = (
        "import sys, gptjet_planted_kernels as planted\n"
        "sys.modules['gptjet.kernels.gpu.planted'] = planted\n"
        "from gptjet.benchmarks.kernels_report import worker\n"
        "worker.main()\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    command = ("/usr/bin/env", f"PYTHONPATH={path}", f"TRITON_CACHE_DIR={tmp_path}/cache")
    job = {**JOB, "module": "planted", "name": "dot"}
    (made,) = collect(
        [job],
        tmp_path / "results",
        num_workers=1,
        timeout_s=300,
        command=(*command, sys.executable, "-c", script),
    )
    assert made.error is None
    assert made.has_dot
    assert made.stack > 0
    assert len(problems([made])) == 2


@pytest.mark.timeout(600)
def test_the_kernels_of_the_tree_are_listed_and_a_real_one_is_clean(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    worker = Worker()
    try:
        jobs = list_jobs(worker, 300)
    finally:
        worker.close()
    for module in {job["module"] for job in jobs}:
        archs = {job["capability"] for job in jobs if job["module"] == module}
        assert 90 in archs
    assert len({job["key"] for job in jobs}) == len(jobs)
    job = next(job for job in jobs if (job["name"], job["capability"]) == ("w_in fp16 rows 1", 75))
    (made,) = collect([job], tmp_path / "cache", num_workers=1, timeout_s=300)
    assert problems([made]) == []
    assert made.registers > 0
    assert made.wide_loads_in_flight > 0
    done = subprocess.run(
        [sys.executable, "-m", "gptjet.benchmarks.kernels_report", "--capability", "60"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert "invalid choice" in done.stderr
