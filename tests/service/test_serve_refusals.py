"""`gptjet serve` on a checkpoint it cannot serve: one clear line, exit code 2, no traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SERVE = [sys.executable, "-c", "from gptjet.service.cli import main; main()", "serve"]
SERVE += ["--backend", "huggingface", "--device", "cpu", "--port", "0", "--model"]


def test_unusable_checkpoints_are_one_line_and_exit_code_2(
    make_gptj_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    good = make_gptj_checkpoint()
    missing = tmp_path / "missing"
    truncated = Path(shutil.copytree(good, tmp_path / "truncated"))
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    wrong = Path(shutil.copytree(good, tmp_path / "wrong"))
    config = json.loads((wrong / "config.json").read_text())
    config |= {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    (wrong / "config.json").write_text(json.dumps(config))
    expected = {
        missing: f"there is no folder {missing}",
        truncated: f"{weights} is truncated: its header describes",
        wrong: "architecture BertForMaskedLM is not a causal language model",
    }
    # Side by side: most of their time is imports.
    servers = {
        folder: subprocess.Popen(
            [*SERVE, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for folder in expected
    }
    try:
        for folder, server in servers.items():
            output, _ = server.communicate(timeout=120)
            assert server.returncode == 2, output
            assert "Traceback" not in output
            naming = [line for line in output.splitlines() if expected[folder] in line]
            assert len(naming) == 1, output
    finally:
        for server in servers.values():
            server.kill()
            server.wait()
