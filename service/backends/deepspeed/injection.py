"""DeepSpeed's kernels put in place of a transformers model's blocks, once a process.

DeepSpeed keeps its KV workspace, its token counter and its number of layers in C++ and in class
attributes, so at most one `InjectedModel` is open in a process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gptjet.service.backends.deepspeed.injected_model import InjectedModel
from gptjet.service.backends.deepspeed.runtime import import_deepspeed, quiet_deepspeed
from gptjet.service.backends.deepspeed.tensor_parallel import (
    Announcer,
    Ranks,
    open_announcements,
)
from gptjet.service.engine.errors import BackendLoadError

if TYPE_CHECKING:
    import torch

_open_model: InjectedModel | None = None
_open_model_guard = threading.Lock()


def inject(
    model: torch.nn.Module,
    *,
    dtype: torch.dtype,
    max_context: int,
    ranks: Ranks | None = None,
    check_batch: Callable[[int, int], None] | None = None,
) -> InjectedModel:
    """Replace the model's blocks by DeepSpeed's, in place: the model's own weights are used up.

    With several `ranks` every one of them calls this, and all but the first then `follow`.
    Raises BackendLoadError where a model is already injected in this process, DeepSpeed is missing,
    or the injection itself fails (its op cannot be loaded, most often).
    """
    global _open_model
    here = ranks or Ranks()
    deepspeed = import_deepspeed(next(model.parameters()).device)
    with _open_model_guard:
        if _open_model is not None:
            raise BackendLoadError(
                "DeepSpeed keeps one KV workspace a process and a model is injected in this one "
                "already; close it first, or serve the second model from its own process"
            )
        with quiet_deepspeed():
            try:
                engine = deepspeed.init_inference(
                    model.eval(),
                    dtype=dtype,
                    replace_with_kernel_inject=True,
                    max_out_tokens=max_context,
                    # equal, or DeepSpeed shortens the workspace in silence when memory is short
                    min_out_tokens=max_context,
                    tensor_parallel={"tp_size": here.size},
                )
            except (
                RuntimeError,
                ValueError,
                OSError,
                AssertionError,
                NotImplementedError,
            ) as error:
                _forget_class_state()
                raise BackendLoadError(
                    f"DeepSpeed could not inject its kernels: {error}; "
                    "`gptjet doctor` says whether its op can be loaded here, or use "
                    "--backend huggingface"
                ) from error
        _drop_injection_leftovers()
        if not hasattr(engine.module.transformer.h[0], "allocate_workspace"):
            _forget_class_state()
            raise BackendLoadError(
                f"DeepSpeed found nothing to replace in {type(model).__name__}; "
                "use --backend huggingface"
            )
        group = open_announcements() if here.size > 1 else None
        injected = InjectedModel(
            engine.module,
            max_context=max_context,
            on_close=_close_open_model,
            check_batch=check_batch,
            announcer=Announcer(group) if group is not None and here.is_leader else None,
        )
        injected.announcements = group
        _open_model = injected
    return injected


def _close_open_model() -> None:
    global _open_model
    with _open_model_guard:
        _open_model = None
        with quiet_deepspeed():
            _forget_class_state()


def _transformer_class() -> Any:
    return import_module(
        "deepspeed.model_implementations.transformers.ds_transformer"
    ).DeepSpeedTransformerInference


def _forget_class_state() -> None:
    """What DeepSpeed's own `destroy` does before a second engine, done when a model is closed."""
    layer = _transformer_class()
    attention = import_module("deepspeed.ops.transformer.inference.ds_attention")
    if layer.workspace is not None and layer.workspace.is_allocated():
        layer.workspace.release_workspace()
    layer.workspace = None
    layer.layer_id = 0
    attention.DeepSpeedSelfAttention.num_layers = 0


def _drop_injection_leftovers() -> None:
    """Free what DeepSpeed keeps after an injection and never reads on this path.

    `container_g` keeps the first block's old weights alive (it serves checkpoint loading), and the
    two merge buffers are read only where q, k and v were left unfused: 0.4 GB and 0.24 GB of a card
    at GPT-J-6B's size.
    """
    replacement: Any = import_module("deepspeed.module_inject.replace_module")
    replacement.container_g = None
    attention = import_module("deepspeed.ops.transformer.inference.ds_attention")
    mlp = import_module("deepspeed.ops.transformer.inference.ds_mlp")
    attention.DeepSpeedSelfAttention._qkv_buffers = []
    mlp.DeepSpeedMLP._inter_w_buffers = []
