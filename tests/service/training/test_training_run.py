"""Samples, the training forward, and a run that is interrupted and resumed."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path

import pytest
import torch

from gptjet.service.embedded import LABELS
from gptjet.service.training.corpus import Corpus
from gptjet.service.training.explain import ToneLexicon
from gptjet.service.training.export import export_checkpoint, save_half, write_heldout
from gptjet.service.training.loop import (
    RunConfig,
    TrainingRun,
    learning_rate_factor,
    same_until,
)
from gptjet.service.training.model import (
    copy_attention_loss,
    embedded_config,
    lm_logits,
    new_model,
    training_hidden,
)
from gptjet.service.training.samples import (
    SampleBuilder,
    collate,
    group_by_length,
    label_probabilities,
)
from gptjet.service.training.scoring import label_token_ids
from gptjet.service.training.tokenizer import train_tokenizer
from gptjet.service.training.train import main, parse_arguments, start_run, tokenizer_texts

TINY = RunConfig(
    layers=1, width=32, heads=2, epochs=3, batch_tokens=256, cooldown_epochs=1.0, bfloat16=False
)


@pytest.fixture
def builder(tiny_corpus: Corpus, tones: ToneLexicon) -> SampleBuilder:
    tokenizer = train_tokenizer(tokenizer_texts(tiny_corpus, tones) * 3)
    return SampleBuilder(tiny_corpus, tokenizer, tones, seed=1)


def new_run(
    corpus: Corpus, tones: ToneLexicon, folder: Path, config: RunConfig = TINY
) -> TrainingRun:
    return start_run(config, corpus, tones, folder)


def state_of(run: TrainingRun) -> dict[str, torch.Tensor]:
    best = run.best_model().state_dict()
    return {f"model.{k}": v for k, v in run.model.state_dict().items()} | dict(best)


def test_training_forward_is_the_transformers_forward() -> None:
    model = new_model(embedded_config(layers=2, width=128, heads=2, vocab_size=300), seed=3)
    ids = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        got = lm_logits(model, training_hidden(model, ids))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_copy_attention_loss_is_the_attention_paid_to_the_source() -> None:
    # Prompt 5 6 7 (ends at 2), answer 9 6: position 3 is to copy the 6 at position 1.
    input_ids = torch.tensor([[5, 6, 7, 9, 6]])
    targets = torch.tensor([[6, 7, 9, 6, 0]])
    copies = torch.tensor([[False, False, False, True, False]])
    label_at = torch.tensor([2])
    flat = torch.zeros(1, 2, 5, 4)
    # Equal scores: one of four visible positions is the source; the later 6 is not visible.
    even = copy_attention_loss(flat, flat, input_ids, targets, label_at, copies)
    assert even == pytest.approx(math.log(4))
    key = flat.clone()
    key[:, :, 1, 0] = 40.0
    sharp = copy_attention_loss(flat + 1.0, key, input_ids, targets, label_at, copies)
    assert sharp == pytest.approx(0.0, abs=1e-6)
    no_source = torch.tensor([[5, 8, 7, 9, 6]])
    assert copy_attention_loss(flat, flat, no_source, targets, label_at, copies) == 0.0


def test_prompt_samples_end_with_end_of_text_and_point_at_their_label(
    builder: SampleBuilder, tiny_corpus: Corpus, tones: ToneLexicon
) -> None:
    tokenizer = train_tokenizer(tokenizer_texts(tiny_corpus, tones) * 3)
    label_ids = label_token_ids(tokenizer)
    samples = builder.epoch(0)
    asked = [sample for sample in samples if sample.label_at >= 0]
    assert len(asked) >= len(tiny_corpus.train)
    for sample in asked:
        assert sample.ids[-1] == 0
        assert len(sample.ids) == len(sample.weights)
        assert (
            sample.ids[sample.label_at + 1]
            == label_ids[max(range(3), key=lambda index: sample.target[index])]
        )
        assert sample.weights[sample.label_at + 1] == 0.0  # the label has its own loss
        assert str(tokenizer.decode(list(sample.ids[: sample.label_at + 1]))).endswith(
            "\nSentiment:"
        )
        assert str(tokenizer.decode(list(sample.ids))).count("Explanation:") == 1


def test_label_probabilities_are_soft_near_a_threshold_and_sum_to_one() -> None:
    at_threshold = dict(zip(LABELS, label_probabilities(0.5), strict=True))
    assert at_threshold["positive"] == pytest.approx(0.5)
    assert at_threshold["neutral"] == pytest.approx(0.5, abs=0.01)
    assert sum(label_probabilities(-0.3)) == pytest.approx(1.0)
    assert label_probabilities(-3.0)[LABELS.index("negative")] > 0.999


def test_an_epoch_is_a_function_of_seed_and_number(builder: SampleBuilder) -> None:
    assert builder.epoch(2) == builder.epoch(2)
    assert builder.epoch(2) != builder.epoch(3)


def test_batches_hold_every_sample_once_within_the_token_budget(builder: SampleBuilder) -> None:
    samples = builder.epoch(0)
    groups = group_by_length(samples, 128, random.Random(0))
    assert sorted(s.ids for group in groups for s in group) == sorted(s.ids for s in samples)
    for group in groups:
        assert len(group) == 1 or len(group) * max(len(s.ids) for s in group) <= 128


def test_collate_shifts_targets_and_touches_only_the_text_with_noise(
    builder: SampleBuilder,
) -> None:
    group = [s for s in builder.epoch(0) if s.label_at >= 0][:20]
    batch = collate(group, random.Random(0), vocab_size=400)
    changed = 0
    for row, sample in enumerate(group):
        size = len(sample.ids)
        assert batch.targets[row, : size - 1].tolist() == list(sample.ids[1:])
        assert batch.weights[row, size - 1 :].sum() == 0.0
        for place in range(size):
            if int(batch.input_ids[row, place]) != sample.ids[place]:
                changed += 1
                assert sample.noisy[0] <= place < sample.noisy[1]
    assert changed > 0


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    tmp_path: Path, tiny_corpus: Corpus, tones: ToneLexicon
) -> None:
    whole = new_run(tiny_corpus, tones, tmp_path / "whole")
    whole.train()
    assert whole.finished

    stops = 0
    while True:
        part = new_run(tiny_corpus, tones, tmp_path / "parts")
        assert part.resume() == (stops > 0)
        part.train(stop_after=5)
        if part.finished:
            break
        stops += 1
    assert stops >= 2

    expected, got = state_of(whole), state_of(part)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert part.progress.history == whole.progress.history
    assert part.progress.step == whole.progress.step


def test_training_lowers_the_loss(tmp_path: Path, tiny_corpus: Corpus, tones: ToneLexicon) -> None:
    losses: list[float] = []
    run = new_run(tiny_corpus, tones, tmp_path, dataclasses.replace(TINY, epochs=6))
    run.train(on_step=lambda progress, steps, loss: losses.append(loss))
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_resuming_with_other_options_is_refused(
    tmp_path: Path, tiny_corpus: Corpus, tones: ToneLexicon
) -> None:
    new_run(tiny_corpus, tones, tmp_path).save()
    other = new_run(tiny_corpus, tones, tmp_path, dataclasses.replace(TINY, seed=2))
    with pytest.raises(ValueError, match="configuration"):
        other.resume()


def test_a_run_may_change_its_length_until_it_cools_down() -> None:
    five = RunConfig(epochs=5, cooldown_epochs=1.5)
    eight = dataclasses.replace(five, epochs=8)
    assert same_until(five, eight, 3.5)
    assert not same_until(five, eight, 4.0)
    assert not same_until(five, dataclasses.replace(eight, dropout=0.2), 0.0)
    for position in (0.0, 0.2, 1.0, 3.5):
        assert learning_rate_factor(five, position) == learning_rate_factor(eight, position)
    assert learning_rate_factor(five, 4.9) < 0.1 * learning_rate_factor(eight, 4.9)


def test_an_export_loads_as_half_precision_and_keeps_the_model(
    tmp_path: Path, tiny_corpus: Corpus, tones: ToneLexicon
) -> None:
    run = new_run(tiny_corpus, tones, tmp_path / "run")
    run.train(stop_after=3)
    export_checkpoint(run, tiny_corpus, tmp_path / "out")
    write_heldout(tiny_corpus.test, tmp_path / "out" / "heldout.jsonl")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "training.json"} <= names
    assert not any(name.endswith(".partial") for name in names)
    assert all(weight.dtype == torch.float32 for weight in run.model.state_dict().values())


def test_an_export_over_the_size_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptjet.service.training.export.MAX_WEIGHT_BYTES", 1000)
    model = new_model(embedded_config(layers=1, width=32, heads=2, vocab_size=300), seed=0)
    with pytest.raises(ValueError, match="1000"):
        save_half(model, tmp_path)


def test_an_export_that_fails_leaves_the_checkpoint_that_is_there(
    tmp_path: Path, tiny_corpus: Corpus, tones: ToneLexicon, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(tiny_corpus, tones, tmp_path / "run")
    run.train(stop_after=1)
    folder = tmp_path / "out"
    export_checkpoint(run, tiny_corpus, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run.train()  # the best weights are others now

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for name, failure in (("MAX_WEIGHT_BYTES", 1000), ("save_tokenizer", interrupted)):
        with monkeypatch.context() as patch:
            patch.setattr(f"gptjet.service.training.export.{name}", failure)
            with pytest.raises((ValueError, KeyboardInterrupt)):
                export_checkpoint(run, tiny_corpus, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("flag", ["--threads", "--epochs", "--checkpoint-every", "--layers"])
def test_a_number_below_one_is_refused_by_its_flag(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        parse_arguments([flag, "0"])
    assert done.value.code == 2
    assert f"argument {flag}: must be 1 or more, got 0" in capsys.readouterr().err


def test_a_run_that_is_interrupted_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gptjet.service.training.train.load_corpus", interrupted)
    monkeypatch.setattr("gptjet.service.training.train.verify_sdist", lambda _: None)
    assert main(["--sdist", str(tmp_path / "x.tar.gz")]) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err


def test_help_teaches_and_a_missing_archive_is_a_plain_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        parse_arguments(["--help"])
    assert done.value.code == 0
    assert "goes on where it stopped" in capsys.readouterr().out
    assert main(["--sdist", str(tmp_path / "absent.tar.gz")]) == 1
    assert "not a file" in capsys.readouterr().err
