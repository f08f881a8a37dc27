"""Figures that others published, as data with a source. Nothing here is typed into a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from gptjet.benchmarks.config import SweepConfig


class PublishedLevel(BaseModel):
    """One side of a published comparison: tokens/s (with its SD) or ms a token, as it was given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: str
    weight_type: str
    tokens_per_s: float | None = Field(default=None, gt=0)
    tokens_per_s_sd: float | None = Field(default=None, ge=0)
    ms_per_token: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.tokens_per_s is None) == (self.ms_per_token is None):
            raise ValueError("give tokens_per_s or ms_per_token")
        return self

    @property
    def rate(self) -> float:
        """Tokens/s, converted where ms a token was published."""
        if self.tokens_per_s is not None:
            return self.tokens_per_s
        assert self.ms_per_token is not None, "the validator sees to it"
        return 1000 / self.ms_per_token


class PublishedResult(BaseModel):
    """A published comparison on one card. Reductions are shares of the baseline's latency.

    same_design  of the lengths and repetitions that the sweep replays, so that means compare
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    experiment: str
    source: str = Field(min_length=1)
    instance: str
    same_design: bool = True
    baseline: PublishedLevel
    treatment: PublishedLevel
    latency_reduction: float | None = None
    latency_reduction_sd: float | None = None
    latency_reduction_by_input: Mapping[int, float] = Field(default_factory=dict)
    quoted_step_ms: float | None = Field(default=None, gt=0)


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Two figures of one source that cannot both be the time of one token."""

    hardware: str
    experiment: str
    quoted_step_ms: float
    tokens_per_s: float

    @property
    def implied_step_ms(self) -> float:
        """The time of a token that the published rate means."""
        return 1000 / self.tokens_per_s

    def sentence(self) -> str:
        """For a reader of the report."""
        times = self.quoted_step_ms / self.implied_step_ms
        return (
            f"Published, {self.experiment}, {self.hardware}: {self.quoted_step_ms:.0f} ms a step "
            f"is quoted before optimisation, while the published {self.tokens_per_s:g} tokens/s of "
            f"the same baseline are {self.implied_step_ms:.1f} ms a token, {times:.1f} times less. "
            f"The two disagree and the source does not say what a step was; the comparison here "
            f"uses the tokens/s."
        )


def disagreements(configs: Sequence[SweepConfig]) -> list[Disagreement]:
    """Every published result whose quoted step time is over 10 % off what its rate implies."""
    found = []
    for config in configs:
        for result in config.published:
            if result.quoted_step_ms is None:
                continue
            implied = 1000 / result.baseline.rate
            if abs(result.quoted_step_ms / implied - 1) > 0.1:
                found.append(
                    Disagreement(
                        config.hardware.name,
                        result.experiment,
                        result.quoted_step_ms,
                        result.baseline.rate,
                    )
                )
    return found
