"""The graph DeepSpeed injects, driven by our step loop on the stand-in, against transformers."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch

from gptjet.service.backends.deepspeed.injected_model import InjectedModel, WorkspaceBusyError
from gptjet.service.backends.deepspeed.injection import inject
from gptjet.service.engine.errors import BackendLoadError, InvalidRequestError

DECODE_STEPS = 64


def injected(model: torch.nn.Module, **kwargs: Any) -> InjectedModel:
    return inject(copy.deepcopy(model), dtype=torch.float32, max_context=128, **kwargs)


def prompt_of(length: int, vocab: int = 97, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (length,), generator=generator).tolist()


def run_greedy(
    model: InjectedModel, prompt: list[int], steps: int
) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and the logits [steps + 1, V] they came from."""
    with model.begin(max_tokens=len(prompt) + steps) as request:
        rows, tokens = [request.prefill(torch.tensor([prompt]))[0]], []
        for _ in range(steps):
            tokens.append(int(rows[-1].argmax()))
            rows.append(request.decode_one_token(torch.tensor([tokens[-1:]]))[0])
    return tokens, torch.stack(rows)


GPTJ_GEOMETRIES = [
    pytest.param({"layers": 1, "heads": 1, "head_dim": 8, "rotary_dim": 8}, id="1x8-all-rotary"),
    pytest.param({"layers": 2, "heads": 4, "head_dim": 16, "rotary_dim": 8}, id="4x16-rotary8"),
    pytest.param({"layers": 3, "heads": 2, "head_dim": 64, "rotary_dim": 32}, id="2x64-rotary32"),
    pytest.param({"layers": 2, "heads": 1, "head_dim": 256, "rotary_dim": 64}, id="gptj-head-256"),
]


@pytest.mark.parametrize("geometry", GPTJ_GEOMETRIES)
def test_injected_gptj_equals_transformers_over_prompt_and_64_decode_steps(
    geometry: dict[str, Any], op: Any, make_model: Any, greedy_reference: Any
) -> None:
    model = make_model("gptj", **geometry)
    prompt = prompt_of(37)
    expected_tokens, expected = greedy_reference(model, prompt, DECODE_STEPS)

    tokens, logits = run_greedy(injected(model), prompt, DECODE_STEPS)

    assert tokens == expected_tokens
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    # the injected blocks ran, not transformers' own
    assert (op.prompts, op.decode_steps) == (1, DECODE_STEPS)


