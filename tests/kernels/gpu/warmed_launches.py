"""A process without the interpreter, which launches on a card that is not there; prints JSON.

    python warmed_launches.py keys CAPABILITY WEIGHT_TYPE KV_DTYPE
    python warmed_launches.py compiled

`keys`: the keys under which Triton's cache is searched when the loader's model is run, and those
under which `gptjet warm-cache` compiles. `compiled`: what a launch finds of a kernel compiled so.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.compiler
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.compiler import make_backend
from triton.runtime import build
from triton.runtime.cache import get_cache_key

from gptjet.kernels.batch import BlockGeometry, SamplingBatch
from gptjet.kernels.gpu import availability, offline, warm
from gptjet.kernels.gpu.operations import triton_operations
from gptjet.service.backends.fused import gpu
from gptjet.service.backends.fused.kv_cache import allocate_kv_cache
from gptjet.service.backends.fused.runner import ModelRunner, Segment
from gptjet.service.models.checkpoint import resolve_checkpoint
from gptjet.service.models.fused.weights import load_fused_weights

CPU = torch.device("cpu")


@contextmanager
def noting_keys(found: dict[str, str]) -> Iterator[None]:
    """Instead of compiling, note (key, kernel) as `triton.compiler.compile` computes the key."""

    def note(source: Any, *, target: Any, options: dict[str, Any]) -> Any:
        backend = make_backend(target)
        parsed = backend.parse_options(dict(options))
        environment = triton.compiler.compiler.get_cache_invalidating_env_vars()
        key = get_cache_key(source, backend, parsed, env_vars=environment)
        found[hashlib.sha256(key.encode()).hexdigest()] = source.fn.__name__
        return SimpleNamespace(
            launch_metadata=lambda *_: None, run=lambda *_: None, function=0, packed_metadata=()
        )

    compile_really = triton.compiler.compile
    triton.compiler.compile = note
    try:
        yield
    finally:
        triton.compiler.compile = compile_really


def serve(weight_type: str, kv_dtype: str) -> BlockGeometry:
    """What a server does with a model, by the loader's own code: nothing of it is computed."""
    stored = {"float16": "fp16"}.get(weight_type, weight_type)
    weights = load_fused_weights(resolve_checkpoint("embedded"), stored, progress=False)
    availability.launch_smallest(CPU)
    model = gpu.build_gpu_model(weights, triton_operations(), CPU, max_rows=6)
    geometry = weights.geometry
    dtype = warm.KV_DTYPES[kv_dtype]
    cache = allocate_kv_cache(geometry, 37, dtype=dtype, device=CPU).zero_()
    runner = ModelRunner(model, geometry, cache, max_tokens=256, max_segments=6)
    for length in (1, 3, 8, 13, 50):
        runner.run([Segment(list(range(length)), 0, [1, 2, 3, 4], wanted=1)])
    for prompts in range(1, 7):
        tables = [[6 * p + i for i in range(6)] for p in range(prompts)]
        runner.run(
            [Segment(list(range(17 + p)), 16 * (p % 2), tables[p], 1) for p in range(prompts)]
        )
        ones = [1] * prompts
        runner.decode(ones, ones, tables)
        for temperature, top_k in ((0.0, 0), (1.0, 0), (1.0, 5)):
            count = np.ones(prompts, np.int64)
            sampling = SamplingBatch(
                sources=np.full(prompts, -1, np.int32),
                temperature=temperature * np.ones(prompts),
                top_k=top_k * count,
                top_p=np.ones(prompts),
                min_p=np.zeros(prompts),
                seed=count.astype(np.uint64),
                index=count,
                position=count,
            )
            runner.decode_and_sample(ones, ones, tables, sampling)
    runner.copy_blocks([(0, 30), (1, 31)])
    runner.close()
    return geometry


def keys(capability: int, weight_type: str, kv_dtype: str) -> dict[str, Any]:
    launched: dict[str, str] = {}
    warmed: dict[str, str] = {}
    with noting_keys(launched), offline.pretend(offline.PretendedCard(capability), capability):
        geometry = serve(weight_type, kv_dtype)
    with noting_keys(warmed):
        for launch in warm.launches_of(
            geometry, capability, weight_types=[weight_type], kv_dtypes=[kv_dtype], max_rows=6
        ):
            kernel = getattr(sys.modules[launch.module], launch.kernel)
            with offline.pretend(offline.PretendedCard(capability), capability):
                kernel.preload(launch.specialization)
    return {"launched": launched, "warmed": warmed}


class Card(offline.PretendedCard):
    """With Triton's own launcher, and 48 KiB of shared memory."""

    launcher_cls = nvidia.CudaLauncher
    utils = SimpleNamespace(
        get_device_properties=lambda _: {"max_shared_mem": 49152},
        load_binary=lambda *_: (None, None, 0, 0, 1024),
    )


def compiled() -> dict[str, Any]:
    """Launch the smallest kernel where it can be neither compiled nor built."""

    def smallest() -> None:
        availability.launch_smallest(torch.device("meta"))

    (launch,) = offline.record_launches(75, smallest)
    offline.compile_launch(launch)
    offline.build_utilities()
    hits: list[bool] = []
    loaded: list[str] = []
    launched: list[tuple[Any, ...]] = []

    def load(name: str, path: str) -> Any:
        loaded.append(name)
        return SimpleNamespace(
            launch=lambda *arguments: launched.append(arguments),
            **dict.fromkeys(
                (
                    "PyCUtensorMap",
                    "load_binary",
                    "get_device_properties",
                    "cuOccupancyMaxActiveClusters",
                    "set_printf_fifo_size",
                    "fill_tma_descriptor",
                )
            ),
        )

    def refuse(*_: Any) -> str:
        raise RuntimeError("Failed to find C compiler")

    build._load_module_from_path = load
    build._build = refuse
    nvidia.library_dirs = list
    knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
    nvidia.CudaUtils()
    with offline.pretend(Card(75), 75):
        availability.launch_smallest(CPU)
    return {"hits": hits, "loaded": loaded, "num_launches": len(launched)}


if __name__ == "__main__":
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        "keys": lambda capability, *kinds: keys(int(capability), *kinds),
        "compiled": compiled,
    }
    print(json.dumps(commands[sys.argv[1]](*sys.argv[2:])))
