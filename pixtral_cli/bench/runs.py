"""Programs and a model in, rows out: warm-up, rounds in which the programs take turns, medians and their spread.

Knows no program's insides and prints nothing. A row's `ours` and `peer` are medians of the rounds; `ratio` is the
first over the second: of rates more is better, of seconds and bytes less. `ceiling_fraction` is the part of the
machine's rate that ours reaches: the least time that the work's bytes and multiplications can take (see `counts`) over
the time that it took. Of peak memory it is the part that weights are.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pixtral_cli.bench.ceilings import Ceilings
from pixtral_cli.bench.contender import PROMPT, Contender, ContenderFailed
from pixtral_cli.bench.counts import Counts, Need

OURS = "pixtral"
WITH_TORCH = (OURS, "transformers")
SETTLING = 0.05
"""Seconds before a program's turn, in which the threads of the one before it fall asleep."""
GB = 1e9


@dataclass(frozen=True)
class Sizes:
    """How much of each work: tokens, sequences, a picture's pixels (width, height), rounds that count."""

    prompt_tokens: int = 512
    new_tokens: int = 64
    batch_sizes: tuple[int, ...] = (1, 4)
    image: tuple[int, int] | None = None
    repeats: int = 5

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.prompt_tokens, PROMPT + self.new_tokens) + 1


@dataclass(frozen=True)
class Row:
    """One work of ours, beside one peer if there is any. Spreads are the least and the most of the rounds."""

    work: str
    encoding: str
    tokens: int
    batch: int
    ours: float
    peer: float | None
    peer_name: str | None
    ratio: float | None
    unit: str
    ceiling_fraction: float | None
    ours_spread: tuple[float, float]
    peer_spread: tuple[float, float] | None


class Work(NamedTuple):
    """What a program is asked for, and gives in seconds; the row tells tokens a second."""

    name: str
    tokens: int
    batch: int
    question: Mapping[str, Any]
    need: Need


def works(sizes: Sizes, counts: Counts) -> Iterator[Work]:
    """What is timed in programs that are loaded, in order."""
    tokens = sizes.prompt_tokens
    yield Work("prefill", tokens, 1, {"what": "prefill", "tokens": tokens}, counts.prefill(tokens))
    tokens = sizes.new_tokens
    for batch in sizes.batch_sizes:
        question = {"what": "decode", "tokens": tokens, "batch": batch}
        yield Work("decode", tokens, batch, question, counts.decode(PROMPT, tokens, batch))
    if sizes.image:
        width, height = sizes.image
        question = {"what": "picture", "width": width, "height": height}
        yield Work("picture", counts.patches(width, height), 1, question, counts.picture(width, height))


@dataclass
class Programs:
    """Those that are measured, ours first, each with the model as it reads it. `tell` takes a sentence on a peer that
    failed, which is left out from then on; what fails of ours is raised."""

    models: dict[str, Mapping[str, Any]]
    threads: int
    sizes: Sizes
    tell: Callable[[str], None]
    running: dict[str, Contender] = field(default_factory=dict)
    abouts: dict[str, Any] = field(default_factory=dict)

    def each(self, do: Callable[[str], float]) -> dict[str, float]:
        """What `do` gives for each, one after the other."""
        found = {}
        for name in list(self.models):
            time.sleep(SETTLING)
            try:
                found[name] = do(name)
            except ContenderFailed as error:
                if name == OURS:
                    raise
                self.tell(f"{name} is left out: {error}")
                self._end(name)
                del self.models[name]
        return found

    def rounds(self, do: Callable[[str], float]) -> dict[str, list[float]]:
        """What `do` gives for each in every round, after one that does not count."""
        self.each(do)
        rounds = [self.each(do) for _ in range(self.sizes.repeats)]
        return {name: [one[name] for one in rounds] for name in self.models}

    def ask(self, question: Mapping[str, Any]) -> Callable[[str], float]:
        return lambda name: self.running[name].ask(**question)

    def load(self, name: str) -> float:
        """Seconds of loading, in a new process that takes the place of the one before."""
        self._end(name)
        self.running[name] = Contender(name)
        sizes = self.sizes
        batch = max(sizes.batch_sizes)
        asked = {"model": self.models[name], "threads": self.threads, "context": sizes.context, "batch": batch}
        return self.running[name].ask("load", **asked)

    def end(self) -> None:
        for name in list(self.running):
            self._end(name)

    def _end(self, name: str) -> None:
        if name in self.running:
            self.running.pop(name).end()


class Measured(NamedTuple):
    """A model that is measured: what its work needs, and the rates that bound it."""

    encoding: str
    counts: Counts
    ceilings: Ceilings
    dtype: str

    def seconds(self, need: Need) -> float:
        return need.seconds(self.ceilings.read, self.ceilings.operations(self.dtype))


def rows(programs: Programs, model: Measured) -> Iterator[Row]:
    """Each row as soon as it is measured."""
    yield from _starts(programs, model.encoding)
    for work in works(programs.sizes, model.counts):
        seconds = programs.rounds(programs.ask(work.question))
        least, tokens = model.seconds(work.need), work.tokens * work.batch
        rates = {name: [tokens / each for each in found] for name, found in seconds.items()}
        yield from _beside(work.name, model.encoding, work.tokens, work.batch, rates, "tok/s", tokens / least)
        if work.name == "prefill":
            yield from _beside("first token", model.encoding, work.tokens, work.batch, seconds, "s", least)
    peaks = programs.each(lambda name: programs.running[name].ask("peak_memory") / GB)
    alone = model.counts.weight_bytes / GB
    yield from _beside("peak memory", model.encoding, 0, 0, {k: [v] for k, v in peaks.items()}, "GB", alone)


def _starts(programs: Programs, encoding: str) -> Iterator[Row]:
    """Loading; and whole processes, from their start to the first token after a short prompt."""
    loads: dict[str, list[float]] = {}

    def start(name: str) -> float:
        begun = time.perf_counter()
        loads.setdefault(name, []).append(programs.load(name))
        programs.running[name].ask("prefill", tokens=PROMPT)
        return time.perf_counter() - begun

    starts = programs.rounds(start)
    for name in programs.models:
        programs.abouts[name] = programs.running[name].ask("about")
    yield from _beside("load", encoding, 0, 0, {name: loads[name][1:] for name in starts}, "s")
    yield from _beside("start", encoding, PROMPT, 1, starts, "s")
    if len(starts) > 1:
        torch = statistics.median(_import_torch() for _ in range(programs.sizes.repeats))
        beyond = {name: [each - torch * (name in WITH_TORCH) for each in found] for name, found in starts.items()}
        yield from _beside("start, without importing torch", encoding, PROMPT, 1, beyond, "s")


def _import_torch() -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - begun


def _beside(
    work: str,
    encoding: str,
    tokens: int,
    batch: int,
    found: Mapping[str, Sequence[float]],
    unit: str,
    ceiling: float | None = None,
) -> Iterator[Row]:
    """A row for each peer; one without, where there is none. The ceiling is in the same unit."""
    values = found[OURS]
    ours = statistics.median(values)
    fraction = None if ceiling is None else ours / ceiling if unit == "tok/s" else ceiling / ours
    spread = min(values), max(values)
    peers: list[str | None] = [name for name in found if name != OURS]
    for name in peers or [None]:
        peer = None if name is None else statistics.median(found[name])
        ratio = None if peer is None else ours / peer
        others = None if name is None else (min(found[name]), max(found[name]))
        yield Row(work, encoding, tokens, batch, ours, peer, name, ratio, unit, fraction, spread, others)
