"""Programs and a model in, rows out: warm-up, rounds in which the programs take turns, medians and their spread.

Knows no program's insides and prints nothing. A row's `ours` and `peer` are medians of the rounds; `ratio` is the
first over the second: of rates more is better, of seconds and bytes less. `ceiling_fraction` is the part of the
machine's rate that ours reaches: the least time that the work's bytes and multiplications can take (see `counts`) over
the time that it took. Of peak memory it is the part that weights are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pixtral_cli.bench.ceilings import Ceilings, Rates
from pixtral_cli.bench.contender import OURS, PROMPT, Contender, ContenderFailed
from pixtral_cli.bench.counts import Counts, Need

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
    """Those that are measured, ours first, each with the model as it reads it, and the machine's ceilings beside them.

    `tell` takes a sentence on a peer that is left out of a work because it fails there, `doing` what is going on; what
    fails of ours is raised.
    """

    models: dict[str, Mapping[str, Any]]
    threads: int
    sizes: Sizes
    ceilings: Ceilings
    tell: Callable[[str], None]
    doing: Callable[[str], None]
    running: dict[str, Contender] = field(default_factory=dict)

    def rounds(self, what: str, do: Callable[[str], float]) -> tuple[dict[str, list[float]], list[Rates]]:
        """What `do` gives for each program in every round, after one that does not count; and the ceilings then."""
        found: dict[str, list[float]] = {name: [] for name in self.models}
        rates = []
        for count in range(self.sizes.repeats + 1):
            self.doing(f"{what}: " + (f"round {count} of {self.sizes.repeats}" if count else "warming up"))
            for name in list(found):
                time.sleep(SETTLING)
                try:
                    found[name].append(do(name))
                except ContenderFailed as error:
                    if name == OURS:
                        raise
                    self.tell(f"{name} is left out ({what}): {error}")
                    del found[name]
            rates.append(self.ceilings.sample())
        return {name: each[1:] for name, each in found.items()}, rates[1:]

    def answers(self, work: Work) -> tuple[dict[str, list[float]], list[Rates]]:
        """The `rounds` of a work."""
        return self.rounds(work.name, lambda name: self.running[name].ask(**work.question))

    def start(self, name: str) -> tuple[float, float, float]:
        """Seconds of a new process of the program to its first token, after a short prompt, and of loading and of
        importing torch therein."""
        self.end(name)
        begun, sizes = time.perf_counter(), self.sizes
        self.running[name] = program = Contender(name)
        asked = {"threads": self.threads, "context": sizes.context, "batch": max(sizes.batch_sizes)}
        loading = program.ask("load", model=self.models[name], **asked)
        program.ask("prefill", tokens=PROMPT)
        return time.perf_counter() - begun, loading, program.ask("import_torch")

    def end(self, *names: str) -> None:
        """End the processes of these programs, or of all."""
        for name in names or tuple(self.running):
            if name in self.running:
                self.running.pop(name).end()


@dataclass(frozen=True)
class Measured:
    """A model that is measured in one encoding, which computes in `dtype`."""

    encoding: str
    counts: Counts
    dtype: str

    def rows(self, programs: Programs, abouts: dict[str, Any]) -> Iterator[Row]:
        """Each row as soon as it is measured; what programs say of themselves goes into `abouts`."""
        yield from self._starts(programs)
        abouts |= {name: program.ask("about") for name, program in programs.running.items()}
        for work in works(programs.sizes, self.counts):
            seconds, rates = programs.answers(work)
            tokens = work.tokens * work.batch
            parts = [
                work.need.seconds(each.read, each.operations(self.dtype)) / took
                for each, took in zip(rates, seconds[OURS], strict=True)
            ]
            part = statistics.median(parts)
            speeds = {name: [tokens / each for each in found] for name, found in seconds.items()}
            yield from self._beside(work.name, speeds, "tok/s", work.tokens, work.batch, part)
            if work.name == "prefill":
                yield from self._beside("first token", seconds, "s", work.tokens, work.batch, part)
        peaks = {name: [program.ask("peak_memory") / GB] for name, program in programs.running.items()}
        part = self.counts.weight_bytes / GB / peaks[OURS][0]
        yield from self._beside("peak memory", peaks, "GB", part=part)

    def _starts(self, programs: Programs) -> Iterator[Row]:
        """Loading; and whole processes, from their start to the first token."""
        loads: dict[str, list[float]] = {}
        others: dict[str, list[float]] = {}

        def start(name: str) -> float:
            whole, loading, importing = programs.start(name)
            loads.setdefault(name, []).append(loading)
            others.setdefault(name, []).append(whole - importing)
            return whole

        starts, _ = programs.rounds("start", start)
        for name in programs.models.keys() - starts.keys():
            programs.end(name)
            del programs.models[name]
        yield from self._beside("load", {name: loads[name][1:] for name in starts}, "s")
        yield from self._beside("start", starts, "s", PROMPT, 1)
        if len(starts) > 1:
            without = {name: others[name][1:] for name in starts}
            yield from self._beside("start, without importing torch", without, "s", PROMPT, 1)

    def _beside(
        self,
        work: str,
        found: Mapping[str, Sequence[float]],
        unit: str,
        tokens: int = 0,
        batch: int = 0,
        part: float | None = None,
    ) -> Iterator[Row]:
        """A row for each peer; one without, where there is none. `part` is of the ceiling."""
        ours, spread = statistics.median(found[OURS]), _spread(found[OURS])
        peers: list[str | None] = [name for name in found if name != OURS]
        for name in peers or [None]:
            peer = None if name is None else statistics.median(found[name])
            ratio = None if peer is None else ours / peer
            others = None if name is None else _spread(found[name])
            yield Row(work, self.encoding, tokens, batch, ours, peer, name, ratio, unit, part, spread, others)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)
