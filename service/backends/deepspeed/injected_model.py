"""The step loop over an injected model, and the one request at a time that it can hold.

`generate` of an injected model is never called: transformers' cache stays at length 0 there, so the
mask it builds is shorter than what the kernels read. The loop below gives the blocks what they can
bear and nothing else.

DeepSpeed keeps one KV workspace and one token counter a process, so an `InjectedRequest` holds the
process's lock from its prefill to its end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from gptjet.service.backends.deepspeed.runtime import c_stdout_on_stderr
from gptjet.service.engine.errors import FieldViolation, InvalidRequestError

if TYPE_CHECKING:
    from gptjet.service.backends.deepspeed.tensor_parallel import Announcer

# Positions whose [L, V] logits are computed at once when a caller wants them all: at 50,400 ids
# this keeps the temporary under 30 MB where a whole prompt of 2,048 would take 400 MB of a full
# card.
_LOGITS_CHUNK = 128

_workspace_lock = threading.Lock()


class WorkspaceBusyError(RuntimeError):
    """Another request holds the process's one KV workspace and the caller would not wait."""


class InjectedModel:
    """A transformers model whose blocks are DeepSpeed's, and the requests run on it.

    model        `GPTJForCausalLM`, `GPT2LMHeadModel` or `GPTNeoForCausalLM` after `inject`
    max_context  tokens the workspace is made for: prompt and output together
    on_close     gives back what the process holds for the model
    check_batch  called with a new batch size and the one the workspace holds, before a workspace is
                 made for it; raises if it cannot be
    announcer    tells the other ranks of a tensor-parallel model what this one does next
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        max_context: int,
        on_close: Callable[[], None],
        check_batch: Callable[[int, int], None] | None = None,
        announcer: Announcer | None = None,
    ) -> None:
        transformer: Any = model.transformer
        self._blocks: Any = transformer.h
        self._token_embedding: Any = transformer.wte
        # GPT-2 and GPT-Neo add learnt positions; GPT-J rotates inside the kernels.
        self._position_embedding: Any = getattr(transformer, "wpe", None)
        self._final_norm: Any = transformer.ln_f
        self._lm_head: Any = model.lm_head
        self._on_close = on_close
        self._check_batch = check_batch
        self._announcer = announcer
        self._workspace_batch = 0
        self._closed = False
        # the group that followers listen to, None where there are none
        self.announcements: Any = None
        self.max_context = max_context
        self.device: torch.device = self._token_embedding.weight.device

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return int(self._lm_head.weight.shape[0])

    def begin(
        self, *, max_tokens: int, batch_size: int = 1, blocking: bool = True
    ) -> InjectedRequest:
        """Take the workspace for one request, or one static batch, of up to `max_tokens` tokens.

        Raises InvalidRequestError where the batch can never fit, before anything runs, and
        WorkspaceBusyError where the workspace is taken and `blocking` is false.
        """
        if self._closed:
            raise RuntimeError("the injected model is closed")
        if max_tokens > self.max_context:
            raise InvalidRequestError(
                FieldViolation(
                    "sampling_params.max_new_tokens",
                    f"prompt and max_new_tokens come to {max_tokens} tokens; the KV workspace is "
                    f"made for {self.max_context}, and the kernels do not check",
                )
            )
        if batch_size < 1:
            raise ValueError(f"a batch needs a row, got {batch_size}")
        if not _workspace_lock.acquire(blocking=blocking):
            raise WorkspaceBusyError(
                "another request holds the KV workspace; DeepSpeed has one a process"
            )
        try:
            self.prepare_workspace(batch_size)
        except BaseException:
            _workspace_lock.release()
            raise
        return InjectedRequest(self, batch_size=batch_size, max_tokens=max_tokens)

    def generate_greedy(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        eos_token_id: int | None = None,
    ) -> list[list[int]]:
        """The likeliest continuation of each prompt, all in one static batch; for offline use.

        Prompts of unequal length are padded on the left. A row that reaches `eos_token_id` ends
        with it, but its place is computed until the last row is done: that is what static means.
        """
        if not prompts or any(not prompt for prompt in prompts):
            raise InvalidRequestError(FieldViolation("prompt", "must hold at least one token"))
        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)  # [B, L]
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        outputs: list[list[int]] = [[] for _ in prompts]
        done = [False] * len(prompts)
        with self.begin(max_tokens=width + max_new_tokens, batch_size=len(prompts)) as request:
            logits = request.prefill(ids, None if bool(mask.all()) else mask)
            for step in range(max_new_tokens):
                tokens = logits.argmax(-1)
                for row, token in enumerate(tokens.tolist()):
                    if not done[row]:
                        outputs[row].append(token)
                        done[row] = token == eos_token_id
                if all(done) or step == max_new_tokens - 1:
                    break
                logits = request.decode_one_token(tokens[:, None])
        return outputs

    def close(self) -> None:
        """Give the workspace back, so that another model may be injected in this process."""
        with _workspace_lock:
            if self._closed:
                return
            self._closed = True
            if self._announcer is not None:
                self._announcer.close()
            self._blocks = self._token_embedding = self._position_embedding = None
            self._final_norm = self._lm_head = None
            self._on_close()

    def forward(
        self,
        token_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run the blocks over token_ids: [B, L] int64 -> hidden states [B, L, H].

        `attention_mask` is [B, total tokens] int64, or None where no row is padded; `positions` is
        [B, L] int64, or None for a model that rotates. Callers hold the workspace.
        """
        if self._announcer is not None:
            self._announcer.forward(token_ids, attention_mask, positions)
        hidden = self._token_embedding(token_ids)
        if self._position_embedding is not None:
            hidden = hidden + self._position_embedding(positions)
        for block in self._blocks:
            # a block writes its result over its input, which is ours alone here
            hidden = block(hidden, attention_mask=attention_mask, use_cache=False)[0]
        result: torch.Tensor = hidden
        return result

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of hidden states [..., H]: [..., V] float32."""
        logits: torch.Tensor = self._lm_head(self._final_norm(hidden))
        return logits.float()

    @property
    def needs_positions(self) -> bool:
        """The model adds learnt position embeddings outside its blocks."""
        return self._position_embedding is not None

    def reset(self) -> None:
        """Set the token counter back: the kernels trust it, so every request starts and ends so."""
        if self._announcer is not None:
            self._announcer.reset()
        self._blocks[0].reset_cache()

    def distrust_workspace(self) -> None:
        """Make the next request allocate it anew: a step cut short leaves it unknown."""
        self._workspace_batch = 0

    def prepare_workspace(self, batch_size: int) -> None:
        """See that the next forward has a workspace for `batch_size` rows, and a clean counter."""
        if batch_size != self._workspace_batch and self._check_batch is not None:
            self._check_batch(batch_size, self._workspace_batch)
        if self._announcer is not None:
            self._announcer.prepare(batch_size)
        first_block = self._blocks[0]
        if batch_size != self._workspace_batch:
            # DeepSpeed would allocate in the first block's first forward and never look again
            self._workspace_batch = 0
            first_block._should_allocate_workspace = True
            with c_stdout_on_stderr():
                first_block.allocate_workspace((batch_size, 1))
            self._workspace_batch = batch_size
        first_block.reset_cache()


class InjectedRequest:
    """One request, or one static batch, from prefill to `end`. It holds the workspace all the
    while.

    A context manager; `end` may be called by another thread than the one that began.
    """

    def __init__(self, model: InjectedModel, *, batch_size: int, max_tokens: int) -> None:
        self._model = model
        self._batch_size = batch_size
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._mask: torch.Tensor | None = None
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    @property
    def num_tokens(self) -> int:
        """Tokens in the KV workspace a row, padding included."""
        return self._num_tokens

    @torch.inference_mode()
    def prefill(
        self, token_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the prompt token_ids: [B, L] int64 -> logits of the last position [B, V] float32.

        `attention_mask` is [B, L] of 0 (padding, on the left) and 1.
        """
        return self._model.logits(self._prefill(token_ids, attention_mask)[:, -1])

    @torch.inference_mode()
    def prefill_all_positions(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `prefill`, with the logits of every position but the last beside it.

        Returns [B, V] on the device and [B, L - 1, V] in host memory, both float32.
        """
        hidden = self._prefill(token_ids, None)
        last = self._model.logits(hidden[:, -1])
        chunks = torch.split(hidden[:, :-1], _LOGITS_CHUNK, dim=1)
        earlier = [self._model.logits(chunk).cpu() for chunk in chunks]
        return last, torch.cat(earlier, dim=1)

    @torch.inference_mode()
    def prefill_last_positions(self, token_ids: torch.Tensor, count: int) -> torch.Tensor:
        """As `prefill`, with the logits of the last `count` positions: [B, count, V] float32.

        They are in host memory. Raises ValueError unless 1 <= count <= L.
        """
        if not 1 <= count <= token_ids.shape[1]:
            raise ValueError(f"{count} positions of {token_ids.shape[1]}")
        hidden = self._prefill(token_ids, None)[:, -count:]
        chunks = torch.split(hidden, _LOGITS_CHUNK, dim=1)
        return torch.cat([self._model.logits(chunk).cpu() for chunk in chunks], dim=1)

    @torch.inference_mode()
    def decode_one_token(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Compute one more token a row: token_ids [B, 1] int64 -> logits [B, V] float32."""
        if self._num_tokens == 0:
            raise RuntimeError("decode before prefill")
        self._check_shape(token_ids, length=1)
        self._check_room(1)
        model = self._model
        positions = None
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(self._batch_size, 1)], dim=1)
        if model.needs_positions:
            positions = self._positions(1)
        hidden = self._run(token_ids.to(model.device), positions)
        return model.logits(hidden[:, -1])

    def end(self) -> None:
        """Leave the workspace clean and free for the next request. Further calls do nothing."""
        if self._ended:
            return
        self._ended = True
        try:
            self._model.reset()
        finally:
            _workspace_lock.release()

    def _prefill(
        self, token_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        if self._num_tokens:
            raise RuntimeError("prefill twice in one request: a long input starts a new sequence")
        self._check_shape(token_ids)
        self._check_room(token_ids.shape[1])
        model = self._model
        if attention_mask is not None:
            self._mask = attention_mask.to(model.device, torch.int64)
        positions = self._positions(token_ids.shape[1]) if model.needs_positions else None
        return self._run(token_ids.to(model.device), positions)

    def _run(self, token_ids: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        if self._ended:
            raise RuntimeError("the request has ended")
        try:
            hidden = self._model.forward(token_ids, self._mask, positions)
        except BaseException:
            self._model.distrust_workspace()
            raise
        self._num_tokens += token_ids.shape[1]
        return hidden

    def _positions(self, length: int) -> torch.Tensor:
        """Position ids of the newest `length` tokens: [B, length] int64, padding not counted."""
        if self._mask is None:
            first = self._num_tokens
            positions = torch.arange(first, first + length, device=self._model.device)
            return positions.expand(self._batch_size, length)
        return (self._mask.cumsum(1) - 1).clamp(min=0)[:, -length:]

    def _check_shape(self, token_ids: torch.Tensor, length: int | None = None) -> None:
        batch_size, given = token_ids.shape
        if batch_size != self._batch_size:
            raise ValueError(
                f"{batch_size} rows in a request begun for {self._batch_size}: the kernels would "
                "write past the workspace"
            )
        if given < 1 or (length is not None and given != length):
            raise ValueError(f"{given} tokens a row where {length or 'one or more'} are expected")

    def _check_room(self, new_tokens: int) -> None:
        total = self._num_tokens + new_tokens
        if total > self._max_tokens:
            raise InvalidRequestError(
                FieldViolation(
                    "sampling_params.max_new_tokens",
                    f"token {total} of a request begun for {self._max_tokens}",
                )
            )
