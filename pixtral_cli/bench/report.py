"""Rows in, a table for people out; and the object that `--json` writes. Measures nothing."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pixtral_cli.bench.ceilings import Rates
from pixtral_cli.bench.runs import Row, Sizes

GIGA = 1e9
WIDTH = 160
"""Of the table at most."""


def machine() -> dict[str, Any]:
    """What this computer is."""
    return {"processor": _processor(), "cores": os.cpu_count(), "memory_bytes": _memory(), "system": platform.system()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def as_object(header: Mapping[str, Any], sizes: Sizes, rows: Sequence[Row]) -> dict[str, Any]:
    """The whole run. Each row's figures are in its unit; ceilings in bytes and operations a second."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {**header, "date": date, "sizes": asdict(sizes), "rows": [asdict(row) for row in rows]}


def ceilings_object(samples: Sequence[Rates]) -> dict[str, Any]:
    """Medians over the run, of bytes and operations a second."""
    kinds = samples[0].product
    products = {kind: statistics.median(each.product[kind] for each in samples) for kind in kinds}
    return {
        "read_bytes_per_second": statistics.median(each.read for each in samples),
        "operations_per_second": products,
    }


def as_table(rows: Sequence[Row]) -> Table:
    """A line for each work: ours with its spread, and beside it each peer with ours over it."""
    peers = list(dict.fromkeys(row.peer_name for row in rows if row.peer_name))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for header in ("work", "encoding"):
        table.add_column(header)
    for header in ("pixtral", "least to most", "of ceiling", *(each for peer in peers for each in (peer, "ratio"))):
        table.add_column(header, justify="right")
    lines: dict[tuple[str, str], dict[str | None, Row]] = {}
    for row in rows:
        lines.setdefault((row.encoding, _work(row)), {})[row.peer_name] = row
    for (encoding, work), found in lines.items():
        first = next(iter(found.values()))
        cells = [work, encoding, _value(first.ours, first.unit), _spread(first.ours_spread)]
        cells.append("" if first.ceiling_fraction is None else f"{first.ceiling_fraction:.0%}")
        for peer in peers:
            beside = found.get(peer)
            if beside is None or beside.peer is None:
                cells += ["", ""]
            else:
                cells += [_value(beside.peer, beside.unit), f"{beside.ratio:.2f} x"]
        table.add_row(*cells)
    return table


def _work(row: Row) -> str:
    of = f" of {row.tokens}" if row.tokens and row.work in ("prefill", "decode", "first token") else ""
    patches = f", {row.tokens} patches" if row.work == "picture" else ""
    return row.work + of + patches + (f", {row.batch} requests" if row.batch > 1 else "")


def _value(number: float, unit: str) -> str:
    return f"{_figures(number)} {unit}"


def _spread(spread: tuple[float, float]) -> str:
    least, most = map(_figures, spread)
    return least if least == most else f"{least} to {most}"


def _figures(number: float) -> str:
    """Three figures that count, and all before the point."""
    decimals = 0 if number >= 100 else 1 if number >= 10 else 2 if number >= 1 else 3
    return f"{number:,.{decimals}f}"


def as_text(found: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """What `as_object` gave, for people: what was measured, where, what the machine can do, and the table."""
    machine, ceilings = found["machine"], found["ceilings"]
    product = ", ".join(f"{dtype} {rate / GIGA:,.0f}" for dtype, rate in ceilings["operations_per_second"].items())
    computed = f"{found['threads']} threads, torch {found['torch']}, instructions {found['instructions']}"
    lines = [
        f"{found['model']} on {found['device']}: {machine['processor']}, {computed}",
        f"ceilings: memory read {ceilings['read_bytes_per_second'] / GIGA:,.1f} GB/s; matrix product {product} GF/s",
        f"medians of {found['sizes']['repeats']} rounds; ratio: pixtral over the other",
    ]
    text = StringIO()
    Console(file=text, width=WIDTH, color_system=None).print(as_table(rows))
    return "\n".join([*lines, *(line.rstrip() for line in text.getvalue().splitlines())]) + "\n"
