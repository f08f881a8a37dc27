"""`gptjet serve` on a checkpoint it cannot serve: one clear line, exit code 2, no traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gptjet.service.commands.loading import load_model
from gptjet.service.config import ServerConfig
from gptjet.service.rpc.process import serve

SERVE = [sys.executable, "-c", "from gptjet.service.cli import main; main()", "serve"]
SERVE += ["--backend", "huggingface", "--device", "cpu", "--port", "0", "--model"]


@pytest.fixture
def copied(make_gptj_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint that a test may break."""
    return Path(shutil.copytree(make_gptj_checkpoint(), tmp_path / "copied"))


def assert_one_line(code: int | None, log: str, words: str) -> None:
    assert code == 2, log
    assert "Traceback" not in log
    assert len([line for line in log.splitlines() if words in line]) == 1, log


def test_a_truncated_checkpoint_is_one_line_and_exit_code_2(copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    done = subprocess.run(
        [*SERVE, str(copied)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    words = f"{weights} is truncated: its header describes"
    assert_one_line(done.returncode, done.stdout, words)


@pytest.mark.usefixtures("own_logging")
async def test_a_missing_folder_is_one_line_and_exit_code_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing"
    config = ServerConfig(port=0, backend="huggingface", device="cpu", model=str(missing))
    code = await serve(config, loader=load_model)
    assert_one_line(code, capfd.readouterr().err, f"there is no folder {missing}")


@pytest.mark.usefixtures("own_logging")
async def test_another_architecture_is_one_line_and_exit_code_2(
    copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fields = json.loads((copied / "config.json").read_text())
    fields |= {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    (copied / "config.json").write_text(json.dumps(fields))
    config = ServerConfig(port=0, backend="huggingface", device="cpu", model=str(copied))
    code = await serve(config, loader=load_model)
    words = "architecture BertForMaskedLM is not a causal language model"
    assert_one_line(code, capfd.readouterr().err, words)
