"""What prompt look-up gains on texts that repeat what was said, and what it costs on others.

    python tests/benchmarks/speculation.py --model model.q4_k [--tokens 128] [--rounds 3] [--share 1.0 0.8 ...]

The model computes all that it would, and answers real texts: after each pass the likeliest tokens become those of the
text. So a model of random weights will do, and the look-up and its measuring are those of a user. Rounds with and
without take turns; printed are medians of tokens a second, and how many tokens were looked up. `--share` has no text
and no look-up: so many of the proposals are right.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import time
from pathlib import Path

import torch

from pixtral_cli import Pixtral
from pixtral_cli.engine.engine import Engine
from pixtral_cli.engine.lookup import Match
from pixtral_cli.engine.request import Failure, Request
from pixtral_cli.engine.runner import Computed
from pixtral_cli.engine.scheduler import Chunk
from pixtral_cli.engine.sequence import Sequence

ROOT = Path(__file__).resolve().parents[2]
PIECES = re.compile(r" ?\w{1,6}|[^\w\s]{1,3}|\s+")
"""As long as the tokens of Mistral's vocabulary are."""
FIRST_ID, PROMPT = 20, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a serialized model")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--share", type=float, nargs="*")
    parser.add_argument("--text", nargs="*", choices=texts(), default=list(texts()))
    options = parser.parse_args()
    model = Pixtral.load(serialized_model_path=options.model, devices="cpu", max_length=4096).engine.model
    pair = Replay(model, options.batch, False), Replay(model, options.batch, True)
    if options.share is None:
        cases: dict[str, tuple[list[int], list[int]]] = {name: texts()[name] for name in options.text}
    else:
        noise = random.Random(1).choices(range(FIRST_ID, 600), k=PROMPT + options.tokens)
        cases = {f"{share:.0%} are right": (noise[:PROMPT], noise[PROMPT:]) for share in options.share}
    for number, (name, (prompt, answer)) in enumerate(cases.items()):
        if options.share is not None:
            pair[1].guess(options.share[number])
        rates: tuple[list[float], list[float]] = [], []
        for _ in range(options.rounds):
            for replay, found in zip(pair, rates, strict=True):
                found.append(replay.rate(prompt, answer[: options.tokens]))
        without, with_it = map(statistics.median, rates)
        done, times = pair[1].engine.counters, pair[1].engine.speculation.times
        cost = ", ".join(f"{n}: {(times.of(n) or 0) * 1e3:.0f}" for n in (1, 2, 4, 8))
        print(
            f"{name:14} {without:6.1f} -> {with_it:6.1f} tok/s, {with_it / without:4.2f} x; looked up "
            f"{done.accepted_tokens} of {done.proposed_tokens} for {done.generated_tokens}; ms of rows: {cost}",
            flush=True,
        )
        done.proposed_tokens = done.accepted_tokens = done.generated_tokens = 0


class Replay:
    """An engine that answers given texts, at the speed of its model."""

    def __init__(self, model: torch.nn.Module, batch: int, speculative: bool) -> None:
        self.engine = Engine(model, 4096, batch, speculative=speculative)
        self.batch = batch
        self.answers: dict[int, list[int]] = {}
        compute = self.engine.runner.run
        self.engine.runner.run = lambda chunks: self._as_text(compute(chunks), chunks)

    @torch.inference_mode()
    def _as_text(self, computed: Computed, chunks: list[Chunk]) -> Computed:
        row = 0
        for chunk in chunks:
            answer, sequence = self.answers[chunk.sequence.id], chunk.sequence
            for n in range(chunk.choices):
                at = sequence.computed + chunk.tokens + n - sequence.prompt_length
                computed.logits[row, answer[at]] = 1e4
                row += 1
        return computed

    def guess(self, share: float) -> None:
        """Propose what will come, in so many cases."""
        chance, speculation = random.Random(2), self.engine.speculation

        def look_up(sequence: Sequence, most: int) -> Match:
            coming = self.answers[sequence.id][sequence.generated :][:most]
            return Match(tuple(each if chance.random() < share else FIRST_ID for each in coming), 4)

        assert speculation is not None
        speculation.look_up = look_up

    def rate(self, prompt: list[int], answer: list[int]) -> float:
        """Tokens a second after the first, of all answers together."""
        for place in range(self.batch):
            request = Request((*prompt[place:], *prompt[:place]), len(answer))
            self.answers[self.engine.submit(request)] = answer
        events = []
        while len({event.request_id for event in events}) < self.batch:
            events += self.engine.step()
        begun, tokens = time.perf_counter(), len(events)
        while self.engine.busy:
            events += self.engine.step()
        seconds = time.perf_counter() - begun
        assert not any(isinstance(event, Failure) for event in events)
        return (len(events) - tokens) / seconds


def texts() -> dict[str, tuple[list[int], list[int]]]:
    """Prompts and answers in tokens: a text that goes on, one copied, one changed, one picked apart."""
    prose = (ROOT / "ARCHITECTURE.md").read_text().partition("## The path of a request")[2]
    table = re.findall(r"\| `(--[a-z-]+)[^`]*` \| (.+) \|", (ROOT / "README.md").read_text())
    code = (ROOT / "pixtral_cli/engine/pages.py").read_text()
    half, rows = len(prose) // 2, [{"flag": flag, "meaning": meaning} for flag, meaning in table]
    ids: dict[str, int] = {}

    def tokens(text: str) -> list[int]:
        return [ids.setdefault(piece, FIRST_ID + len(ids)) for piece in PIECES.findall(text)]

    return {
        "ordinary": (tokens(prose[:half])[-PROMPT:], tokens(prose[half:])),
        "copied": (tokens(prose)[:PROMPT], tokens(prose)[:PROMPT]),
        "code changed": (tokens(code)[:PROMPT], tokens(code.replace("page", "block"))),
        "JSON of a table": (tokens(str(table))[:PROMPT], tokens(json.dumps(rows, indent=1))),
    }


if __name__ == "__main__":
    main()
