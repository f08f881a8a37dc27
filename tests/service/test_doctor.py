"""`gptjet doctor`: what it concludes and how it says it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from gptjet.kernels.gpu.availability import Toolchain
from gptjet.service import doctor
from gptjet.service.backends.deepspeed.op_build import Obstacle, OpReport, OpState
from gptjet.service.commands import doctor as command
from gptjet.service.doctor import Check, Diagnosis, Health

CARD = Check("gpu", Health.OK, "Tesla T4, sm_75")
NO_CARD = Check("gpu", Health.WARNING, "PyTorch sees no NVIDIA GPU")


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command(name="doctor", help=command.HELP, epilog=command.EXAMPLES)(command.doctor)
    return app


@pytest.mark.parametrize(
    ("state", "gpu", "health"),
    [
        (OpState.PREBUILT, CARD, Health.OK),
        (OpState.JIT, CARD, Health.WARNING),
        (OpState.IMPOSSIBLE, CARD, Health.FAILED),
        (OpState.PREBUILT, NO_CARD, Health.FAILED),
    ],
)
def test_deepspeed_needs_its_op_and_a_card(state: OpState, gpu: Check, health: Health) -> None:
    obstacles = (Obstacle("no C++ compiler", "apt-get install -y g++"),)
    report = OpReport(state, ("fact",), obstacles if state is OpState.IMPOSSIBLE else ())
    check = doctor.check_deepspeed(report, gpu)
    assert check.health is health
    if state is OpState.IMPOSSIBLE:
        assert check.mend == ("apt-get install -y g++  # no C++ compiler",)


def test_report_names_versions_the_op_the_mending_command_and_what_runs(
    app: typer.Typer, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = Check("deepspeed", Health.FAILED, "cannot be had", ("nvcc 11.8",), ("apt-get x",))
    monkeypatch.setattr(
        doctor, "examine", lambda: Diagnosis((doctor.check_packages(), failed), ("huggingface",))
    )
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0  # the doctor did its work; the patient is another matter
    assert "torch 2." in result.output
    assert "failed   deepspeed: cannot be had" in result.output
    assert "mend:  apt-get x" in result.output
    assert "backends that run here: huggingface" in result.output
    parsed = json.loads(CliRunner().invoke(app, ["--json"]).output)
    assert parsed["checks"][1]["mend"] == ["apt-get x"]
    assert parsed["backends"] == ["huggingface"]


def test_machine_without_a_gpu_is_examined_as_it_is(app: typer.Typer) -> None:
    parsed = json.loads(CliRunner().invoke(app, ["--json"]).output)
    names = ["packages", "host", "fused on a CPU", "gpu", "fused on a GPU", "deepspeed"]
    assert [check["name"] for check in parsed["checks"]] == names
    assert parsed["backends"][:2] == ["fused", "huggingface"]


def test_machine_without_a_compiler_is_told_what_it_loses_and_how_to_mend_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CC", "/nonexistent")
    check = doctor.check_kernels()
    assert check.health is Health.WARNING
    assert "PyTorch computes" in check.summary
    assert "CC is '/nonexistent'" in check.summary
    assert "set CC" in check.mend[0]
    monkeypatch.setenv("CC", "/bin/sh")
    assert doctor.check_kernels().health is Health.OK


def test_model_is_compared_with_transformers_in_the_backend_that_auto_chooses(
    app: typer.Typer,
) -> None:
    result = CliRunner().invoke(app, ["--model", "embedded", "--json"])
    assert result.exit_code == 0, result.output
    parity = json.loads(result.stdout)["parity"]
    assert parity["status"] == "passed"
    assert parity["detail"].startswith("auto chose fused; 85 of 85 greedy tokens equal")


def test_model_that_cannot_be_compared_here_is_a_usage_error(
    app: typer.Typer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["--model", "embedded", "--backend", "deepspeed"])
    assert result.exit_code == 2
    assert "--backend huggingface" in result.output


@pytest.fixture
def t4(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card as PyTorch describes one."""
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor.torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(doctor.torch.cuda, "get_device_capability", lambda: (7, 5))


def toolchain(
    *, triton: str | None = "3.6.0", compiler: str | None = "/usr/bin/gcc", cached: int = 0
) -> Toolchain:
    return Toolchain(triton, compiler, True, Path("/cache"), cached)


@pytest.mark.usefixtures("t4")
def test_gpu_kernels_are_shown_with_their_compiler_and_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "inspect_toolchain", lambda: toolchain(cached=7))
    check = doctor.check_gpu_kernels()
    assert (check.name, check.health) == ("fused on a GPU", Health.OK)
    assert check.summary == "Triton 3.6.0 compiles kernels for sm_75 at first use"
    assert check.details == ("7 compiled kernels in /cache",)
    monkeypatch.setattr(doctor, "inspect_toolchain", toolchain)
    _, first_start = doctor.check_gpu_kernels().details
    assert "`gptjet warm-cache --arch sm_75`" in first_start


@pytest.mark.usefixtures("t4")
def test_gpu_kernels_that_cannot_be_built_are_told_with_the_mending_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "inspect_toolchain", lambda: toolchain(compiler=None))
    check = doctor.check_gpu_kernels()
    assert check.health is Health.WARNING
    assert check.summary.startswith("PyTorch computes, at a fraction of the speed: no C compiler")
    assert check.mend[0].startswith("apt-get install -y gcc")
    monkeypatch.setattr(doctor, "inspect_toolchain", lambda: toolchain(compiler=None, cached=3))
    assert "only kernels that are compiled already" in doctor.check_gpu_kernels().summary
    monkeypatch.setattr(doctor, "inspect_toolchain", lambda: toolchain(triton=None, cached=3))
    assert "PyTorch computes" in doctor.check_gpu_kernels().summary


@pytest.mark.usefixtures("t4")
def test_card_too_old_for_the_kernels_is_told_what_computes_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor.torch.cuda, "get_device_capability", lambda: (6, 0))
    check = doctor.check_gpu_kernels()
    assert check.health is Health.WARNING
    assert "sm_60 and the kernels are for sm_70 and newer" in check.summary
