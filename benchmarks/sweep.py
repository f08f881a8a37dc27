"""From a configuration and the machine at hand to a decided sweep: what is served, and how.

`dry_run` says what would be measured; `run_sweep` measures it.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from gptjet.benchmarks.bandwidth import BandwidthError, measure_in_subprocess
from gptjet.benchmarks.checkpoint_copy import copy_with_context
from gptjet.benchmarks.config import ConfigError, LevelName, SweepConfig
from gptjet.benchmarks.design import cells, too_long
from gptjet.benchmarks.geometry import (
    EMBEDDED,
    Geometry,
    GeometryError,
    config_of,
    embedded_folder,
    geometry_from_config,
)
from gptjet.benchmarks.hardware import GIB, mismatch, present_name
from gptjet.benchmarks.measure import StreamClient
from gptjet.benchmarks.progress import SweepProgress
from gptjet.benchmarks.records import Results
from gptjet.benchmarks.results import ResultsWriter
from gptjet.benchmarks.roofline import WEIGHT_TYPES, request_floor, weight_bytes
from gptjet.benchmarks.runner import Runner
from gptjet.benchmarks.server_process import DTYPES, ServeCommand, ServerError, ServerProcess
from gptjet.benchmarks.sweep_plan import Connection, Outcome, SweepPlan
from gptjet.service.client import Client
from gptjet.service.client_types import ModelInfo

MOCK = "mock"
# A server process beside its weights: interpreter, libraries, CUDA context, activations.
_PROCESS_BYTES = 1.5 * GIB
_USABLE_SHARE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepOptions:
    """What the command line says besides the configurations.

    endpoints       NAME -> HOST:PORT of running servers, NAME a backend or backend/weight type
    any_hardware    go on where the machine is not the configuration's; results say what is there
    serve           further flags for the servers that are started
    measure_bandwidth  measure the machine first
    """

    backends: tuple[str, ...] = ()
    weight_types: tuple[str, ...] = ()
    endpoints: Mapping[str, str] | None = None
    any_hardware: bool = False
    serve: tuple[str, ...] = ()
    serve_module: str = "gptjet.service.cli"
    quick: bool = False
    retry_failures: bool = False
    measure_bandwidth: bool = True


def model_name(config: SweepConfig) -> str:
    """The model's label in results: with the context where that is not the model's own."""
    context = config.model.serve_context
    return config.model.name + (f"@{context}" if context else "")


def geometry_of(config: SweepConfig) -> Geometry | None:
    """The model's sizes; None where they cannot be had without loading it."""
    with contextlib.suppress(GeometryError):
        fields = dict(config_of(config.model.checkpoint))
        if config.model.serve_context:
            for name in ("n_positions", "max_position_embeddings", "n_ctx"):
                if name in fields:
                    fields[name] = config.model.serve_context
        return geometry_from_config(fields)
    return None


def dry_run(configs: Sequence[SweepConfig], options: SweepOptions) -> dict[str, Any]:
    """The design as JSON data: every cell, its runs, whether it fits, and its modelled floor.

    Raises ConfigError.
    """
    rows: list[dict[str, Any]] = []
    for config in configs:
        geometry = geometry_of(config)
        for cell in cells(
            config, config.design.choose_levels(options.backends, options.weight_types)
        ):
            weights = WEIGHT_TYPES[cell.level.weight_type]
            rates = config.hardware.datasheet_rates(weights)
            is_mock = cell.level.backend == MOCK
            reason = too_long(cell, geometry.max_context) if geometry and not is_mock else None
            floor = None
            if geometry is not None and rates is not None and reason is None and not is_mock:
                floor = asdict(
                    request_floor(geometry, weights, rates, cell.input_tokens, cell.output_tokens)
                )
            rows.append(
                {
                    "config": config.name,
                    "hardware": config.hardware.name,
                    "model": model_name(config),
                    "backend": cell.level.backend,
                    "weight_type": cell.level.weight_type,
                    "input_tokens": cell.input_tokens,
                    "output_tokens": cell.output_tokens,
                    "runs": 0 if reason else config.design.runs,
                    "feasible": reason is None,
                    "reason": reason,
                    "modelled_floor": floor,
                }
            )
    return {
        "schema": 1,
        "configs": [config.name for config in configs],
        "cells": rows,
        "num_cells": len(rows),
        "num_runs": sum(row["runs"] for row in rows),
    }


