"""transformers' own model behind the engine's protocol: the baseline, and any causal LM.

One sequence a step, each with a DynamicCache of its own, so what a sequence computes cannot depend
on what else is running. `generate` is not used: the engine decides who computes next, and greedy
tokens still equal it bit for bit because every forward gets the same inputs. Attention is the
model's default in transformers (eager for GPT-J, which has no SDPA path there).
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from gptjet.service.backends.device import choose_device, choose_dtype, dtype_name, free_bytes
from gptjet.service.backends.factory import LoadedModel
from gptjet.service.backends.logprobs import token_logprobs
from gptjet.service.backends.threads import choose_cpu_threads
from gptjet.service.engine.backend import BackendSpec, PrefillResult, ScheduledBatch, ScoreJob
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.architecture import verify_architecture
from gptjet.service.models.checkpoint import Checkpoint, resolve_checkpoint
from gptjet.service.models.geometry import context_length, eos_token_ids
from gptjet.service.models.memory import format_bytes
from gptjet.service.models.messages import one_line
from gptjet.service.models.tokenizer import load_tokenizer
from gptjet.service.models.transformers_loader import load_causal_lm

if TYPE_CHECKING:
    from gptjet.service.backends.factory import LoadOptions
    from gptjet.service.engine.sequence import Sequence

_BLOCK_SIZE = 16
# vLLM's choice for models whose positions have no end (ALiBi).
_DEFAULT_CONTEXT = 2048
# The rest is for activations: eager attention of a 2048-token GPT-J prefill holds about 1 GiB.
_KV_SHARE_OF_FREE_MEMORY = {"cuda": 0.6, "cpu": 0.5}
# Tokens of a candidate scored at once: at 50,400 ids their logits take 26 MB in float32.
_SCORE_CHUNK = 128

_log = logging.getLogger(__name__)


class HuggingFaceBackend:
    """Drives a loaded model's forward. See `load` for how one comes to be."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        model_name: str,
        eos_ids: tuple[int, ...] = (),
        max_sequences: int = 64,
        kv_cache_tokens: int | None = None,
        kv_budget_bytes: int | None = None,
    ) -> None:
        """Measure the model with one token, then size the KV cache.

        kv_cache_tokens  tokens all sequences together may hold; None takes as many as fit, at most
                         `max_sequences` full contexts
        kv_budget_bytes  memory the caches may take; None does not limit them

        Raises BackendLoadError when the model does not use its cache, or the cache does not fit.
        """
        # Any: transformers generates the forwards' signatures per class.
        self._model: Any = model
        self._device = model.device
        parameters = inspect.signature(type(model).forward).parameters
        self._keeps_logits = "logits_to_keep" in parameters
        self._caches: dict[int, DynamicCache] = {}
        vocab_size, kv_bytes_per_token = self._measure()
        max_context = context_length(model.config.get_text_config())
        if max_context is None:
            max_context = _DEFAULT_CONTEXT
            _log.warning("%s has no context limit of its own: using %d", model_name, max_context)
        self._spec = BackendSpec(
            name="huggingface",
            model_name=model_name,
            architecture=type(model).__name__,
            num_parameters=sum(p.numel() for p in model.parameters()),
            device=str(self._device),
            dtype=dtype_name(model.dtype),
            vocab_size=vocab_size,
            max_context=max_context,
            max_sequences=max_sequences,
            max_batch_size=1,
            max_prefill_batch_size=1,
            num_kv_blocks=_num_kv_blocks(
                bytes_per_block=kv_bytes_per_token * _BLOCK_SIZE,
                useful_blocks=max_sequences * -(-max_context // _BLOCK_SIZE),
                kv_cache_tokens=kv_cache_tokens,
                budget_bytes=kv_budget_bytes,
            ),
            block_size=_BLOCK_SIZE,
            eos_token_ids=eos_ids,
        )

    @property
    def spec(self) -> BackendSpec:
        """One sequence a step, prefill and decode."""
        return self._spec

    def warm_up(self) -> None:
        """Run a short prompt and two tokens after it."""
        cache = self._new_cache()
        self._forward([0] * min(16, self._spec.max_context), cache)
        for _ in range(2):
            self._forward([0], cache)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def prefill(self, batch: ScheduledBatch) -> PrefillResult:
        """Compute each sequence's tokens into a fresh cache: logits [B, V] float32.

        Prompt logits are inference tensors, for reading only: a copy can be half a gigabyte.
        An exception leaves the sequences of this batch without a cache and the others untouched.
        """
        logits, prompt_logits = [], []
        for sequence in batch.sequences:
            self._caches.pop(sequence.sequence_id, None)
            cache = self._new_cache()
            every_position = sequence.needs_prompt_logits
            rows = self._forward(sequence.token_ids, cache, every_position=every_position)
            self._caches[sequence.sequence_id] = cache
            logits.append(rows[-1:])
            prompt_logits.append(rows[:-1] if every_position else None)
        # Concatenating outside inference mode makes ordinary tensors, which the sampler may change.
        return PrefillResult(torch.cat(logits), tuple(prompt_logits))

    def decode(self, batch: ScheduledBatch) -> torch.Tensor:
        """Compute each sequence's last token against its cache: [B, V] float32.

        Raises RuntimeError when a cache is missing or out of step with its sequence: a bug above.
        An exception drops the cache it happened in, which some layers may have half extended.
        """
        logits = []
        for sequence in batch.sequences:
            cache = self._caches.pop(sequence.sequence_id, None)
            cached_tokens = 0 if cache is None else cache.get_seq_length()
            if cache is None or cached_tokens != sequence.num_tokens - 1:
                raise RuntimeError(
                    f"sequence {sequence.sequence_id} has {sequence.num_tokens} tokens and a KV "
                    f"cache of {cached_tokens}, which must be one less"
                )
            logits.append(self._forward([sequence.last_token_id], cache))
            self._caches[sequence.sequence_id] = cache
        return torch.cat(logits)

    def score(self, job: ScoreJob) -> Generator[None, None, tuple[torch.Tensor, ...]]:
        """The prompt is computed once; each candidate goes on from its cache, which is cut back.

        A candidate's first token is read off the prompt's logits, so one token costs no forward.
        """
        cache = self._new_cache()
        after_prompt = self._forward(list(job.prompt_token_ids), cache)  # [1, V]
        scores = []
        for candidate in job.candidates:
            logprobs = [token_logprobs(after_prompt, candidate[:1])]
            if len(candidate) > 1:
                fork, inputs, targets = _Fork(cache), candidate[:-1], candidate[1:]
                for start in range(0, len(inputs), _SCORE_CHUNK):
                    yield
                    chunk = slice(start, start + _SCORE_CHUNK)
                    rows = self._forward(list(inputs[chunk]), fork.cache, every_position=True)
                    logprobs.append(token_logprobs(rows, targets[chunk]))
                fork.join()
            scores.append(torch.cat(logprobs))
        return tuple(scores)

    def release(self, sequence: Sequence) -> None:
        """Forget the sequence's cache."""
        self._caches.pop(sequence.sequence_id, None)

    def close(self) -> None:
        """Drop the model and every cache."""
        self._caches.clear()
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self._model.config)

    def _forward(
        self, token_ids: list[int], cache: DynamicCache, *, every_position: bool = False
    ) -> torch.Tensor:
        """Logits [1, V] float32 of the last token, or [len(token_ids), V] of every one."""
        keep = {"logits_to_keep": 0 if every_position else 1} if self._keeps_logits else {}
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor([token_ids], device=self._device),
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
                **keep,
            )
        rows: torch.Tensor = output.logits[0]
        if not every_position:
            rows = rows[-1:]
        return rows.float()

    def _measure(self) -> tuple[int, int]:
        """Columns of the logits, and bytes one token takes in the cache."""
        cache = self._new_cache()
        try:
            columns = self._forward([0], cache).shape[-1]
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise BackendLoadError(
                f"{type(self._model).__name__} does not run in this transformers: {one_line(error)}"
            ) from error
        # A layer without attention has no keys.
        layers: list[Any] = [
            layer for layer in cache.layers if getattr(layer, "keys", None) is not None
        ]
        if not layers or cache.get_seq_length() != 1:
            raise BackendLoadError(
                f"{type(self._model).__name__} keeps no KV cache of keys and values; the "
                f"huggingface backend cannot serve it"
            )
        return int(columns), sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


