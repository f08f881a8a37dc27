"""One training run: optimiser steps, validation, weight averaging, checkpoints and resume.

Everything random is derived from (seed, epoch, step), never from a running generator, so a run
that is interrupted and resumed takes bit for bit the steps of one that was not.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn import functional

from gptjet.service.training.corpus import LABELS, Row
from gptjet.service.training.model import (
    copy_attention_loss,
    embedded_config,
    lm_logits,
    new_model,
    training_forward,
    training_hidden,
)
from gptjet.service.training.samples import Batch, SampleBuilder
from gptjet.service.training.scoring import decide, label_log_probs, label_token_ids

if TYPE_CHECKING:
    from transformers import GPTJForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class RunConfig:
    """What determines a run's result, beside the corpus and the code."""

    seed: int = 20140530
    layers: int = 4
    width: int = 256
    heads: int = 4
    epochs: int = 5
    # The learning rate follows a cosine over `horizon_epochs`, cut short by a linear cool-down over
    # the last `cooldown_epochs`: before that, a run does not depend on how long it will be.
    horizon_epochs: int = 9
    cooldown_epochs: float = 1.0
    batch_tokens: int = 1280
    peak_learning_rate: float = 1.5e-3
    warmup_share: float = 0.02
    weight_decay: float = 0.1
    dropout: float = 0.05
    average_decay: float = 0.998
    # Weights of the four losses; next-token loss is the unit.
    label_weight: float = 1.0
    rating_weight: float = 0.5
    copy_weight: float = 0.5
    # Labels weigh frequency ** -label_balance: the measure is macro-F1, "neutral" is the rarest.
    label_balance: float = 0.5
    bfloat16: bool = True


