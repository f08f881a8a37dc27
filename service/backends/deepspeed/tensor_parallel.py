"""One model over several GPUs: rank 0 serves, the other ranks repeat every step it takes.

DeepSpeed slices heads and MLP and sums their results inside the blocks, so all ranks must run the
same blocks on the same tokens. Rank 0 announces each step before it takes it; a follower waits for
announcements and obeys. They travel over a gloo group of their own as int64 tensors, in host
memory: no pickle, and nothing on the cards' streams.

Started by torch's launcher (or DeepSpeed's), one process a GPU:

    torchrun --nproc-per-node 2 -m gptjet.service.cli serve --backend deepspeed --model ...

A step that fails on one rank alone leaves the others inside a collective. The launcher then ends
the job once NCCL's watchdog has; nothing here tries to mend it.
"""

from __future__ import annotations

import atexit
import enum
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

if TYPE_CHECKING:
    from gptjet.service.backends.deepspeed.injected_model import InjectedModel

logger = logging.getLogger(__name__)

# A follower of an idle server waits here; a leader that dies closes its connections, which wakes
# it.
_WAIT = timedelta(days=3650)
_LEADER = 0


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among those that share the model."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_leader(self) -> bool:
        """Rank 0 serves."""
        return self.rank == _LEADER


def ranks_from_environment(environment: Mapping[str, str] | None = None) -> Ranks:
    """What the launcher said (RANK, LOCAL_RANK, WORLD_SIZE); one process where there is none."""
    env = os.environ if environment is None else environment
    size = int(env.get("WORLD_SIZE", "1"))
    if size < 2:
        return Ranks()
    return Ranks(int(env["RANK"]), int(env.get("LOCAL_RANK", env["RANK"])), size)


class _Step(enum.IntEnum):
    """What rank 0 is about to do."""

    PREPARE = 0
    FORWARD = 1
    RESET = 2
    CLOSE = 3


class Announcer:
    """Rank 0's side. InjectedModel calls the method of the step it takes next."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def prepare(self, batch_size: int) -> None:
        """A workspace for `batch_size` rows, and a clean counter."""
        self._send(_Step.PREPARE, batch_size)

    def forward(
        self,
        token_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> None:
        """The blocks over token_ids: [B, L], with a mask [B, T] and positions [B, L] or without."""
        batch_size, length = token_ids.shape
        width = 0 if attention_mask is None else attention_mask.shape[1]
        self._send(_Step.FORWARD, batch_size, length, width, int(positions is not None))
        for tensor in (token_ids, attention_mask, positions):
            if tensor is not None:
                distributed.broadcast(tensor.cpu().contiguous(), _LEADER, group=self._group)

    def reset(self) -> None:
        """The counter back to its start."""
        self._send(_Step.RESET)

    def close(self) -> None:
        """The end: followers leave their loop."""
        self._send(_Step.CLOSE)

    def _send(self, step: _Step, *arguments: int) -> None:
        header = torch.zeros(5, dtype=torch.int64)
        header[: 1 + len(arguments)] = torch.tensor([step, *arguments])
        distributed.broadcast(header, _LEADER, group=self._group)


def open_announcements() -> Any:
    """The group that announcements travel over. Every rank calls it, once DeepSpeed has joined
    them.

    The process leaves all groups when it exits. Left to the interpreter's end, gloo's threads ask
    for the interpreter's lock when it is gone, which aborts the process now and then.
    """
    group = distributed.new_group(backend="gloo", timeout=_WAIT)
    atexit.register(_leave_groups)
    return group


def _leave_groups() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


@torch.inference_mode()
def follow(model: InjectedModel, group: Any) -> None:
    """Repeat rank 0's steps until it closes the model.

    Raises RuntimeError where rank 0 has gone without a word.
    """
    header = torch.zeros(5, dtype=torch.int64)
    while True:
        distributed.broadcast(header, _LEADER, group=group)
        step, batch_size, length, width, has_positions = header.tolist()
        if step == _Step.CLOSE:
            model.close()
            return
        if step == _Step.PREPARE:
            model.prepare_workspace(batch_size)
        elif step == _Step.RESET:
            model.reset()
        else:
            shape = (batch_size, length)
            token_ids = _receive(group, shape)
            mask = _receive(group, (batch_size, width)) if width else None
            positions = _receive(group, shape) if has_positions else None
            _repeat_forward(model, token_ids, mask, positions)


def _repeat_forward(
    model: InjectedModel,
    token_ids: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> None:
    device = model.device
    try:
        model.forward(
            token_ids.to(device),
            None if mask is None else mask.to(device),
            None if positions is None else positions.to(device),
        )
    except RuntimeError:
        # rank 0 fails the request and announces what comes next; dying here would end the server
        logger.exception("a step failed on a follower")
        model.distrust_workspace()


def _receive(group: Any, shape: tuple[int, int]) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=torch.int64)
    distributed.broadcast(tensor, _LEADER, group=group)
    return tensor