class _Fork:
    """A prompt's cache to go on from, and the way back to the prompt alone.

    Layers of plain attention are cut back, which costs nothing; a window or a state that has moved
    on cannot be, so a model that has one goes on from a copy.
    """

    def __init__(self, prompt: DynamicCache) -> None:
        self._num_tokens = prompt.get_seq_length()
        self._is_copy = any(type(layer) is not DynamicLayer for layer in prompt.layers)
        with torch.inference_mode():
            self.cache = copy.deepcopy(prompt) if self._is_copy else prompt

    def join(self) -> None:
        """Leave the prompt's cache as it was."""
        if not self._is_copy:
            with torch.inference_mode():
                self.cache.crop(self._num_tokens - self.cache.get_seq_length())


def load(options: LoadOptions) -> LoadedModel:
    """Resolve, check and load `options.model`.

    Raises BackendLoadError, one line, before reading any weight wherever that is possible.
    """
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    if device.type == "cpu":
        torch.set_num_threads(choose_cpu_threads(options.cpu_threads))
    checkpoint = resolve_checkpoint(
        options.model,
        allow_pickle=options.allow_pickle,
        local_files_only=options.local_files_only,
    )
    architecture = verify_architecture(checkpoint)
    # Always local: resolve_checkpoint has downloaded what there is.
    tokenizer = load_tokenizer(checkpoint.path, local_files_only=True)
    vocab_size = int(architecture.config.get_text_config().vocab_size)
    if tokenizer.vocab_size > vocab_size:
        raise BackendLoadError(
            f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size} ids and the model "
            f"{vocab_size}: they do not belong together"
        )
    weight_bytes = architecture.num_parameters * dtype.itemsize
    free_before = free_bytes(device)
    _check_weights_fit(checkpoint, weight_bytes, free_before, device, dtype)
    model = load_causal_lm(
        checkpoint,
        device=device,
        dtype=dtype,
        progress=options.progress,
        architecture=architecture,
    )
    # On a CPU the weights may be a mapped file, which does not count as used memory yet.
    free_after = free_bytes(device) if device.type == "cuda" else free_before - weight_bytes
    share = _KV_SHARE_OF_FREE_MEMORY[device.type]
    backend = HuggingFaceBackend(
        model,
        model_name=checkpoint.name,
        eos_ids=eos_token_ids(
            architecture.config.get_text_config(), checkpoint.generation_config, vocab_size
        ),
        max_sequences=options.max_sequences,
        kv_cache_tokens=options.kv_cache_tokens,
        kv_budget_bytes=int(free_after * share),
    )
    return LoadedModel(backend, tokenizer)


