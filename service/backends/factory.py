"""The table of backends, and the one way to load one.

Importing this imports no torch: `--help` and a client stay quick. A new backend is a loader
function of the shape `(LoadOptions) -> LoadedModel` and one line in `BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptjet.service.engine.errors import BackendLoadError

if TYPE_CHECKING:
    from gptjet.service.engine.backend import Backend
    from gptjet.service.engine.tokenizer import Tokenizer

KV_CACHE_DTYPES = ("auto", "float16", "float32", "int8")
_CHOOSES_KV_DTYPE = ("auto", "fused")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What a loader is asked for.

    model             "embedded", a folder, or a hub name
    device, dtype     "auto" or a name that `backends.device` knows
    allow_pickle      load weights that are pickles where there is nothing else
    local_files_only  take a hub name from this machine's cache alone
    max_sequences     most sequences that may hold a KV cache at once
    kv_cache_tokens   tokens all sequences together may hold; None sizes it by free memory
    kv_cache_dtype    one of KV_CACHE_DTYPES; "auto" is what the model computes in
    progress          draw progress bars, where stderr is a terminal
    strict_parity     refuse a fast path that differs from transformers, instead of falling back
    cpu_threads       cores that a model on the CPU keeps busy; None: see threads.choose_cpu_threads
    deterministic     what a sequence gets never depends on what else is computed with it, also
                      where the fused backend has no kernels that promise it; slow there
    cuda_graphs       replay decode steps as CUDA graphs, where the fused backend's kernels run
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    allow_pickle: bool = False
    local_files_only: bool | None = None
    max_sequences: int = 64
    kv_cache_tokens: int | None = None
    kv_cache_dtype: str = "auto"
    progress: bool = True
    strict_parity: bool = False
    cpu_threads: int | None = None
    deterministic: bool = False
    cuda_graphs: bool = True


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A backend and the tokenizer of its model."""

    backend: Backend
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """One line of the table: what `--help` says of a backend, and what loads it."""

    description: str
    load: Callable[[LoadOptions], LoadedModel]


def _load_mock(options: LoadOptions) -> LoadedModel:
    from gptjet.service.backends.mock import MockBackend
    from gptjet.service.backends.mock_settings import settings_of
    from gptjet.service.engine.tokenizer import ByteTokenizer

    settings = settings_of(options.model)
    context = max(1, settings.context)
    tokens = options.kv_cache_tokens or options.max_sequences * context
    arguments: dict[str, Any] = {
        "max_context": context,
        "max_sequences": options.max_sequences,
        "num_kv_blocks": max(1, tokens // 16),
        "prefill_ms": settings.prefill_ms,
        "decode_ms": settings.decode_ms,
        "paged": bool(settings.paged),
        "max_prefill_tokens": settings.max_prefill_tokens or None,
        "max_prefill_batch_size": max(1, settings.max_prefill_batch_size),
    }
    if not settings.has_faults:
        return LoadedModel(MockBackend(**arguments), ByteTokenizer())
    from gptjet.service.backends.mock_faults import FaultyMockBackend

    return LoadedModel(FaultyMockBackend(settings, **arguments), ByteTokenizer())


def _load_huggingface(options: LoadOptions) -> LoadedModel:
    from gptjet.service.backends import huggingface

    return huggingface.load(options)


def _load_deepspeed(options: LoadOptions) -> LoadedModel:
    from gptjet.service.backends.deepspeed import loader

    return loader.load(options)


def _load_fused(options: LoadOptions) -> LoadedModel:
    from gptjet.service.backends.fused import loader

    return loader.load(options)


def _load_auto(options: LoadOptions) -> LoadedModel:
    from gptjet.service.backends import auto

    return auto.load(options)


BACKENDS: dict[str, BackendEntry] = {
    "auto": BackendEntry(
        "fused, deepspeed (GPU only) or huggingface: the first that loads and passes parity",
        _load_auto,
    ),
    "fused": BackendEntry(
        "our own GPT-J and CodeGen, continuous batching, FP32 to INT4; proven at load",
        _load_fused,
    ),
    "mock": BackendEntry(
        "a toy with output known by hand; model mock:decode_ms=5,nan_at_step=9 slows, breaks it",
        _load_mock,
    ),
    "huggingface": BackendEntry(
        "transformers' own model, eager, one sequence a step; any causal LM, CPU or GPU",
        _load_huggingface,
    ),
    "deepspeed": BackendEntry(
        "DeepSpeed's inference kernels injected, FP16 on a GPU, one sequence at a time; proven "
        "against transformers at load",
        _load_deepspeed,
    ),
}


def load_backend(
    name: str,
    model: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    allow_pickle: bool = False,
    local_files_only: bool | None = None,
    max_sequences: int = 64,
    kv_cache_tokens: int | None = None,
    kv_cache_dtype: str = "auto",
    progress: bool = True,
    strict_parity: bool = False,
    cpu_threads: int | None = None,
    deterministic: bool = False,
    cuda_graphs: bool = True,
) -> LoadedModel:
    """Load `model` into the backend called `name`; the arguments are those of LoadOptions.

    Raises BackendLoadError, one line, for whatever is wrong with the name, the model, the machine
    or a setting.
    """
    entry = BACKENDS.get(name)
    if entry is None:
        raise BackendLoadError(f"unknown backend {name!r}: there are {', '.join(BACKENDS)}")
    if max_sequences < 1:
        raise BackendLoadError(f"max_sequences must be 1 or more, got {max_sequences}")
    if kv_cache_tokens is not None and kv_cache_tokens < 1:
        raise BackendLoadError(f"kv_cache_tokens must be 1 or more, got {kv_cache_tokens}")
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        raise BackendLoadError(
            f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}, got {kv_cache_dtype!r}"
        )
    if kv_cache_dtype != "auto" and name not in _CHOOSES_KV_DTYPE:
        raise BackendLoadError(
            f"kv_cache_dtype {kv_cache_dtype}: the {name} backend has no choice of it; "
            f"the fused backend has"
        )
    if cpu_threads is not None and cpu_threads < 1:
        raise BackendLoadError(f"cpu_threads must be 1 or more, got {cpu_threads}")
    return entry.load(
        LoadOptions(
            model=model,
            device=device,
            dtype=dtype,
            allow_pickle=allow_pickle,
            local_files_only=local_files_only,
            max_sequences=max_sequences,
            kv_cache_tokens=kv_cache_tokens,
            kv_cache_dtype=kv_cache_dtype,
            progress=progress,
            strict_parity=strict_parity,
            cpu_threads=cpu_threads,
            deterministic=deterministic,
            cuda_graphs=cuda_graphs,
        )
    )
