"""Every limit the kernels do not check, and the memory plan, by hand-made sizes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import CodeGenConfig, GPT2Config, GPTJConfig, GPTNeoConfig

from gptjet.service.backends.deepspeed import guards, memory_plan
from gptjet.service.backends.deepspeed.guards import InjectedGeometry, Platform
from gptjet.service.engine.errors import BackendLoadError, InvalidRequestError

GPTJ_6B = GPTJConfig()
GPTJ_PARAMETERS = 6_050_882_784
GIB = 1024**3


def platform(
    *,
    capability: tuple[int, int] | None = (7, 5),
    dtype: torch.dtype = torch.float16,
    free_bytes: int = 15 * GIB,
) -> Platform:
    return Platform(
        device=torch.device("cuda"),
        dtype=dtype,
        name="Tesla T4",
        capability=capability,
        free_bytes=lambda: free_bytes,
    )


def gptj(**fields: Any) -> GPTJConfig:
    return GPTJConfig(**{"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8} | fields)


def gpt2(**fields: Any) -> GPT2Config:
    return GPT2Config(**{"n_embd": 64, "n_head": 4, "n_layer": 2} | fields)


def gpt_neo(**fields: Any) -> GPTNeoConfig:
    return GPTNeoConfig(
        **{"hidden_size": 64, "num_heads": 4, "num_layers": 2, "window_size": 32}
        | {"attention_types": [[["global", "local"], 1]]}
        | fields
    )


def test_gptj_6b_on_a_turing_card_in_fp16_is_accepted() -> None:
    guards.check_platform(platform())
    geometry = guards.check_model(GPTJ_6B)
    assert geometry == InjectedGeometry(
        family="gptj",
        layers=28,
        heads=16,
        hidden=4096,
        head_dim=256,
        rotary_dim=64,
        context=2048,
        vocab_size=50400,
    )


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (gptj(n_embd=48), "a head is 12 wide"),
        (gptj(rotary_dim=4), "rotary_dim is 4"),
        (gptj(n_inner=128), "n_inner is 128; DeepSpeed lays its buffers out for 4 x 64 = 256"),
        (gptj(n_embd=16384, n_head=64), "n_embd is 16384"),
        (gptj(activation_function="relu"), "activation_function is relu"),
        (gptj(activation_function="gelu"), "activation_function is gelu;"),
        (gpt2(n_inner=100), "n_inner is 100"),
        (gpt2(scale_attn_weights=False), "scale_attn_weights is off"),
        (gpt2(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is on"),
        (gpt2(add_cross_attention=True), "cross-attention"),
        (gpt_neo(intermediate_size=64), "intermediate_size is 64"),
        (gpt_neo(), r"local attention sees 32 tokens .* --kv-cache-tokens 31 "),
        (CodeGenConfig(), "model_type 'codegen'"),
    ],
)
def test_model_the_kernels_get_wrong_is_refused(config: Any, problem: str) -> None:
    with pytest.raises(BackendLoadError, match=problem) as error:
        guards.check_model(config)
    assert str(error.value).endswith("use --backend huggingface")


def test_gpt_neo_below_its_window_and_without_local_layers_is_accepted() -> None:
    assert guards.check_model(gpt_neo(), max_context=31).context == 31
    with pytest.raises(BackendLoadError, match="local attention"):
        guards.check_model(gpt_neo(), max_context=32)
    only_global = gpt_neo(attention_types=[[["global"], 2]])
    assert guards.check_model(only_global).context == 2048


def test_served_context_is_never_longer_than_the_models() -> None:
    assert guards.check_model(GPTJ_6B, max_context=100_000).context == 2048
    assert guards.check_model(GPTJ_6B, max_context=512).context == 512


def test_heads_that_do_not_divide_over_the_gpus_are_refused() -> None:
    with pytest.raises(BackendLoadError, match="16 heads do not divide over 3 GPUs"):
        guards.check_model(GPTJ_6B, tensor_parallel_size=3)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"capability": (5, 2)}, r"compute capability 5\.2.* need 6\.0"),
        ({"capability": None}, r"need 6\.0"),
        ({"dtype": torch.float32}, "does not run in float32: .* rotary"),
        ({"dtype": torch.bfloat16}, "runs in float16, not bfloat16"),
    ],
)
def test_card_or_precision_the_kernels_get_wrong_is_refused(
    changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(BackendLoadError, match=problem):
        guards.check_platform(platform(**changes))


def test_cpu_is_no_platform() -> None:
    with pytest.raises(BackendLoadError, match=r"--backend huggingface, or --backend fused"):
        guards.cuda_platform(torch.device("cpu"), torch.float16)


def plan_for(free_bytes: int, context: int | None = None) -> memory_plan.MemoryPlan:
    geometry = guards.check_model(GPTJ_6B, max_context=context)
    return memory_plan.plan_memory(geometry, platform(free_bytes=free_bytes), GPTJ_PARAMETERS)


def test_workspace_of_gptj_6b_is_what_deepspeed_allocates() -> None:
    """(10 x 4096 + 16 x 2048 + 28 x 2 x 4096) values x 2048 tokens x 2 bytes."""
    assert plan_for(15 * GIB).workspace_row_bytes == (40_960 + 32_768 + 229_376) * 2048 * 2
    assert plan_for(15 * GIB, 1024).workspace_row_bytes == (40_960 + 16_384 + 229_376) * 1024 * 2


def test_narrow_heads_are_padded_as_deepspeed_pads_them() -> None:
    geometry = guards.check_model(gptj(n_embd=160, n_head=4, rotary_dim=8))  # heads of 40: 64
    expected = (10 * 256 + 4 * 100 + 2 * 2 * 256) * 100 * 2
    assert memory_plan.workspace_bytes(geometry, 100) == expected


def test_gptj_6b_fits_a_free_16_gb_card_at_full_context() -> None:
    plan = plan_for(15 * GIB)
    assert plan.fits
    assert plan.needed_bytes == GPTJ_PARAMETERS * 2 + plan.workspace_row_bytes + 500 * 1024**2
    memory_plan.check_memory(plan, platform())


def test_full_card_is_refused_with_the_plan_and_the_context_that_would_fit() -> None:
    plan = plan_for(int(12.5 * GIB))
    with pytest.raises(BackendLoadError) as error:
        memory_plan.check_memory(plan, platform())
    message = str(error.value)
    for part in ("weights 11.3 GiB", "1.2 GiB a row of 2048 tokens", "spare 500.0 MiB"):
        assert part in message
    assert "12.5 GiB free" in message
    offered = re.search(r"--kv-cache-tokens (\d+)", message)
    assert offered is not None
    # what is offered does fit, and one block more does not
    assert plan_for(int(12.5 * GIB), int(offered[1])).fits
    assert not plan_for(int(12.5 * GIB), int(offered[1]) + 16).fits


def test_card_too_small_for_the_weights_is_told_so() -> None:
    with pytest.raises(BackendLoadError, match="no context would fit"):
        memory_plan.check_memory(plan_for(8 * GIB), platform())


def test_batch_whose_workspace_cannot_be_had_is_refused_with_what_can() -> None:
    geometry = guards.check_model(GPTJ_6B)
    check: Callable[..., None] = memory_plan.check_batch_fits
    card = platform(free_bytes=3 * GIB)
    check(geometry, card, 2, held_batch=0)
    with pytest.raises(InvalidRequestError, match=r"3 rows need .* enough for 2 rows"):
        check(geometry, card, 3, held_batch=0)
    check(geometry, card, 3, held_batch=1)  # the row held is given back first
    check(geometry, platform(free_bytes=0), 1, held_batch=4)  # smaller than what is held