def _check_weights_fit(
    checkpoint: Checkpoint,
    weight_bytes: int,
    free: int,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    if weight_bytes > free:
        raise BackendLoadError(
            f"{checkpoint.path} does not fit on {device}: its weights take "
            f"{format_bytes(weight_bytes)} in {dtype_name(dtype)}, {format_bytes(free)} are free"
        )


def _num_kv_blocks(
    *,
    bytes_per_block: int,
    useful_blocks: int,
    kv_cache_tokens: int | None,
    budget_bytes: int | None,
) -> int:
    """Blocks of KV cache: what was asked for, else what fits, never more than can be used."""
    fitting = useful_blocks if budget_bytes is None else max(0, budget_bytes) // bytes_per_block
    if kv_cache_tokens is None:
        blocks = min(useful_blocks, fitting)
        wanted = bytes_per_block
    else:
        blocks = -(-kv_cache_tokens // _BLOCK_SIZE)
        wanted = blocks * bytes_per_block
    if blocks < 1 or blocks > fitting:
        raise BackendLoadError(
            f"the KV cache does not fit: {max(blocks, 1) * _BLOCK_SIZE} tokens take "
            f"{format_bytes(wanted)}, {format_bytes(max(0, budget_bytes or 0))} are free for it "
            f"after the weights"
        )
    return blocks
