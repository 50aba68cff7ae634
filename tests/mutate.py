"""Mutation testing of the GPU kernels: changes them one at a time and counts the changes that the tests notice.

    python tests/mutate.py                          a sample: half an hour on two cores (make mutate)
    python tests/mutate.py --count 40 --seed 3      another one
    python tests/mutate.py --language triton        kernels/*.py in Triton's interpreter; cuda: csrc/cuda, emulated
    python tests/mutate.py --file implicit_gemm     only files so named
    python tests/mutate.py --all                    every mutant (days)

A mutant is killed by a test that fails, a deadlock, or by running into the time limit; one that doesn't compile doesn't
count. Each is built alone and runs a sample of its kernel's tests, then, if it survives, all of them in all dtypes, then
those of the other kernels that have the file. Survivors are listed, and written to build/mutate/survivors.txt in the form
of tests/mutation/equivalent.txt, which holds those that can't be noticed, each with the reason. Fails below 95 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType

from mutation import cuda, triton
from mutation.operators import ROOT, Mutant
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LANGUAGES: dict[str, ModuleType] = {module.NAME: module for module in (cuda, triton)}
EQUIVALENT = Path(__file__).with_name("mutation") / "equivalent.txt"
FOLDER = ROOT / "build" / "mutate"
WANTED = 0.95
QUICK = 60  # tests of a kernel at first
LIMIT = 900.0  # seconds for tests, where no clean run has said how long they take


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a mutant: killed, survived, invalid or late (the time was up)."""

    mutant: Mutant
    verdict: str
    how: str = ""


def equivalents() -> set[tuple[str, str, str]]:
    """Those that can't be noticed."""
    found = set()
    pattern = r"^(\S+)\n- (.*)\n\+ (.*)\n# .+"
    for m in re.finditer(pattern, EQUIVALENT.read_text() if EQUIVALENT.exists() else "", re.M):
        found.add((m[1], m[2].strip(), m[3].strip()))
    return found


