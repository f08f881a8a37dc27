"""Two processes, one model: gloo here where NCCL is on a machine with GPUs."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptjet.service.backends.deepspeed.tensor_parallel import Ranks, ranks_from_environment
from gptjet.service.commands import loading
from gptjet.service.config import ServerConfig

_RANK_PROGRAM = Path(__file__).with_name("tensor_parallel_rank.py")


def free_port() -> int:
    """One that the kernel gives to nobody who asks for any: rank 0 takes it only seconds later."""
    given = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()
    first, last = map(int, given)
    for port in random.sample([*range(10_000, first), *range(last + 1, 65_536)], 50):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"no free port outside {first} to {last}")


def start_rank(rank: int, port: int, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(_RANK_PROGRAM), str(folder)],
        env=os.environ
        | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_ranks_pass_the_gate_and_serve_transformers_own_tokens(
    make_gptj_checkpoint: Callable[..., Path], greedy_reference: Any
) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_gptj_checkpoint(head_dim=16, n_head=4, n_layer=2, rotary_dim=8, n_positions=64)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    expected = [greedy_reference(reference, p, 12)[0] for p in ([1, 2, 3, 4, 5], [200, 7])]
    port = free_port()
    ranks = [start_rank(rank, port, folder) for rank in (0, 1)]
    try:
        outputs = [rank.communicate(timeout=280) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    result = json.loads(outputs[0][0].splitlines()[-1])
    assert result["streams"] == expected
    assert result["batch"] == expected
    assert result["parity"] == "passed"
    assert result["heads"] == 2  # each rank has half of the four
    assert result["device"] == "cpu and 1 more"
    assert outputs[1][0].splitlines()[-1] == "followed to the end"


def test_launchers_variables_say_which_rank_this_is() -> None:
    assert ranks_from_environment({}) == Ranks() == Ranks(0, 0, 1)
    assert ranks_from_environment({"WORLD_SIZE": "1", "RANK": "0"}) == Ranks()
    env = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    assert ranks_from_environment(env) == Ranks(1, 1, 2)
    assert not ranks_from_environment(env).is_leader


def test_serve_follows_on_every_rank_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed = ServerConfig(backend="deepspeed")
    assert not loading.follows(deepspeed)
    monkeypatch.setenv("RANK", "1")
    assert loading.follows(deepspeed)
    assert not loading.follows(ServerConfig(backend="huggingface"))
    assert torch.distributed.is_available()
