"""`python -m tests.fuzz [--seconds S] [TARGET ...]`: look for inputs that a reader does not bear, guided by coverage.

Each target has its share of the time, in a process of its own. What is found goes to `.fuzz/findings/`, once for each
place in the code; inputs that reach new code are kept in `.fuzz/corpus/` for the next run.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
from pathlib import Path
from random import Random

CORPUS = Path(__file__).parent / "corpus"  # of each target, a folder
MAX_BYTES = 32 * 1024  # of an input: as much as shows what is deep, long or large
WORK = Path(".fuzz")
FINDINGS = WORK / "findings"


def fuzz(target: str, arguments: list[str]) -> None:
    """Fuzz one target until libFuzzer's arguments say that it is over; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["daemon", "guard", "tomllib"]):
        from tests.fuzz import harness

    others = [path.read_bytes() for path in harness.kept_inputs(target)]
    seen: set[str] = set()

    def test(data: bytes) -> None:
        finding = harness.examine(target, data)
        if finding is None or finding.place in seen:
            return
        seen.add(finding.place)
        path = FINDINGS / f"{target}-{hashlib.blake2s(finding.place.encode(), digest_size=6).hexdigest()}"
        if path.exists() and path.stat().st_size <= len(data):
            return  # an earlier run found a shorter one
        path.write_bytes(data)
        print(f"{path}: {finding.place}\n{finding.report}", flush=True)

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        if random.randrange(3) == 0:
            return bytes(atheris.Mutate(data, max_size))
        return harness.mutate(data, random, others)[:max_size]

    harness.examine(target, b"")  # what is imported late takes its time once
    atheris.Setup([sys.argv[0], *arguments], test, custom_mutator=mutator)
    atheris.Fuzz()


def run_all(targets: list[str], seconds: float) -> int:
    """Fuzz each target in a process of its own and print its figures; 1 when something was found."""
    FINDINGS.mkdir(parents=True, exist_ok=True)
    failed = False
    for target in targets:
        corpus = WORK / "corpus" / target
        corpus.mkdir(parents=True, exist_ok=True)
        options = {
            "max_total_time": max(1, round(seconds / len(targets))),
            "max_len": MAX_BYTES,
            "handle_alrm": 0,  # a reader has an alarm of its own
            "print_final_stats": 1,
            "verbosity": 1,
            "artifact_prefix": f"{FINDINGS}/{target}-killed-",
        }
        arguments = [
            *(f"-{name}={value}" for name, value in options.items()),
            str(corpus),
            str(CORPUS / target),
        ]
        command = [sys.executable, "-m", "tests.fuzz", "--one", target, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        (WORK / f"{target}.log").write_text(done.stdout + done.stderr)
        units = re.findall(r"number_of_executed_units: (\d+)", done.stderr)
        covered = re.findall(r"cov: (\d+)", done.stderr)
        if done.returncode or not units:
            print(f"{target}: ended with {done.returncode}:\n{done.stderr[-2000:]}")
            failed = True
            continue
        rate = int(units[-1]) / options["max_total_time"]
        print(f"{target:15} {int(units[-1]):>9,} inputs, {rate:>6,.0f}/s, {covered[-1] if covered else '?'} edges")
        if done.stdout.strip():
            print(done.stdout)
            failed = True
    return int(failed)


def main() -> int:
    """Read the command line."""
    if sys.argv[1:2] == ["--one"]:
        fuzz(sys.argv[2], sys.argv[3:])
    targets = sorted(path.name for path in CORPUS.iterdir())
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="for all targets together")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(targets)}; all when none is named")
    chosen = parser.parse_args()
    return run_all(chosen.targets or targets, chosen.seconds)


if __name__ == "__main__":
    sys.exit(main())