def run_sweep(
    config: SweepConfig,
    options: SweepOptions,
    writer: ResultsWriter,
    environment: Mapping[str, Any],
    progress: SweepProgress,
    stop_asked: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Make the runs of one configuration that the file does not hold yet.

    Raises ConfigError, GeometryError, ResultsError, and KeyboardInterrupt once `stop_asked`.
    """
    levels = config.design.choose_levels(options.backends, options.weight_types)
    wrong = mismatch(config.hardware, environment)
    if wrong and not options.any_hardware and not options.endpoints:
        raise ConfigError(
            f"{wrong}. --any-hardware measures what is here, labelled as such; "
            f"--dry-run shows the design; --endpoint measures a running server"
        )
    # A remote server's hardware cannot be seen: the configuration's word stands, unproven.
    hardware = (
        present_name(environment) if wrong and not options.endpoints else config.hardware.name
    )
    geometry = geometry_of(config)
    served = any(level.backend != MOCK for level in levels) and not options.endpoints
    progress.name(f"{config.name} on {hardware}")
    with tempfile.TemporaryDirectory(prefix="gptjet-model-") as folder:
        checkpoint, note = config.model.checkpoint, None
        if config.model.serve_context and served:
            target = Path(folder) / config.model.name
            note = copy_with_context(checkpoint, config.model.serve_context, target)
            checkpoint = str(target)
        elif Path(checkpoint).exists():
            checkpoint = str(Path(checkpoint).resolve())
        plan = SweepPlan(
            config=config,
            levels=levels,
            hardware=hardware,
            model=model_name(config),
            together=_together(config, options, levels, geometry, environment),
            hardware_verified=not options.endpoints,
            model_note=note,
            fingerprint=fingerprint(config.model.checkpoint),
            geometry=asdict(geometry) if geometry else None,
            quick=options.quick,
            retry_failures=options.retry_failures,
        )
        kind = "cpu" if config.hardware.kind == "cpu" else "cuda"
        command = ServeCommand(
            model=checkpoint,
            device="auto" if wrong else kind,
            extra=options.serve,
            module=options.serve_module,
        )
        runner = Runner(
            plan=plan,
            writer=writer,
            earlier=Results.read([writer.path]),
            connect=lambda level: connect(level, config, options, command),
            observer=progress,
            environment=environment,
            measure_bandwidth=lambda: _bandwidth(config, options, geometry, bool(wrong), progress),
            stop_asked=stop_asked,
        )
        return runner.run()


def connect(
    level: LevelName, config: SweepConfig, options: SweepOptions, command: ServeCommand
) -> Connection:
    """A client of the level's endpoint, or of a server started for it. Raises ServerError."""
    process: ServerProcess | None = None
    if options.endpoints:
        target = options.endpoints.get(str(level)) or options.endpoints.get(level.backend)
        if target is None:
            raise ServerError(f"no --endpoint is named {level} or {level.backend}")
    else:
        process = ServerProcess(command, level, start_timeout_s=config.design.start_timeout_s)
        target = process.target
    # Without retries: a retried call would be measured as one slow call.
    client = Client(target, retry=None)

    def close() -> None:
        client.close()
        if process is not None:
            process.stop()

    try:
        client.wait_until_serving(config.design.start_timeout_s if process else 30.0)
        model = client.get_model()
        check_model(model, level, config)
    except BaseException:
        close()
        raise
    return Connection(
        client=cast(StreamClient, client),
        model=model,
        start_s=round(process.start_s, 3) if process else None,
        close=close,
    )


def check_model(model: ModelInfo, level: LevelName, config: SweepConfig) -> None:
    """Raises ServerError where the server is not the level: results would bear a wrong name."""
    if model.backend != level.backend:
        raise ServerError(f"{level} is asked for, the server runs backend {model.backend}")
    if level.backend == MOCK:
        return
    expected = DTYPES.get(level.weight_type)
    if expected is not None and model.dtype != expected:
        raise ServerError(f"{level} is asked for, the server computes in {model.dtype}")
    if config.hardware.kind == "gpu" and model.device.startswith("cpu"):
        raise ServerError(f"{config.hardware.name} is asked for, the server runs on a CPU")


def fingerprint(checkpoint: str) -> str | None:
    """Twelve digits that change with the checkpoint; None for a hub name.

    Of config.json and the weight files' sizes and heads: hashing 12 GB would take minutes.
    """
    folder = embedded_folder() if checkpoint == EMBEDDED else Path(checkpoint)
    if not (folder / "config.json").is_file():
        return None
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(f"{file.name} {file.stat().st_size}".encode() + stream.read(2**20))
    return digest.hexdigest()[:12]


def _together(
    config: SweepConfig,
    options: SweepOptions,
    levels: Sequence[LevelName],
    geometry: Geometry | None,
    environment: Mapping[str, Any],
) -> bool:
    """Whether all levels' servers are alive at once: by choice, or where memory allows it."""
    if options.endpoints or len(levels) == 1:
        return True
    if config.design.servers != "auto":
        return config.design.servers == "together"
    if all(level.backend == MOCK for level in levels):
        return True
    if geometry is None:
        return False
    needed = sum(
        weight_bytes(geometry, WEIGHT_TYPES[level.weight_type]) + _PROCESS_BYTES for level in levels
    )
    if config.hardware.kind == "cpu":
        free = float(environment.get("memory_available_gib") or 0) * GIB
    else:
        card = (environment.get("gpus") or [{}])[0]
        free = ((card.get("memory_mib") or 0) - (card.get("memory_used_mib") or 0)) * 2**20
    return needed < _USABLE_SHARE * free


def _bandwidth(
    config: SweepConfig,
    options: SweepOptions,
    geometry: Geometry | None,
    elsewhere: bool,
    progress: SweepProgress,
) -> Mapping[str, Any] | None:
    """The machine's measured rates, before any server runs; None where they are not to be had."""
    if not options.measure_bandwidth or options.endpoints:
        return None
    progress.note("measuring the machine's bandwidth and matrix rate")
    size = int(weight_bytes(geometry, WEIGHT_TYPES["fp32"])) if geometry else None
    # A model beyond every cache reads at read_gb_s; measuring it again would only take its memory.
    size = size if size and size < GIB else None
    device = "cuda" if config.hardware.kind == "gpu" and not elsewhere else "cpu"
    try:
        return measure_in_subprocess(device, size)
    except BandwidthError as error:
        progress.note(f"bandwidth was not measured: {error}")
        return None
