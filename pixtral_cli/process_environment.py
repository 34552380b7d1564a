"""What libraries in C read from the environment once, when they are loaded: set before torch is imported."""

import os

DEFAULTS = {"GOMP_SPINCOUNT": "2000"}
"""libgomp (torch's threads): how many turns a thread waits for the others awake before it sleeps.

Its own default is some milliseconds. Where other programs use the cores, threads then wait for one that does not run,
and decoding is ten to fifty times slower. With 2,000 turns, some microseconds, it is not; when all is quiet, decoding
loses less than a tenth. See https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
"""
SAID_OTHERWISE = ("OMP_WAIT_POLICY",)
"""What the user sets wins: this is another name of the same thing."""


def of_others() -> dict[str, str]:
    """The environment for other programs: as the user has it, without what `prepare` set for this one."""
    return {name: value for name, value in os.environ.items() if DEFAULTS.get(name) != value}


def prepare() -> None:
    """Set what the user has not."""
    if not any(name in os.environ for name in SAID_OTHERWISE):
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
