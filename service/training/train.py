"""Train the embedded checkpoint: `python -m gptjet.service.training.train`."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gptjet.service.training.corpus import (
    Corpus,
    CorpusError,
    fetch_sdist,
    load_corpus,
    verify_sdist,
)
from gptjet.service.training.explain import ToneLexicon, build_tone_lexicon
from gptjet.service.training.export import export_checkpoint, write_heldout
from gptjet.service.training.loop import Progress as RunProgress
from gptjet.service.training.loop import RunConfig, TrainingRun, checkpoint_path
from gptjet.service.training.samples import SampleBuilder, answer_for
from gptjet.service.training.tokenizer import train_tokenizer

LOG_EVERY = 50

_COLUMNS = (
    TextColumn("epoch {task.completed:.2f} of {task.total}"),
    BarColumn(),
    TextColumn("loss {task.fields[loss]:.3f}"),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)

_DESCRIPTION = """\
Train the embedded checkpoint, a four-layer GPT-J, on the rated texts that the vaderSentiment
3.3.2 source distribution carries (MIT licence). Takes about half an hour on two CPU cores."""

_EPILOG = """\
examples:
  train                                 fetch the texts with pip, train, write the package data
  train --sdist FILE.tar.gz             the same from a copy of the source distribution
  train                                 again after an interruption: goes on where it stopped
  train --epochs 1 --output build/try   a quick trial that leaves the package data alone

Then measure it:  python -m gptjet.service.training.evaluate"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command; defaults reproduce the shipped checkpoint."""
    defaults = RunConfig()
    parser = argparse.ArgumentParser(
        prog="python -m gptjet.service.training.train",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sdist", type=Path, help="vaderSentiment-3.3.2.tar.gz, instead of pip")
    parser.add_argument(
        "--cache-dir", type=Path, default=Path("build/corpus"), help="where pip's download is kept"
    )
    parser.add_argument(
        "--run-dir", type=Path, default=Path("build/embedded-run"), help="checkpoints of the run"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("service/embedded"),
        help="where package data is written",
    )
    parser.add_argument("--epochs", type=positive, default=defaults.epochs, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="(%(default)s)")
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads (%(default)s)")
    parser.add_argument(
        "--checkpoint-every", type=positive, default=250, metavar="STEPS", help="(%(default)s)"
    )
    parser.add_argument("--restart", action="store_true", help="discard the run's checkpoint")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 matrix products")
    for item in dataclasses.fields(RunConfig):
        if item.name not in {"epochs", "seed", "bfloat16"}:
            flag = f"--{item.name.replace('_', '-')}"
            kind = positive if isinstance(item.default, int) else float
            parser.add_argument(flag, type=kind, default=item.default, help="(%(default)s)")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """A flag's whole number. Raises argparse.ArgumentTypeError below 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def run_config(options: argparse.Namespace) -> RunConfig:
    """The run configuration that the options describe."""
    names = {item.name for item in dataclasses.fields(RunConfig)} - {"bfloat16"}
    return RunConfig(**{name: getattr(options, name) for name in names}, bfloat16=not options.fp32)


def tokenizer_texts(corpus: Corpus, tones: ToneLexicon) -> list[str]:
    """What the tokenizer learns from: train texts as the model will see them, with answers."""
    return [
        f"Text: {row.text}\nSentiment:{answer_for(row.text, row.mean_rating, tones)}"
        for row in corpus.train
    ]


def start_run(config: RunConfig, corpus: Corpus, tones: ToneLexicon, folder: Path) -> TrainingRun:
    """A fresh run over `corpus` whose checkpoints live in `folder`."""
    tokenizer = train_tokenizer(tokenizer_texts(corpus, tones))
    builder = SampleBuilder(corpus, tokenizer, tones, config.seed)
    run = TrainingRun(config, builder, tokenizer, corpus.validation, folder)
    run.balance_labels(corpus.train)
    return run


def _train_with_progress(run: TrainingRun, checkpoint_every: int) -> None:
    """Train to the end under a bar over the whole run with loss and time left.

    Where there is no terminal, a line every LOG_EVERY steps takes the bar's place.
    """
    console = Console(stderr=True)
    smooth: float | None = None
    with Progress(*_COLUMNS, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(
            "training", total=run.config.epochs, completed=run.progress.epoch, loss=0
        )

        def on_step(progress: RunProgress, steps_in_epoch: int, loss: float) -> None:
            nonlocal smooth
            smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
            done = progress.epoch + progress.step_in_epoch / steps_in_epoch
            bar.update(task, completed=done, loss=smooth)
            if not console.is_terminal and progress.step % LOG_EVERY == 0:
                left = (run.config.epochs - done) * progress.seconds / done / 60
                console.print(
                    f"epoch {done:.2f} of {run.config.epochs}, step {progress.step}, "
                    f"loss {smooth:.3f}, {left:.0f} min left"
                )

        def on_epoch(figures: dict[str, float]) -> None:
            console.print(
                f"epoch {figures['epoch']:.0f}: validation macro-F1 {figures['macro_f1']:.3f}, "
                f"accuracy {figures['accuracy']:.3f}, label NLL {figures['label_nll']:.3f}"
            )

        run.train(checkpoint_every=checkpoint_every, on_step=on_step, on_epoch=on_epoch)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 130 where it was interrupted."""
    options = parse_arguments(arguments)
    try:
        return _train(options)
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; the same command goes on after the last checkpoint in "
            f"{options.run_dir}",
            file=sys.stderr,
        )
        return 130


def _train(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    config = run_config(options)
    try:
        sdist = options.sdist or fetch_sdist(options.cache_dir)
        verify_sdist(sdist)
        corpus = load_corpus(sdist)
    except CorpusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.restart and checkpoint_path(options.run_dir).exists():
        shutil.rmtree(options.run_dir)
    tones = build_tone_lexicon(corpus.lexicon, corpus.train)
    run = start_run(config, corpus, tones, options.run_dir)
    try:
        resumed = run.resume()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = f"{len(corpus.train)} train, {len(corpus.validation)} validation"
    print(f"{counts} and {len(corpus.test)} held-out texts", file=sys.stderr)
    if resumed:
        done = run.progress
        print(f"resuming at epoch {done.epoch + 1}, step {done.step}", file=sys.stderr)
    _train_with_progress(run, options.checkpoint_every)
    export_checkpoint(run, corpus, options.output)
    write_heldout(corpus.test, options.output / "heldout.jsonl")
    print(f"wrote {options.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
