"""Proposals of known quality for engines, in the place of those looked up."""

import random

from pixtral_cli.engine.lookup import Match
from pixtral_cli.engine.speculation import MOST_ROWS


class Forced:
    """Proposes what `guess` gives for a sequence, and computes all of it: nothing is weighed."""

    def __init__(self, engine, guess, rows=MOST_ROWS):
        self.engine, self.guess = engine, guess
        engine.speculation.look_up = lambda sequence, most: Match(tuple(self.guess(sequence, most)), 2)
        engine.speculation.worth = self.worth

    def worth(self, matches, shares, rows):
        counts, left = [], MOST_ROWS - rows
        for match in matches:
            counts.append(min(len(match.tokens), left))
            left -= counts[-1]
        return counts


def oracle(answers):
    """Always right: `answers` are those of each sequence, by id, as they come without speculation."""

    def guess(sequence, most):
        return answers[sequence.id][sequence.generated :][:most]

    return guess


def wrong(answers):
    return lambda sequence, most: [(token + 1) % 300 for token in oracle(answers)(sequence, most)]


def at_random(answers, seed=1):
    chance = random.Random(seed)

    def guess(sequence, most):
        right = oracle(answers)(sequence, most)
        return [token if chance.random() < 0.7 else 20 for token in right[: chance.randint(0, most)]]

    return guess
