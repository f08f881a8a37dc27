"""Cards and machines: what their datasheets say, and which one is present."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from gptjet.benchmarks.roofline import Rates, WeightType, matrix_rate

GIB = 2**30


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Instance(_Frozen):
    """What the hardware is rented as. `as_of` is the month the price was true.

    Of a source that gives no month it is the year.
    """

    name: str
    usd_per_hour: float = Field(gt=0)
    as_of: str = Field(pattern=r"^\d{4}(-\d{2}(-\d{2})?)?$")
    source: str = Field(min_length=1)


class Interconnect(_Frozen):
    """Between two cards: GB/s in one direction, and microseconds of one small all-reduce."""

    name: str
    gb_s: float = Field(gt=0)
    latency_us: float = Field(ge=0)
    source: str = Field(min_length=1)


class Hardware(_Frozen):
    """One kind of machine.

    device_pattern   regular expression that nvidia-smi's name of the card matches
    memory_gib       of one card, as the driver reports it; None: of the machine, read at run time
    bandwidth_gb_s   datasheet; None: there is none, only what is measured
    matrix_tflops    dense matrix rate by type: fp32, bf16, fp16
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str
    kind: Literal["gpu", "cpu"]
    device_pattern: str | None = None
    compute_capability: str | None = None
    memory_gib: float | None = Field(default=None, gt=0)
    bandwidth_gb_s: float | None = Field(default=None, gt=0)
    matrix_tflops: Mapping[str, float] = Field(default_factory=dict)
    source: str = Field(min_length=1)
    instance: Instance | None = None
    interconnect: Interconnect | None = None

    @field_validator("device_pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from error
        return value

    def datasheet_rates(self, weights: WeightType) -> Rates | None:
        """The datasheet's rates for these weights; None where it has none."""
        rate = matrix_rate(weights, self.matrix_tflops)
        if self.bandwidth_gb_s is None or rate is None:
            return None
        return Rates(self.bandwidth_gb_s, rate, "datasheet")


def measured_rates(bandwidth: Mapping[str, Any] | None, weights: WeightType) -> Rates | None:
    """The rates of a `bandwidth` record (see gptjet.benchmarks.bandwidth); None where it has none.

    The bandwidth is the best of reading and copying: a floor must not be beaten by the model.
    """
    if not bandwidth:
        return None
    rate = matrix_rate(weights, bandwidth.get("matrix_tflops", {}))
    known = [bandwidth.get(name) for name in ("read_gb_s", "copy_gb_s", "model_read_gb_s")]
    values = [float(value) for value in known if value]
    if not values or not rate:
        return None
    return Rates(max(values), float(rate), "measured")


def present_name(environment: Mapping[str, Any]) -> str:
    """A label for the machine of an environment record: "cpu", or the card ("tesla-t4")."""
    cards = environment.get("gpus") or []
    if not cards:
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", str(cards[0]["name"]).lower()).strip("-") or "gpu"


def mismatch(hardware: Hardware, environment: Mapping[str, Any]) -> str | None:
    """Why this machine is not that hardware, in one line; None where it is.

    A CPU configuration fits every machine: its server is started with `--device cpu`.
    """
    if hardware.kind == "cpu":
        return None
    cards = [str(card["name"]) for card in environment.get("gpus") or []]
    if not cards:
        return f"{hardware.name} is an {hardware.title}, and this machine shows no NVIDIA GPU"
    if hardware.device_pattern and not re.search(hardware.device_pattern, cards[0]):
        return f"{hardware.name} is an {hardware.title}, and this machine has: {cards[0]}"
    return None