def test_one_token_prompt_starts_at_position_zero_after_a_longer_request(
    op: Any, make_model: Any, greedy_reference: Any
) -> None:
    model = make_model()
    expected_tokens, expected = greedy_reference(model, [5], 20)
    subject = injected(model)
    run_greedy(subject, prompt_of(30), 10)

    tokens, logits = run_greedy(subject, [5], 20)

    assert tokens == expected_tokens
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_all_prompt_logits_equal_transformers(op: Any, make_model: Any) -> None:
    model = make_model(context=256)
    prompt = torch.tensor([prompt_of(200)])  # more than one chunk of logits
    with torch.inference_mode():
        expected = model(prompt).logits
    subject = inject(copy.deepcopy(model), dtype=torch.float32, max_context=256)
    with subject.begin(max_tokens=200) as request:
        last, earlier = request.prefill_all_positions(prompt)
    torch.testing.assert_close(earlier, expected[:, :-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(last, expected[:, -1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["gptj", "gpt2", "gpt_neo"])
def test_left_padded_static_batch_gives_each_row_what_it_gives_alone(
    family: str, op: Any, make_model: Any, greedy_reference: Any
) -> None:
    model = make_model(family)
    prompts = [prompt_of(3, seed=1), prompt_of(17, seed=2), prompt_of(9, seed=3)]
    alone = [greedy_reference(model, prompt, 24)[0] for prompt in prompts]
    assert injected(model).generate_greedy(prompts, 24) == alone


def test_static_batch_row_ends_at_its_eos_and_the_others_go_on(
    op: Any, make_model: Any, greedy_reference: Any
) -> None:
    model = make_model()
    prompts = [prompt_of(6, seed=4), prompt_of(8, seed=5)]
    alone = [greedy_reference(model, prompt, 20)[0] for prompt in prompts]
    eos = alone[0][3]
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in alone]
    assert injected(model).generate_greedy(prompts, 20, eos_token_id=eos) == expected


def test_larger_batch_than_the_first_makes_a_new_workspace(
    op: Any, make_model: Any, greedy_reference: Any
) -> None:
    """The stand-in raises where CUDA would write past the workspace of the first batch."""
    model = make_model()
    subject = injected(model)
    prompts = [prompt_of(5, seed=n) for n in range(3)]
    alone = [greedy_reference(model, prompt, 4)[0] for prompt in prompts]
    assert subject.generate_greedy(prompts[:1], 4) == alone[:1]
    assert subject.generate_greedy(prompts, 4) == alone
    assert subject.generate_greedy(prompts[1:2], 4) == alone[1:2]
    assert op.allocations == 3


def test_workspace_is_kept_between_requests_of_one_size(op: Any, make_model: Any) -> None:
    subject = injected(make_model())
    for _ in range(3):
        run_greedy(subject, prompt_of(4), 2)
    assert op.allocations == 1


def test_batch_that_cannot_fit_is_refused_before_a_workspace_is_made(
    op: Any, make_model: Any
) -> None:
    def refuse(batch_size: int, held_batch: int) -> None:
        if batch_size > 1:
            raise InvalidRequestError

    subject = injected(make_model(), check_batch=refuse)
    with pytest.raises(InvalidRequestError):
        subject.generate_greedy([[1], [2]], 2)
    assert op.allocations == 0
    assert len(subject.generate_greedy([[1]], 2)[0]) == 2  # and the lock is free again


def test_request_past_the_workspace_is_refused_before_the_first_step(
    op: Any, make_model: Any
) -> None:
    subject = injected(make_model())
    with pytest.raises(InvalidRequestError, match=r"129 tokens.*made for 128"):
        subject.begin(max_tokens=129)
    assert op.prompts == 0
    run_greedy(subject, prompt_of(64), 64)  # exactly full is fine


def test_step_past_what_the_request_asked_for_is_refused(op: Any, make_model: Any) -> None:
    subject = injected(make_model())
    with subject.begin(max_tokens=5) as request:
        with pytest.raises(InvalidRequestError, match="token 6"):
            request.prefill(torch.tensor([prompt_of(6)]))
        request.prefill(torch.tensor([prompt_of(5)]))
        with pytest.raises(InvalidRequestError, match="token 6"):
            request.decode_one_token(torch.tensor([[1]]))
    assert op.decode_steps == 0


def test_second_prefill_and_early_decode_are_refused(op: Any, make_model: Any) -> None:
    subject = injected(make_model())
    with subject.begin(max_tokens=20) as request:
        with pytest.raises(RuntimeError, match="decode before prefill"):
            request.decode_one_token(torch.tensor([[1]]))
        request.prefill(torch.tensor([[1, 2, 3]]))
        with pytest.raises(RuntimeError, match="prefill twice"):
            request.prefill(torch.tensor([[4, 5]]))
        with pytest.raises(ValueError, match="2 tokens a row"):
            request.decode_one_token(torch.tensor([[1, 2]]))
        with pytest.raises(ValueError, match="2 rows"):
            request.decode_one_token(torch.tensor([[1], [2]]))


def test_aborted_and_failed_requests_leave_the_next_one_clean(
    op: Any, make_model: Any, greedy_reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    subject = injected(model)
    prompt = prompt_of(11)
    expected = greedy_reference(model, prompt, 8)[0]

    request = subject.begin(max_tokens=100)
    request.prefill(torch.tensor([prompt_of(50)]))
    request.decode_one_token(torch.tensor([[3]]))
    request.end()  # the client went away
    assert run_greedy(subject, prompt, 8)[0] == expected

    request = subject.begin(max_tokens=100)
    request.prefill(torch.tensor([prompt_of(50)]))
    with monkeypatch.context() as patch:
        last_block = subject._blocks[-1]
        patch.setattr(last_block.mlp, "forward", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            request.decode_one_token(torch.tensor([[3]]))
    request.end()
    assert run_greedy(subject, prompt, 8)[0] == expected
    assert op.allocations == 2  # what a broken step left behind is not trusted


def test_threads_sharing_one_injected_model_get_what_they_get_alone(
    op: Any, make_model: Any, greedy_reference: Any
) -> None:
    model = make_model()
    prompts = [prompt_of(4 + 5 * n, seed=n) for n in range(4)]
    expected = [greedy_reference(model, prompt, 16)[0] for prompt in prompts]
    subject = injected(model)
    results: dict[int, list[int]] = {}

    def work(index: int) -> None:
        results[index] = run_greedy(subject, prompts[index], 16)[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[index] for index in range(4)] == expected


def test_workspace_in_use_is_reported_to_a_caller_that_would_not_wait(
    op: Any, make_model: Any
) -> None:
    subject = injected(make_model())
    with (
        subject.begin(max_tokens=4),
        pytest.raises(WorkspaceBusyError, match="one a process"),
    ):
        subject.begin(max_tokens=4, blocking=False)
    subject.begin(max_tokens=4, blocking=False).end()


def test_second_model_waits_until_the_first_is_closed(
    op: Any, make_model: Any, greedy_reference: Any
) -> None:
    first = injected(make_model())
    other = make_model(layers=3, seed=7)
    with pytest.raises(BackendLoadError, match="one KV workspace a process"):
        injected(other)
    first.close()
    with pytest.raises(RuntimeError, match="closed"):
        first.begin(max_tokens=4)
    prompt = prompt_of(9)
    assert run_greedy(injected(other), prompt, 8)[0] == greedy_reference(other, prompt, 8)[0]
    assert op.workspace.keys.shape[0] == 3  # layers of the second model alone


def test_injection_frees_what_deepspeed_keeps_and_never_reads(op: Any, make_model: Any) -> None:
    from deepspeed.module_inject import replace_module
    from deepspeed.ops.transformer.inference.ds_attention import DeepSpeedSelfAttention
    from deepspeed.ops.transformer.inference.ds_mlp import DeepSpeedMLP

    injected(make_model())
    assert replace_module.container_g is None
    assert DeepSpeedSelfAttention._qkv_buffers == []
    assert DeepSpeedMLP._inter_w_buffers == []


def test_model_deepspeed_has_no_kernels_for_is_refused(op: Any) -> None:
    from transformers import CodeGenConfig, CodeGenForCausalLM

    model = CodeGenForCausalLM(
        CodeGenConfig(n_layer=1, n_head=4, n_embd=64, n_positions=32, vocab_size=50, rotary_dim=8)
    )
    with pytest.raises(BackendLoadError, match="nothing to replace in CodeGenForCausalLM"):
        inject(model, dtype=torch.float32, max_context=32)
