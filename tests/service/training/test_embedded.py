"""The shipped checkpoint: what it is, what it decides, and that its recorded figures are true."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTJForCausalLM

from gptjet.service.embedded import (
    LABELS,
    build_prompt,
    embedded_path,
    heldout_rows,
)
from gptjet.service.training.answers import answers_for, occurs, parse_answer
from gptjet.service.training.card import card
from gptjet.service.training.corpus import Row, fingerprint, label_for, normalised_key
from gptjet.service.training.evaluate import decode_decisions, encode_decisions
from gptjet.service.training.measures import figures_for
from gptjet.service.training.scoring import (
    decide,
    label_log_probs,
    label_token_ids,
    model_logits,
    prompt_ids,
)

# Every 25th held-out row: about a hundred, a few seconds on one core.
SUBSET = slice(0, None, 25)


@pytest.fixture(scope="module")
def folder() -> Path:
    return embedded_path()


@pytest.fixture(scope="module", autouse=True)
def no_network() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*args: object, **kwargs: object) -> None:
            raise AssertionError("the embedded checkpoint must load without a network")

        patch.setattr("socket.socket.connect", refuse)
        yield


@pytest.fixture(scope="module")
def model(folder: Path) -> GPTJForCausalLM:
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return cast(GPTJForCausalLM, loaded)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads((folder / "evaluation.json").read_text("utf-8")))


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads((folder / "training.json").read_text("utf-8")))


def test_weights_are_small_finite_half_precision(folder: Path) -> None:
    assert (folder / "model.safetensors").stat().st_size <= 16_000_000
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert {"lm_head.weight", "lm_head.bias", "transformer.wte.weight"} <= set(weights.keys())
        for name in weights.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.float16, name
            assert torch.isfinite(tensor).all(), name


def test_it_is_a_genuine_gptj_with_partial_rotary_and_its_own_output_layer(
    model: GPTJForCausalLM,
) -> None:
    config = model.config
    assert type(model) is GPTJForCausalLM
    assert (config.n_layer, config.n_embd, config.n_head) == (4, 256, 4)
    assert (config.rotary_dim, config.n_positions, config.vocab_size) == (32, 512, 4096)
    assert config.tie_word_embeddings is False
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert model.lm_head.bias is not None


@pytest.mark.parametrize(
    "text",
    [
        "The food was wonderful.",
        "na\u00efve caf\u00e9 \u2013 \u00a35",
        "so happy \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 :-) <3",
        "\u6f22\u5b57 \u0440\u0443\u0441\u0441\u043a\u0438\u0439",
        "tabs\tand\n\nlines  and   spaces ",
        bytes(range(1, 128)).decode(),
    ],
)
def test_tokenizer_round_trips_any_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_end_of_text_and_labels_are_single_tokens(tokenizer: Any) -> None:
    assert len(tokenizer) == 4096
    assert tokenizer.eos_token_id == 0
    assert tokenizer.encode("<|endoftext|>", add_special_tokens=False) == [0]
    assert len(set(label_token_ids(tokenizer))) == len(LABELS)


def test_heldout_rows_are_the_recorded_split(
    record: dict[str, Any], result: dict[str, Any]
) -> None:
    rows = heldout_rows()
    as_rows = [Row(r.id, r.source, "", r.text, r.mean_rating, r.label) for r in rows]
    assert fingerprint(as_rows) == record["fingerprints"]["test"] == result["heldout_fingerprint"]
    assert len(rows) == record["rows"]["test"] == result["figures"]["embedded"]["rows"]
    assert len({row.id for row in rows}) == len(rows)
    assert len({normalised_key(row.text) for row in rows}) == len(rows)
    assert all(row.label == label_for(row.mean_rating) for row in rows)
    assert {row.source for row in rows} == {"amazon", "editorial", "movie", "tweet"}


def test_recorded_decisions_are_made_again(
    model: GPTJForCausalLM, tokenizer: Any, result: dict[str, Any]
) -> None:
    rows = heldout_rows()[SUBSET]
    recorded = decode_decisions(result["decisions"])[SUBSET]
    log_probs = label_log_probs(model_logits(model), tokenizer, [row.text for row in rows])
    decided = decide(log_probs)
    best_two = log_probs.topk(2, dim=-1).values
    # Another CPU may round a tie differently; anything clearer must come out the same.
    for row, now, then, gap in zip(
        rows, decided, recorded, best_two[:, 0] - best_two[:, 1], strict=True
    ):
        assert now == then or gap < 1e-3, row.id


def test_recorded_figures_follow_from_the_recorded_decisions(result: dict[str, Any]) -> None:
    truth = [row.label for row in heldout_rows()]
    figures = figures_for(truth, decode_decisions(result["decisions"]))
    recorded = result["figures"]["embedded"]
    assert figures.macro_f1 == pytest.approx(recorded["macro_f1"], abs=1e-12)
    assert figures.accuracy == pytest.approx(recorded["accuracy"], abs=1e-12)
    assert figures.confusion == recorded["confusion"]


def test_recorded_macro_f1_and_accuracy_are_above_vader(result: dict[str, Any]) -> None:
    ours, vader = result["figures"]["embedded"], result["figures"]["vader"]
    assert ours["rows"] == vader["rows"]
    assert ours["macro_f1"] > vader["macro_f1"] + 0.02
    assert ours["accuracy"] > vader["accuracy"]


def test_recorded_parity_of_saved_and_trained_weights(result: dict[str, Any]) -> None:
    parity = result["parity"]
    assert parity["rows"] == len(heldout_rows())
    assert parity["max_weight_difference"] < 1e-3
    assert parity["same_decisions"] > 0.995
    assert parity["half_arithmetic_same_decisions"] > 0.99


def test_half_precision_arithmetic_agrees_with_single(
    model: GPTJForCausalLM, tokenizer: Any, folder: Path
) -> None:
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    texts = [row.text for row in heldout_rows()[::125]]
    expected = label_log_probs(model_logits(model), tokenizer, texts)
    got = label_log_probs(model_logits(cast(GPTJForCausalLM, half)), tokenizer, texts)
    torch.testing.assert_close(got, expected, atol=0.05, rtol=0.01)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("The food was wonderful.", "positive"),
        ("The staff were rude and the room was horrible.", "negative"),
        ("The train leaves at nine on Monday.", "neutral"),
    ],
)
def test_plain_cases_are_answered_to_the_end(
    model: GPTJForCausalLM, tokenizer: Any, text: str, label: str
) -> None:
    (raw,) = answers_for(model, tokenizer, [text])
    answer = None if raw is None else parse_answer(raw)
    assert answer is not None, raw
    assert answer.label == label
    assert all(occurs(words, text) for words, _ in answer.named)


def test_a_text_longer_than_the_context_is_cut_inside_the_prompt(tokenizer: Any) -> None:
    ids = prompt_ids(tokenizer, "good " * 2000)
    assert len(ids) <= 512 - 40
    assert tokenizer.decode(ids).endswith("\nSentiment:")


def test_prompts_are_one_line_of_text() -> None:
    assert build_prompt(" two\n lines\t") == "Text: two lines\nSentiment:"


def test_decisions_survive_their_encoding() -> None:
    assert decode_decisions(encode_decisions(LABELS)) == list(LABELS)


def test_the_model_card_is_the_one_its_figures_give(
    folder: Path, record: dict[str, Any], result: dict[str, Any]
) -> None:
    assert (folder / "MODEL_CARD.md").read_text("utf-8") == card(record, result)


def test_the_data_licence_is_shipped(folder: Path) -> None:
    notice = (folder / "LICENSE-DATA.txt").read_text("utf-8")
    assert "The MIT License" in notice
    assert "C.J. Hutto" in notice
