"""`gptjet warm-cache`: the GPU kernels of a model, compiled before there is a card."""

from __future__ import annotations

import enum
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from gptjet.service.commands.terminal import ExitCode, fail, print_note

if TYPE_CHECKING:
    from gptjet.kernels.batch import BlockGeometry
    from gptjet.kernels.gpu.offline import Launch

HELP = """Compile a model's GPU kernels before there is a GPU, so that a server need not.

They go into Triton's cache. A server that finds them starts without compiling, and needs no C \
compiler and no Python headers. They are those of this installation: of its Triton and its gptjet. \
The folder's files hold its path, so it must keep that: compile in the image that serves, or copy \
the folder to the same path there; and set TRITON_CACHE_DIR to it.
"""

EXAMPLES = """Examples:

$ gptjet warm-cache --arch sm_75 --cache-dir /opt/kernels
$ gptjet warm-cache --arch sm_80 --arch sm_86 --model ./my-gptj --dtype int8
$ TRITON_CACHE_DIR=/opt/kernels gptjet serve --model EleutherAI/gpt-j-6b
"""

_MODEL = "gpt-j-6b"


class WeightType(enum.StrEnum):
    """What `gptjet serve --dtype` names."""

    FLOAT16 = "float16"
    INT8 = "int8"
    INT4 = "int4"


class KvCacheDtype(enum.StrEnum):
    """What `gptjet serve --kv-cache-dtype` names."""

    FLOAT16 = "float16"
    INT8 = "int8"


def warm_cache(
    *,
    arch: Annotated[
        list[str], typer.Option(help="sm_70, sm_75, …: the card's; may be repeated", metavar="ARCH")
    ],
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="folder to fill; by default TRITON_CACHE_DIR, or ~/.triton/cache"),
    ] = None,
    model: Annotated[
        str,
        typer.Option(help='"gpt-j-6b" for its sizes, or the checkpoint: "embedded", a folder, …'),
    ] = _MODEL,
    dtype: Annotated[
        list[WeightType] | None, typer.Option(help="weights; all by default, may be repeated")
    ] = None,
    kv_cache_dtype: Annotated[
        list[KvCacheDtype] | None, typer.Option(help="KV cache; all by default, may be repeated")
    ] = None,
    max_sequences: Annotated[
        int | None, typer.Option(help="of the server; its default by default", min=1)
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="processes; one a processor by default", min=1)
    ] = None,
) -> None:
    """Compile, with a bar on stderr where that is a terminal."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        fail("TRITON_INTERPRET is set: interpreted kernels cannot be compiled", ExitCode.USAGE)
    capabilities = _capabilities(arch)
    if cache_dir is not None:
        # Triton reads it, here and in the processes that compile. Its files hold absolute paths.
        os.environ["TRITON_CACHE_DIR"] = str(cache_dir.absolute())
    _check_toolchain()
    # Here, not above: they bring torch, and Triton.
    from gptjet.kernels.gpu import warm
    from gptjet.kernels.gpu.availability import cache_folder, check_capability
    from gptjet.service.engine.config import EngineConfig

    geometry = _geometry(model)
    max_rows = max_sequences or EngineConfig().max_sequences
    launches: list[Launch] = []
    for capability in capabilities:
        note = check_capability(capability, "the card")
        if note is not None:
            print_note(note)
        try:
            launches += warm.launches_of(
                geometry,
                capability,
                weight_types=[t.value for t in dtype] if dtype else warm.WEIGHT_TYPES,
                kv_dtypes=[t.value for t in kv_cache_dtype]
                if kv_cache_dtype
                else tuple(warm.KV_DTYPES),
                max_rows=max_rows,
            )
        except ValueError as error:
            fail(f"the kernels do not take this model: {error}", ExitCode.USAGE)
    folder = cache_folder()
    started = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _compile(launches, jobs or warm.default_processes())
    except OSError as error:
        fail(f"{folder} cannot be written: {error}", ExitCode.USAGE)
    except warm.WarmError as error:
        fail(str(error), ExitCode.FAILURE)
    except KeyboardInterrupt:
        fail(f"interrupted: what was compiled is in {folder}", ExitCode.INTERRUPTED)
    cards = ", ".join(f"sm_{capability}" for capability in capabilities)
    typer.echo(
        f"{len(launches)} kernels for {cards} in {folder} "
        f"({time.monotonic() - started:.0f} s); set TRITON_CACHE_DIR={folder}"
    )


def _compile(launches: Sequence[Launch], num_processes: int) -> None:
    from tqdm import tqdm

    from gptjet.kernels.gpu import warm

    with tqdm(
        total=len(launches), desc="compiling kernels", unit="kernel", leave=False, disable=None
    ) as bar:

        def tick(launch: Launch) -> None:
            bar.set_postfix_str(f"sm_{launch.capability}")
            bar.update()

        warm.compile_all(launches, num_processes=num_processes, on_done=tick)


def _capabilities(names: Sequence[str]) -> list[int]:
    """[75] of ["sm_75"], each once, ascending."""
    from gptjet.kernels.gpu.availability import MIN_CAPABILITY
    from gptjet.kernels.gpu.compile_case import CAPABILITIES

    found = set()
    for name in names:
        digits = name.removeprefix("sm_").removeprefix("sm")
        if not (digits.isascii() and digits.isdigit()) or int(digits) < MIN_CAPABILITY:
            ours = ", ".join(f"sm_{capability}" for capability in CAPABILITIES)
            _usage(f"--arch {name}: it must be sm_{MIN_CAPABILITY} or newer ({ours} are tested)")
        found.add(int(digits))
    return sorted(found)


def _usage(message: str) -> NoReturn:
    fail(message, ExitCode.USAGE)


def _check_toolchain() -> None:
    from gptjet.kernels.gpu.availability import inspect_toolchain

    problems = inspect_toolchain().obstacles
    if problems:
        listed = "; ".join(f"{problem} ({mend})" for problem, mend in problems)
        _usage(f"the kernels cannot be compiled here: {listed}")


def _geometry(model: str) -> BlockGeometry:
    from gptjet.kernels.gpu.compile_case import GPT_J_6B

    if model == _MODEL:
        return GPT_J_6B
    from gptjet.service.engine.errors import BackendLoadError
    from gptjet.service.models.architecture import build_config
    from gptjet.service.models.checkpoint import resolve_checkpoint
    from gptjet.service.models.fused.description import describe

    try:
        checkpoint = resolve_checkpoint(model)
        return describe(checkpoint, build_config(checkpoint, allow_quantized=True)).geometry
    except BackendLoadError as error:
        _usage(str(error))
