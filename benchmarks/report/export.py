"""Cells and raw samples as CSV and Parquet, for whoever wants other tables than ours."""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

from gptjet.benchmarks.report.analysis import Analysis

Row = dict[str, Any]


def cell_rows(analysis: Analysis) -> list[Row]:
    """One row a cell. Columns of modelled figures begin with `modelled_`."""
    reductions = {id(one.cell): one.interval for one in analysis.reductions}
    rows = []
    for cell in analysis.cells:
        interval = reductions.get(id(cell))
        row: Row = {
            "hardware": cell.machine.hardware,
            "model": cell.machine.model,
            "backend": cell.level.backend,
            "weight_type": cell.level.weight_type,
            "input_tokens": cell.input_tokens,
            "output_tokens": cell.output_tokens,
            "runs": cell.e2e.n,
            "failures": cell.num_failures,
            "mean_e2e_ms": cell.e2e.mean,
            "sd_e2e_ms": cell.e2e.sd,
            "median_e2e_ms": cell.e2e.median,
            "p95_e2e_ms": cell.e2e.p95,
            "mean_ttft_ms": cell.ttft.mean,
            "p95_ttft_ms": cell.ttft.p95,
            "mean_tpot_ms": cell.tpot.mean if cell.tpot else None,
            "p95_tpot_ms": cell.tpot.p95 if cell.tpot else None,
            "tokens_per_s": cell.tokens_per_s,
            "sd_tokens_per_s": cell.tokens_per_s_sd,
            "latency_reduction": interval.estimate if interval else None,
            "latency_reduction_low": interval.low if interval else None,
            "latency_reduction_high": interval.high if interval else None,
            "modelled_datasheet_floor_e2e_ms": None,
            "modelled_measured_rates_floor_e2e_ms": None,
        }
        for floor in analysis.floors:
            if floor.cell is cell:
                basis = "datasheet" if floor.floor.basis == "datasheet" else "measured_rates"
                row[f"modelled_{basis}_floor_e2e_ms"] = floor.floor.e2e_ms
        rows.append(row)
    return rows


def sample_rows(analysis: Analysis) -> list[Row]:
    """One row a run, with every inter-token latency."""
    rows = []
    for sample in analysis.results.samples.values():
        row = sample.model_dump(exclude={"server"})
        row["itl_ms"] = list(row["itl_ms"])
        row["tokens_per_s"] = sample.tokens_per_s
        for name, value in sample.server.model_dump().items():
            row[f"server_{name}"] = value
        rows.append(row)
    return rows


def csv_text(rows: Sequence[Row]) -> str:
    """With a header; a list is written with spaces between its values."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows({name: _csv_value(value) for name, value in row.items()} for row in rows)
    return file.getvalue()


def parquet_bytes(rows: Sequence[Row], metadata: Mapping[str, str]) -> bytes:
    """Typed columns, lists as lists; raises ImportError without pyarrow."""
    pyarrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    table = pyarrow.Table.from_pylist(list(rows))
    file = io.BytesIO()
    parquet.write_table(table.replace_schema_metadata(dict(metadata)), file)
    return file.getvalue()


def _csv_value(value: Any) -> Any:
    return " ".join(str(item) for item in value) if isinstance(value, list) else value