@dataclass
class Progress:
    """How far a run has come, and the best validation so far."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    best_epoch: int = -1
    best_macro_f1: float = -1.0
    history: list[dict[str, float]] = field(default_factory=list)


class TrainingRun:
    """The state of one run; `train` takes it to the end, from wherever it stands."""

    def __init__(
        self,
        config: RunConfig,
        builder: SampleBuilder,
        tokenizer: PreTrainedTokenizerFast,
        validation: Sequence[Row],
        folder: Path,
    ) -> None:
        self.config = config
        self.progress = Progress()
        self._builder = builder
        self.tokenizer = tokenizer
        self._validation = list(validation)
        self._folder = folder
        self._label_ids = torch.tensor(label_token_ids(tokenizer))
        shape = embedded_config(
            layers=config.layers,
            width=config.width,
            heads=config.heads,
            vocab_size=len(tokenizer),
        )
        self.model = new_model(shape, config.seed)
        # Reads the mean rating off the label position: a finer signal than three classes. It is
        # not part of the checkpoint.
        self._rating_head = nn.Linear(config.width, 1)
        self._average = new_model(shape, config.seed).requires_grad_(False)
        self._best = {name: value.clone() for name, value in self._average.state_dict().items()}
        self._label_weights = torch.ones(len(LABELS))
        self._optimizer = torch.optim.AdamW(
            _parameter_groups([self.model, self._rating_head], config.weight_decay),
            lr=config.peak_learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        )

    @property
    def finished(self) -> bool:
        """Whether all epochs have been trained."""
        return self.progress.epoch >= self.config.epochs

    def best_model(self) -> GPTJForCausalLM:
        """The averaged weights of the best validated epoch, in FP32."""
        self._average.load_state_dict(self._best)
        return self._average

    def balance_labels(self, rows: Sequence[Row]) -> None:
        """Set label weights from the label frequencies of the train rows."""
        counts = torch.tensor([sum(row.label == label for row in rows) for label in LABELS])
        weights = (counts.clamp(min=1) / counts.sum()) ** -self.config.label_balance
        self._label_weights = weights / weights.mean()

    def train(
        self,
        *,
        checkpoint_every: int = 250,
        stop_after: int | None = None,
        on_step: Callable[[Progress, int, float], None] | None = None,
        on_epoch: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        """Train to the end, or for `stop_after` steps; checkpoints land in the run's folder.

        `on_step(progress, steps_in_epoch, loss)` and `on_epoch(figures)` report.
        """
        taken = 0
        while not self.finished:
            groups = self._builder.groups(self.progress.epoch, self.config.batch_tokens)
            while self.progress.step_in_epoch < len(groups):
                if stop_after is not None and taken >= stop_after:
                    self.save()
                    return
                started = time.perf_counter()
                index = self.progress.step_in_epoch
                batch = self._builder.batch(groups[index], self.progress.epoch, index)
                loss = self._step(batch, (self.progress.epoch + index / len(groups)))
                self.progress.step_in_epoch += 1
                self.progress.step += 1
                self.progress.seconds += time.perf_counter() - started
                taken += 1
                if on_step is not None:
                    on_step(self.progress, len(groups), loss)
                if self.progress.step % checkpoint_every == 0:
                    self.save()
            figures = self._validate()
            self.progress.epoch += 1
            self.progress.step_in_epoch = 0
            self.save()
            if on_epoch is not None:
                on_epoch(figures)

    def _step(self, batch: Batch, position: float) -> float:
        config = self.config
        rate = config.peak_learning_rate * learning_rate_factor(config, position)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(config.seed * 1_000_003 + self.progress.step)
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
            loss = self._loss(batch)
        torch.autograd.backward([loss])
        parameters = [*self.model.parameters(), *self._rating_head.parameters()]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self._optimizer.step()
        # The average forgets its random start: early on it follows the weights more closely.
        decay = min(config.average_decay, (1 + self.progress.step) / (10 + self.progress.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self._average.parameters()), list(self.model.parameters()), 1.0 - decay
            )
        return float(loss.detach())

    def _loss(self, batch: Batch) -> Tensor:
        forward = training_forward(self.model, batch.input_ids, self.config.dropout)
        hidden = forward.hidden
        kept = batch.weights > 0
        logits = lm_logits(self.model, hidden[kept]).float()
        per_token = functional.cross_entropy(logits, batch.targets[kept], reduction="none")
        weights = batch.weights[kept]
        loss = (per_token * weights).sum() / weights.sum().clamp(min=1.0)
        asked = (batch.label_at >= 0).nonzero().squeeze(1)
        if len(asked):
            at_label = hidden[asked, batch.label_at[asked]]
            log_probs = lm_logits(self.model, at_label).float().log_softmax(-1)
            target = batch.label_target[asked] * self._label_weights
            label_loss = -(log_probs[:, self._label_ids] * target).sum(-1).mean()
            rating = self._rating_head(at_label).float().squeeze(-1)
            rating_loss = functional.mse_loss(rating, batch.rating[asked])
            loss = loss + self.config.label_weight * label_loss
            loss = loss + self.config.rating_weight * rating_loss
            looking = copy_attention_loss(
                forward.query,
                forward.key,
                batch.input_ids,
                batch.targets,
                batch.label_at,
                batch.copies,
            )
            loss = loss + self.config.copy_weight * looking
        return loss

    def _validate(self) -> dict[str, float]:

        def logits_of(input_ids: Tensor) -> Tensor:
            return lm_logits(self._average, training_hidden(self._average, input_ids))

        log_probs = label_log_probs(
            logits_of, self.tokenizer, [row.text for row in self._validation]
        )
        truth = [row.label for row in self._validation]
        decided = decide(log_probs)
        right = sum(guess == label for guess, label in zip(decided, truth, strict=True))
        chosen = log_probs[torch.arange(len(truth)), [LABELS.index(label) for label in truth]]
        figures = {
            "epoch": float(self.progress.epoch + 1),
            "macro_f1": float(f1_score(truth, decided, average="macro", labels=list(LABELS))),
            "accuracy": right / len(truth),
            "label_nll": -float(chosen.mean()),
        }
        self.progress.history.append(figures)
        if figures["macro_f1"] > self.progress.best_macro_f1:
            self.progress.best_macro_f1 = figures["macro_f1"]
            self.progress.best_epoch = self.progress.epoch + 1
            self._best = {name: v.clone() for name, v in self._average.state_dict().items()}
        return figures

    def save(self) -> None:
        """Write the run's checkpoint, atomically: a killed run leaves the previous one whole."""
        self._folder.mkdir(parents=True, exist_ok=True)
        state = {
            "config": dataclasses.asdict(self.config),
            "progress": dataclasses.asdict(self.progress),
            "model": self.model.state_dict(),
            "rating_head": self._rating_head.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "average": self._average.state_dict(),
            "best": self._best,
        }
        partial = checkpoint_path(self._folder).with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(checkpoint_path(self._folder))

    def resume(self) -> bool:
        """Continue from the folder's checkpoint; False when there is none.

        Raises ValueError when the checkpoint's steps are not those of this configuration.
        """
        path = checkpoint_path(self._folder)
        if not path.exists():
            return False
        state: dict[str, Any] = torch.load(path, weights_only=True)
        progress = Progress(**state["progress"])
        # A begun epoch counts as a whole one: how long it is, is not recorded.
        position = progress.epoch + (progress.step_in_epoch > 0)
        same_options = state["config"].keys() == dataclasses.asdict(self.config).keys()
        if not (same_options and same_until(RunConfig(**state["config"]), self.config, position)):
            raise ValueError(
                f"{path} belongs to a run with another configuration; "
                "use its options, another --run-dir, or --restart"
            )
        self.progress = progress
        self.model.load_state_dict(state["model"])
        self._rating_head.load_state_dict(state["rating_head"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._average.load_state_dict(state["average"])
        self._best = state["best"]
        return True


def checkpoint_path(folder: Path) -> Path:
    """Where a run in `folder` keeps its state."""
    return folder / "run.pt"


def learning_rate_factor(config: RunConfig, position: float) -> float:
    """Share of the peak learning rate at `position`, in epochs since the start.

    Linear warm-up, then a cosine to 2 % at the horizon, times a linear cool-down to 2 %.
    """
    warmup = config.warmup_share
    done = position / config.horizon_epochs
    if done < warmup:
        factor = max(done, 1e-3) / warmup
    else:
        cosine = math.cos(math.pi * (min(done, 1.0) - warmup) / (1.0 - warmup))
        factor = 0.02 + 0.98 * 0.5 * (1.0 + cosine)
    left = (config.epochs - position) / config.cooldown_epochs
    return factor * max(0.02, min(1.0, left))


def same_until(saved: RunConfig, wanted: RunConfig, position: float) -> bool:
    """Whether both configurations take the same steps up to `position`, in epochs.

    True for equal ones, and for two lengths of a run as long as neither cools down yet.
    """
    if dataclasses.replace(saved, epochs=wanted.epochs) != wanted:
        return False
    if saved.epochs == wanted.epochs:
        return True
    return position <= min(saved.epochs, wanted.epochs) - wanted.cooldown_epochs


def _parameter_groups(modules: Sequence[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices; leave biases and LayerNorm gains alone."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
