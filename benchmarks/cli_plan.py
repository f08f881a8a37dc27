"""`gptjet plan`: flags in, text or JSON out."""

from __future__ import annotations

import json
from typing import Annotated

import typer

HELP = """Say whether a model fits a card, how many streams it holds and how fast it can be at best.

Modelled from the model's config.json and the card's datasheet: no model is loaded, and no GPU and \
no torch is needed. Exit code 1 means: it does not fit.
"""

EXAMPLES = """Examples:

$ gptjet plan --model gpt-j-6b --card t4 --weights fp16

$ gptjet plan --model gpt-j-6b --card t4 --weights int8 --cards 2

$ gptjet plan --model gpt-j-6b --card t4 --weights int8 --kv-cache-dtype int8

$ gptjet plan --model ./checkpoint --card my-card.toml --context 4096 --json
"""


def plan(
    *,
    model: Annotated[
        str, typer.Option(help="a name (gpt-j-6b), a folder with a config.json, or 'embedded'")
    ] = "gpt-j-6b",
    card: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="t4, v100, a10, h100, cpu, or your own file")
    ] = "t4",
    weights: Annotated[str, typer.Option(help="fp32, bf16, fp16, int8, int4")] = "fp16",
    kv_cache_dtype: Annotated[
        str, typer.Option(help="auto (as the activations), float16, float32, int8")
    ] = "auto",
    context: Annotated[
        int | None, typer.Option(help="tokens of a stream; default: the model's", min=2)
    ] = None,
    cards: Annotated[
        int, typer.Option(help="2 adds tensor parallel and two replicas", min=1, max=2)
    ] = 1,
    reserve_gib: Annotated[
        float, typer.Option(help="memory of a card to keep free, in GiB", min=0.0)
    ] = 1.0,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="measure this machine's rates first (needs torch); for cpu"),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Plan and print."""
    from gptjet.benchmarks.bandwidth import BandwidthError, measure_in_subprocess
    from gptjet.benchmarks.config import ConfigError, load_config
    from gptjet.benchmarks.geometry import GeometryError
    from gptjet.benchmarks.plan import describe, make_plan

    try:
        # Refused before a minute is spent on it.
        if measure and load_config(card).hardware.bandwidth_gb_s is not None:
            raise ConfigError(f"--measure is for hardware without a datasheet; {card} has one")
        made = make_plan(
            model,
            card,
            weights,
            kv_cache_dtype=kv_cache_dtype,
            context=context,
            cards=cards,
            reserve_gib=reserve_gib,
            bandwidth=measure_in_subprocess("cpu") if measure else None,
        )
    except (BandwidthError, ConfigError, GeometryError) as error:
        label = typer.style("error:", fg="red", bold=True)
        typer.echo(f"gptjet: {label} {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(json.dumps(made.as_json(), indent=2) if as_json else "\n".join(describe(made)))
    raise typer.Exit(0 if made.fits else 1)


if __name__ == "__main__":
    typer.run(plan)
