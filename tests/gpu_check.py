"""All that only a card can tell, in four minutes: the tests marked `gpu`, then the benchmark of the whole engine.

    python tests/gpu_check.py --json FILE [--seconds 240] [--kernels] [--only tests,model] [--device cuda|cpu]

Each part is a process of its own with a bound of its own, so that one that hangs or breaks the card's context costs no
other. Needs pytest, transformers and what `pixtral` itself needs; neither network nor checkpoint nor an installed
package. With pytest-xdist the tests run side by side; without it they may not all fit. `--kernels` also runs the
benchmarks of single kernels, which take longer. Prints one table and writes it to FILE as JSON. Exits with 1 if a test
fails or the tests do not come to their end, with 2 if there is no card. On `--device cpu` a tiny model shows that the
benchmark works.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.measured import markdown

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
KERNELS = ("gpu_packed", "gpu_attention", "gpu_ops", "gpu_load")
MARKED = re.compile(r"\bmark\.gpu\b|\bDEVICES\b")
TESTS_SHARE = 0.45  # of all seconds, at most
LAST_WORDS = 12.0
"""Seconds that each part has for what it is at when its time is over."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where the table is written")
    parser.add_argument("--seconds", type=float, default=240, help="of everything together, but for --kernels")
    parser.add_argument("--only", default="tests,model", help="tests, model, or both")
    parser.add_argument("--model", default="", help="more arguments for benchmarks/gpu_model.py")
    parser.add_argument("--kernels", action="store_true", help="the benchmarks of single kernels, too")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    begun, parts = time.monotonic(), options.only.split(",")
    if options.device == "cuda" and (why := no_card()):
        print(why, file=sys.stderr)
        return 2
    found: dict[str, Any] = {"tests": None, "rows": [], "left_out": []}

    def write() -> None:
        found["seconds"] = round(time.monotonic() - begun, 1)
        options.json.write_text(json.dumps(found, indent=1) + "\n")

    if "tests" in parts:
        found["tests"] = run_tests(options.seconds * TESTS_SHARE)
        write()
    if "model" in parts:
        left = options.seconds - (time.monotonic() - begun)
        found |= run_model(left, options.device, options.model.split())
        write()
    if options.kernels:
        found["kernels"] = {name: run_kernels(name) for name in KERNELS}
        write()
    print(summary(found))
    tests = found["tests"]
    return int(tests is not None and not tests["passes"])


def no_card() -> str:
    """A sentence if torch sees no GPU; asked in a process of its own, which leaves nothing on the card."""
    program = "import torch; print(torch.__version__, torch.cuda.is_available())"
    version, _, there = run([sys.executable, "-c", program], 60, quiet=True)[1].strip().rpartition(" ")
    return (
        "" if there == "True" else f"torch {version or '(not installed)'} sees no CUDA device; --device cpu tries all."
    )


def run(command: Sequence[str], seconds: float, quiet: bool = False, **environment: str) -> tuple[int | None, str]:
    """The exit code, None if it was stopped after so many seconds; its output, which is shown as it comes."""
    path = os.pathsep.join([str(ROOT), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    known = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment}
    with tempfile.TemporaryFile("w+") as kept:
        sink = kept if quiet else None
        process = subprocess.Popen(command, cwd=ROOT, env=known, stdout=sink, stderr=sink, process_group=0)
        code: int | None = None
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(max(seconds, 1))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
        kept.seek(0)
        return code, kept.read()


def run_tests(seconds: float) -> Mapping[str, Any]:
    """The tests marked `gpu`; pytest's own settings in pyproject.toml name plugins that need not be here."""
    files = [str(path) for path in sorted(TESTS.rglob("test_*.py")) if MARKED.search(path.read_text())]
    workers = min((os.cpu_count() or 1) // 2, 8)  # most of the time goes into compiling kernels
    more = ["--timeout=60"] if importlib.util.find_spec("pytest_timeout") else []
    more += ["-n", str(workers), "--dist=worksteal"] if workers > 1 and importlib.util.find_spec("xdist") else []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [
            sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-o", "addopts=", "--import-mode=importlib",
            "-p", "support.deadline", "-p", "no:cacheprovider", "--continue-on-collection-errors",
            "-W", "ignore::pytest.PytestConfigWarning", "--tb=short", "--durations=8",
            f"--junit-xml={report}", *more, *files,
        ]  # fmt: skip
        code, _ = run(command, seconds, TESTS_UNTIL=str(time.time() + seconds - LAST_WORDS))
        cases = list(ElementTree.parse(report).getroot().iter("testcase")) if report.exists() else []
    kinds = [{child.tag for child in case} for case in cases]
    names = [f"{case.get('classname')}::{case.get('name')}" for case in cases]
    slowest = sorted(
        ((float(case.get("time", 0)), name) for case, name in zip(cases, names, strict=True)), reverse=True
    )
    failed = [name for name, of_case in zip(names, kinds, strict=True) if of_case & {"failure", "error"}]
    return {
        "passed": sum(not of_case & {"failure", "error", "skipped"} for of_case in kinds),
        "failed": failed,
        "skipped": sum("skipped" in of_case for of_case in kinds),
        "slowest": slowest[:8],
        "ended": code in (0, 1, 5),  # pytest's: all pass, some fail, there are none
        "passes": code in (0, 5),
        "seconds": round(time.monotonic() - begun, 1),
    }


def run_model(seconds: float, device: str, more: Sequence[str]) -> dict[str, Any]:
    """The rows of the benchmark, as far as it came."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.json")
        shape = ["--device", "cpu", "--shape", "tiny"] if device == "cpu" else []
        script = str(TESTS / "benchmarks" / "gpu_model.py")
        bound = ["--seconds", str(seconds - LAST_WORDS)]
        code, _ = run([sys.executable, script, "--json", str(rows), *bound, *shape, *more], seconds)
        found = json.loads(rows.read_text()) if rows.exists() else {"rows": [], "left_out": ["the whole benchmark"]}
    if code != 0:
        found["left_out"].append(
            "what comes after the last row: " + ("out of time" if code is None else f"exit {code}")
        )
    return found


def run_kernels(name: str) -> str:
    """The table that a benchmark of single kernels prints, or why there is none."""
    script = TESTS / "benchmarks" / f"{name}.py"
    if not script.exists():
        return "not there"
    code, output = run([sys.executable, str(script)], 90, quiet=True)
    return output if code == 0 else f"{output}\n(exit {code})"


def summary(found: Mapping[str, Any]) -> str:
    lines = ["", markdown(found)] if found["rows"] or found["left_out"] else []
    lines += [f"\n{name}\n{text}" for name, text in found.get("kernels", {}).items()]
    if (tests := found["tests"]) is not None:
        counts = f"{tests['passed']} passed, {len(tests['failed'])} failed, {tests['skipped']} skipped"
        lines.append(f"tests: {counts} in {tests['seconds']} s" + ("" if tests["ended"] else "; cut off, out of time"))
        lines += [f"- failed: {name}" for name in tests["failed"]]
    return "\n".join([*lines, f"{found['seconds']} s in all"])


if __name__ == "__main__":
    sys.exit(main())
