"""What transformers has to say before a checkpoint is served, and where it says it.

transformers' models and what they import (compilers, distributed tensors, loss functions) take
170 MiB that a server would hold for as long as it runs. So on a CPU they are imported by a process
of their own, which ends before a weight is loaded here.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, cast

import torch

from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.checkpoint import Checkpoint
from gptjet.service.models.fused.description import Description
from gptjet.service.models.fused.layout import WeightType
from gptjet.service.models.tokenizer import FastParts

if TYPE_CHECKING:
    from gptjet.service.backends.parity import Trace

# Where this is imported already, a process of its own would save nothing.
_MODELS = "transformers.modeling_utils"
_END_S = 10.0


@dataclass(frozen=True, slots=True)
class Groundwork:
    """tokenizer  None where it is one in Python, which is loaded here"""

    description: Description
    tokenizer: FastParts | None


class Reference(Protocol):
    """transformers, here or in another process. See `reference.Reference`."""

    def describe(self) -> Groundwork:
        """What is served, once transformers has found nothing wrong. Raises BackendLoadError."""
        ...

    def record(
        self, weight_type: WeightType, prompts: Sequence[Sequence[int]]
    ) -> dict[str, list[Trace]]:
        """What transformers computes for the probes. Raises BackendLoadError."""
        ...

    def close(self) -> None:
        """Give its memory back."""
        ...


def open_reference(checkpoint: Checkpoint, device: torch.device, num_threads: int) -> Reference:
    """transformers in a process of its own, or in this one where that saves nothing.

    On a GPU it stays here too: a second process would hold a second context on the card.
    """
    if device.type != "cpu" or _MODELS in sys.modules or not sys.executable:
        from gptjet.service.backends.fused import reference

        return reference.Reference(checkpoint, device)
    return ReferenceProcess(checkpoint, num_threads)


class ReferenceProcess:
    """`reference.Reference` in a child, which ends with this process. Close it."""

    def __init__(self, checkpoint: Checkpoint, num_threads: int) -> None:
        guard = (sys.executable, "-m", "gptjet.service.die_with_parent", str(os.getpid()))
        self._process = subprocess.Popen(
            [*guard, sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._send((checkpoint, num_threads))

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    def describe(self) -> Groundwork:
        """See Reference."""
        return cast(Groundwork, self._ask("describe"))

    def record(
        self, weight_type: WeightType, prompts: Sequence[Sequence[int]]
    ) -> dict[str, list[Trace]]:
        """See Reference."""
        return cast("dict[str, list[Trace]]", self._ask("record", weight_type, prompts))

    def close(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()
        self._process.wait(_END_S)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # what it did not read any more
                continue

    def _ask(self, name: str, *arguments: object) -> object:
        self._send((name, arguments))
        assert self._process.stdout is not None
        try:
            answer, value = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise self._ended() from None
        if answer == "error":
            raise BackendLoadError(value)
        return value

    def _send(self, message: object) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _ended(self) -> BackendLoadError:
        code = self._process.wait()
        how = f"with exit code {code}"
        if code < 0:
            how = f"by signal {-code} ({signal.Signals(-code).name})"
            how += ", as one that found no memory is" if -code == signal.SIGKILL else ""
        return BackendLoadError(
            f"the process that computes what transformers gives for the parity gate ended {how}"
        )


def _serve(questions: BinaryIO, answers: BinaryIO) -> None:
    """The child's side: answer until the input ends."""
    checkpoint, num_threads = pickle.load(questions)
    from gptjet.service.backends.fused.reference import Reference as Transformers

    torch.set_num_threads(num_threads)
    reference = Transformers(checkpoint, torch.device("cpu"))
    while True:
        try:
            name, arguments = pickle.load(questions)
        except EOFError:
            return
        answer: tuple[str, Any]
        try:
            answer = "ok", getattr(reference, name)(*arguments)
        except BackendLoadError as error:
            answer = "error", str(error)
        pickle.dump(answer, answers)
        answers.flush()


def main() -> None:
    """Be the child. Ctrl-C reaches it too, and is the parent's to act upon."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The pipe is for answers alone: what a library prints goes to standard error.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
