"""GPT-2 and GPT-Neo through the same injection, and FP16 rounding against the gate's limit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from gptjet.service.backends import parity
from gptjet.service.backends.deepspeed import guards, loader
from gptjet.service.backends.deepspeed.guards import Platform
from gptjet.service.backends.deepspeed.injected_model import InjectedModel
from gptjet.service.backends.deepspeed.injection import inject
from gptjet.service.engine.backend import ParityStatus

DECODE_STEPS = 64
PROMPT = torch.randint(0, 97, (30,), generator=torch.Generator().manual_seed(3)).tolist()


def run_greedy(model: InjectedModel, steps: int) -> tuple[list[int], torch.Tensor]:
    with model.begin(max_tokens=len(PROMPT) + steps) as request:
        rows, tokens = [request.prefill(torch.tensor([PROMPT]))[0]], []
        for _ in range(steps):
            tokens.append(int(rows[-1].argmax()))
            rows.append(request.decode_one_token(torch.tensor([tokens[-1:]]))[0])
    return tokens, torch.stack(rows)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        pytest.param("gpt2", {}, id="gpt2"),
        pytest.param("gpt2", {"heads": 5, "head_dim": 8, "layers": 3}, id="gpt2-5x8"),
        pytest.param("gpt_neo", {"window_size": 128}, id="gpt-neo-inside-its-window"),
        pytest.param("gpt_neo", {"attention_types": [[["global"], 2]]}, id="gpt-neo-global"),
    ],
)
def test_family_equals_transformers_over_prompt_and_64_decode_steps(
    family: str, fields: dict[str, Any], op: Any, make_model: Any, greedy_reference: Any
) -> None:
    model = make_model(family, **fields)
    expected_tokens, expected = greedy_reference(model, PROMPT, DECODE_STEPS)
    injected = inject(copy.deepcopy(model), dtype=torch.float32, max_context=127)
    tokens, logits = run_greedy(injected, DECODE_STEPS)
    assert tokens == expected_tokens
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert op.decode_steps == DECODE_STEPS


def test_gpt_neo_past_its_window_differs_which_is_why_the_guard_refuses_it(
    op: Any, make_model: Any, greedy_reference: Any
) -> None:
    """The prompt is right at any length; the first decode step with a full window is not."""
    model = make_model("gpt_neo", window_size=40)
    tokens, expected = greedy_reference(model, PROMPT, 20)
    injected = inject(copy.deepcopy(model), dtype=torch.float32, max_context=128)
    with injected.begin(max_tokens=100) as request:
        rows = [request.prefill(torch.tensor([PROMPT]))[0]]
        rows += [request.decode_one_token(torch.tensor([[token]]))[0] for token in tokens]
    errors = (torch.stack(rows) - expected).abs().amax(-1)
    assert float(errors[:10].max()) < 1e-4  # up to 39 tokens
    assert float(errors[10]) > 1e-2  # the 40th


@pytest.mark.parametrize("layers", [2, 12])
def test_fp16_rounding_alone_stays_well_inside_the_gates_limit(
    layers: int,
    op: Any,
    make_model: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both paths in FP16, the stand-in rounding where the CUDA kernels do."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "supported_dtypes", lambda: [torch.float16])
    model = make_model(layers=layers, context=64).half()
    platform = Platform(
        device=torch.device("cpu"),
        dtype=torch.float16,
        name="stand-in",
        capability=None,
        free_bytes=lambda: 10**12,
        is_stand_in=True,
    )
    _, verdict = loader.prove_and_inject(model, guards.check_model(model.config), platform)
    limit = parity.tolerance(torch.float16, layers)
    assert verdict.status is ParityStatus.PASSED
    assert 1e-5 < verdict.max_relative_error < limit / 2
