"""Configurations of the sweep: hardware, model, design and published figures, typed, from TOML.

A name ("t4") is a file of benchmarks/configs; anything else is a path, and a user's own file is
read the same way. A key that no field has is an error: a misspelt factor must not be ignored.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gptjet.benchmarks.hardware import Hardware, mismatch
from gptjet.benchmarks.published import PublishedResult
from gptjet.benchmarks.roofline import WEIGHT_TYPES

Lengths = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]


class ConfigError(Exception):
    """A configuration cannot be used; the message names the file, the key and the limit."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelChoice(_Frozen):
    """What is served.

    name           label in results
    checkpoint     what `gptjet serve --model` gets: "embedded", a folder, or a hub name
    serve_context  serve a copy that claims this context. Only for models with rotary positions and
                   only for speed; results are marked with it.
    """

    name: str = Field(min_length=1)
    checkpoint: str = Field(min_length=1)
    serve_context: int | None = Field(default=None, ge=2)


class LevelName(_Frozen):
    """A backend with a weight type: one level of the design's main factor."""

    backend: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    weight_type: str

    @model_validator(mode="after")
    def _weight_type_is_known(self) -> Self:
        _check_weight_type(self.weight_type)
        return self

    def __str__(self) -> str:
        return f"{self.backend}/{self.weight_type}"


class Design(_Frozen):
    """The factors and how they are run.

    levels          backend -> weight types, run unless --backends or --weight-types choose
    further_levels  backend -> weight types that --backends and --weight-types may add
    baseline        the level that latency reductions are counted from
    runs            repetitions of each cell
    warmup_rounds   after a server start, this many requests of every input length, not kept
    servers         "together": all levels' servers alive, runs shuffled over all levels;
                    "alternate": one server at a time, levels take turns inside each block;
                    "auto": together where the machine's memory allows it
    runs_per_block  repetitions of a cell inside one block: more means fewer server starts and
                    coarser turns
    request_timeout_s, start_timeout_s  give up on a request, on a server's start
    """

    input_tokens: Lengths
    output_tokens: Lengths
    runs: int = Field(ge=1, le=10_000)
    warmup_rounds: int = Field(default=1, ge=0, le=100)
    seed: int = Field(default=0, ge=0)
    servers: Literal["auto", "together", "alternate"] = "auto"
    runs_per_block: int = Field(default=1, ge=1)
    request_timeout_s: float = Field(default=600.0, gt=0)
    start_timeout_s: float = Field(default=900.0, gt=0)
    levels: Mapping[str, tuple[str, ...]] = Field(min_length=1)
    further_levels: Mapping[str, tuple[str, ...]] = Field(default_factory=dict)
    baseline: LevelName

    @model_validator(mode="after")
    def _levels_are_known(self) -> Self:
        for table in (self.levels, self.further_levels):
            for backend, weight_types in table.items():
                for weight_type in weight_types:
                    LevelName(backend=backend, weight_type=weight_type)
        for name, lengths in (("input", self.input_tokens), ("output", self.output_tokens)):
            if len(set(lengths)) != len(lengths):
                raise ValueError(f"{name}_tokens holds a length twice")
        return self

    def known_levels(self) -> dict[str, tuple[str, ...]]:
        """Both tables as one."""
        known: dict[str, tuple[str, ...]] = {}
        for table in (self.levels, self.further_levels):
            for backend, weight_types in table.items():
                known[backend] = tuple(dict.fromkeys((*known.get(backend, ()), *weight_types)))
        return known

    def choose_levels(
        self, backends: Sequence[str] = (), weight_types: Sequence[str] = ()
    ) -> tuple[LevelName, ...]:
        """The levels to run: the default ones, or those of these backends and weight types.

        Naming a backend or a weight type reaches the further levels too. Raises ConfigError for one
        that the configuration does not know, and where nothing is left.
        """
        known = self.known_levels()
        table = known if backends or weight_types else self.levels
        for backend in backends:
            if backend not in known:
                raise ConfigError(f"no backend {backend!r} in the design: {', '.join(known)}")
        for weight_type in weight_types:
            _check_weight_type(weight_type, ConfigError)
        chosen = [
            LevelName(backend=backend, weight_type=weight_type)
            for backend in (backends or (table if not weight_types else known))
            for weight_type in known[backend]
            if (not weight_types and weight_type in table[backend]) or weight_type in weight_types
        ]
        if not chosen:
            have = "; ".join(f"{b}: {', '.join(w)}" for b, w in known.items())
            raise ConfigError(f"no level of the design is left: it has {have}")
        return tuple(dict.fromkeys(chosen))


class SweepConfig(_Frozen):
    """One file: a machine, a model, a design. `name` is the file's."""

    name: str
    hardware: Hardware
    model: ModelChoice
    design: Design
    published: tuple[PublishedResult, ...] = ()

    def updated(
        self, *, model: str | None = None, serve_context: int | None = None, **design: Any
    ) -> SweepConfig:
        """A copy with another model or with other design fields; None leaves a field as it is.

        Raises ConfigError where the new value is out of its limits.
        """
        changes = {key: value for key, value in design.items() if value is not None}
        fields = self.model_dump()
        fields["design"].update(changes)
        if model is not None:
            fields["model"] = {"name": model_label(model), "checkpoint": model}
        if serve_context is not None:
            fields["model"]["serve_context"] = serve_context
        return _validate(fields, self.name)


def model_label(checkpoint: str) -> str:
    """A name for results: of a folder only its last part, since a path names a machine."""
    return checkpoint.rstrip("/").rpartition("/")[2] or checkpoint


def bundled_configs() -> dict[str, Traversable]:
    """The configurations that ship, by name."""
    folder = resources.files("gptjet.benchmarks") / "configs"
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return {file.name.removesuffix(".toml"): file for file in files if file.name.endswith(".toml")}


def load_config(name_or_path: str) -> SweepConfig:
    """Read a bundled configuration by name, or a file. Raises ConfigError."""
    bundled = bundled_configs()
    source: Traversable = bundled.get(name_or_path) or Path(name_or_path)
    try:
        fields = tomllib.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{name_or_path}: no such file, and no bundled configuration: {', '.join(bundled)}"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{name_or_path}: {error}") from error
    return _validate(fields | {"name": Path(name_or_path).stem}, name_or_path)


def load_all_bundled() -> tuple[SweepConfig, ...]:
    """Every configuration that ships."""
    return tuple(load_config(name) for name in bundled_configs())


def config_for(environment: Mapping[str, Any]) -> str:
    """The bundled configuration of the machine of an environment record.

    Raises ConfigError for a card that none of them describes.
    """
    cards = environment.get("gpus") or []
    if not cards:
        return "cpu"
    for config in load_all_bundled():
        if config.hardware.kind == "gpu" and mismatch(config.hardware, environment) is None:
            return config.name
    raise ConfigError(
        f"no bundled configuration describes {cards[0]['name']}: write one (see "
        f"benchmarks/configs) and give it with --config"
    )


def _validate(fields: Mapping[str, Any], where: str) -> SweepConfig:
    try:
        return SweepConfig.model_validate(fields)
    except ValidationError as error:
        problems = [
            f"{where}: {'.'.join(str(part) for part in problem['loc']) or 'file'}: "
            + re.sub(r"^Value error, ", "", problem["msg"])
            for problem in error.errors()
        ]
        raise ConfigError("\n".join(problems)) from error


def _check_weight_type(name: str, error: type[Exception] = ValueError) -> None:
    if name not in WEIGHT_TYPES:
        raise error(f"unknown weight type {name!r}: {', '.join(WEIGHT_TYPES)}")