class Runner:
    """Builds and tests mutants of one language."""

    def __init__(self, language: ModuleType, seed: int, deadline: float) -> None:
        self.language, self.seed, self.deadline = language, seed, deadline
        self.shared = FOLDER / language.NAME / "shared"
        self.clean: dict[tuple[str, bool], float] = {}  # seconds of the unchanged kernels' tests

    def tests(self, unit: str, environment: dict[str, str], quick: bool, log: Path, limit: float) -> int | None:
        """pytest's exit code; None where the time was up."""
        count = str(QUICK if quick else 0)
        command = [sys.executable, "-m", "mutation.run_tests", self.language.selection(unit), count, str(self.seed)]
        variables = {**os.environ, **environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        with log.open("w") as output:
            process = subprocess.Popen(
                [*command, *self.files(unit)], cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                return process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return None

    def files(self, unit: str) -> list[str]:
        """The test files: that of all kernels, and what a kernel has of its own."""
        own = (ROOT / "tests").glob(f"test_{self.language.NAME}_*.py")
        named = [p for p in own if unit.startswith(p.stem.removeprefix(f"test_{self.language.NAME}_"))]
        return [str(p) for p in (ROOT / "tests" / "test_kernels.py", *sorted(named))]

    def calibrate(self, unit: str, quick: bool, folder: Path) -> float:
        """Seconds that the unchanged kernel's tests take; ends the run if they fail."""
        if (unit, quick) not in self.clean:
            environment, problem = self.language.build(unit, None, self.shared, folder, quick)
            begin = time.monotonic()
            code = None if problem else self.tests(unit, environment, quick, folder / "log", LIMIT)
            if code != 0:
                text = problem or (folder / "log").read_text()
                raise RuntimeError(f"the tests of the unchanged {unit} fail ({code}): {text[-3000:]}")
            self.clean[unit, quick] = time.monotonic() - begin
        return self.clean[unit, quick]

    def examine(self, mutant: Mutant, folder: Path) -> Outcome:
        """Builds and tests one."""
        compiled = False
        for quick in (True, False):
            for unit in self.language.units(mutant.path):
                if time.monotonic() > self.deadline:
                    return Outcome(mutant, "late")
                folder.mkdir(parents=True, exist_ok=True)
                limit = 20 + 4 * self.calibrate(unit, quick, folder)
                environment, problem = self.language.build(unit, mutant, self.shared, folder, quick)
                if problem:
                    continue
                compiled = True
                code = self.tests(unit, environment, quick, folder / "log", limit)
                if code is None:
                    return Outcome(mutant, "killed", "time limit")
                if code < 0 or code > 1:
                    return Outcome(mutant, "killed", f"the process ended with {code}")
                if code == 1:
                    lines = (folder / "log").read_text(errors="replace").splitlines()
                    return Outcome(mutant, "killed", next((line for line in lines if "Error" in line), "")[:200])
        return Outcome(mutant, "survived" if compiled else "invalid")


def choose(options: argparse.Namespace) -> list[tuple[ModuleType, Mutant]]:
    """All mutants, or a sample of them, the same for a seed, without those known to be equivalent."""
    known = equivalents()
    found = [
        (language, mutant)
        for name, language in LANGUAGES.items()
        if options.language in (None, name)
        for path in language.files()
        if options.file is None or re.search(options.file, path.name)
        for mutant in language.mutants(path)
        if mutant.key not in known
    ]
    if options.all:
        return found
    return random.Random(options.seed).sample(found, min(options.count, len(found)))


def main() -> int:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--language", choices=LANGUAGES)
    parser.add_argument("--file", help="a regular expression")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30, help="no mutant is begun after so many")
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    chosen = choose(options)
    deadline = time.monotonic() + (1e9 if options.all else 60 * options.minutes)
    runners = {name: Runner(language, options.seed, deadline) for name, language in LANGUAGES.items()}
    for name in {language.NAME for language, _ in chosen}:
        LANGUAGES[name].prepare(runners[name].shared)
    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    free = [FOLDER / str(i) for i in range(jobs)]  # a folder for each that runs

    def examine(language: ModuleType, mutant: Mutant) -> Outcome:
        folder = free.pop()
        try:
            return runners[language.NAME].examine(mutant, folder / language.NAME)
        finally:
            free.append(folder)

    outcomes: list[Outcome] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("mutants", total=len(chosen))
        for future in as_completed([pool.submit(examine, *pair) for pair in chosen]):
            outcome = future.result()
            outcomes.append(outcome)
            counts = Counter(o.verdict for o in outcomes)
            progress.update(task, advance=1, description=f"{counts['killed']} killed, {counts['survived']} survived")
            if outcome.verdict == "survived" or not sys.stdout.isatty():  # a log: what is done stays known
                print(f"{outcome.verdict}: {outcome.mutant}\n    {outcome.how}".rstrip(), flush=True)
    return report(outcomes)


def report(outcomes: list[Outcome]) -> int:
    """Counts by language, and the survivors; the exit code."""
    survivors = [o.mutant for o in outcomes if o.verdict == "survived"]
    text = "\n".join(f"{m.path}\n- {m.before.strip()}\n+ {m.after.strip()}\n# why?\n" for m in survivors)
    (FOLDER / "survivors.txt").write_text(text)
    (FOLDER / "killed.txt").write_text("\n".join(f"{o.mutant}\n    {o.how}" for o in outcomes if o.verdict == "killed"))
    print()
    low = 0
    for name in LANGUAGES:
        folder = {"cuda": "csrc/", "triton": "kernels/"}[name]
        counts = Counter(o.verdict for o in outcomes if o.mutant.path.startswith(folder))
        total = counts["killed"] + counts["survived"]
        if not total:
            continue
        rate = counts["killed"] / total
        low += rate < WANTED
        print(
            f"{name}: {counts['killed']} of {total} killed, {rate:.1%}; {counts['invalid']} don't compile, "
            f"{counts['late']} not begun in time"
        )
    for mutant in survivors:
        print(f"survived: {mutant}")
    for folder in FOLDER.glob("[0-9]*"):
        shutil.rmtree(folder, ignore_errors=True)
    return int(low > 0)


if __name__ == "__main__":
    sys.exit(main())
