"""Mutation testing of the GPU kernels: changes them one at a time and counts the changes that the tests notice.

    python tests/mutate.py                          a sample: half an hour on two cores (make mutate)
    python tests/mutate.py --count 40 --seed 3      another one
    python tests/mutate.py --language triton        kernels/*.py in Triton's interpreter; cuda: csrc/cuda, emulated
    python tests/mutate.py --file implicit_gemm     only files so named
    python tests/mutate.py --spread                 as many of each file, not of each line
    python tests/mutate.py --all                    every mutant (days)
    python tests/mutate.py --resume LOG             goes on where another run stopped: what LOG holds isn't judged again
    python tests/mutate.py --resume LOG --again     but for its survivors
    python tests/mutate.py --resume LOG --summary   judges nothing, writes tests/mutation/results.txt of what LOG holds

A mutant is killed by a test that fails, a deadlock, or by running into the time limit (of the processor's time, so that a
busy machine kills none); one that doesn't compile doesn't count. Each is built alone and runs a sample of its kernel's
tests, then, if it survives, all of them in all dtypes, then those of the other kernels that have the file. Survivors are
listed, and written to build/mutate/survivors.txt in the form of tests/mutation/equivalent.txt, which holds those that
can't be noticed, each with the reason. Fails below 95 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType

import pytest
from mutation import cuda, triton
from mutation.operators import ROOT, Mutant
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LANGUAGES: dict[str, ModuleType] = {module.NAME: module for module in (cuda, triton)}
FOLDERS = {"cuda": "csrc/", "triton": "kernels/"}
EQUIVALENT = Path(__file__).with_name("mutation") / "equivalent.txt"
RESULTS = EQUIVALENT.with_name("results.txt")
FOLDER = ROOT / "build" / "mutate"
WANTED = 0.95
QUICK = 60  # tests of a kernel at first
LIMIT = 900.0  # seconds of a processor for tests, where no clean run has said how long they take


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


class Log:
    """What runs have found, a line of JSON each: outcomes, and the seconds of the unchanged kernels' tests."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.outcomes: list[Outcome] = []
        self.stronger: list[Mutant] = []  # killed by tests that were made stronger since they had survived
        self.clean: dict[tuple[str, bool], float] = {}
        for line in path.read_text().splitlines() if path and path.exists() else ():
            entry = json.loads(line)
            if "unit" in entry:
                self.clean[entry["unit"], entry["quick"]] = entry["seconds"]
            else:
                self._add(Outcome(Mutant(**entry["mutant"]), entry["verdict"], entry["how"]))

    def _add(self, outcome: Outcome) -> None:
        if any(o.mutant.key == outcome.mutant.key and o.verdict == "survived" for o in self.outcomes):
            self.stronger += [outcome.mutant] * (outcome.verdict == "killed")
        self.outcomes = [*(o for o in self.outcomes if o.mutant.key != outcome.mutant.key), outcome]

    def write(self, **entry: object) -> None:
        """Adds a line."""
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as output:
                output.write(json.dumps(entry) + "\n")

    def timed(self, unit: str, quick: bool, seconds: float) -> None:
        """Adds the time of an unchanged kernel's tests."""
        self.clean[unit, quick] = seconds
        self.write(unit=unit, quick=quick, seconds=seconds)

    def judged(self, outcome: Outcome) -> None:
        """Adds an outcome, in place of an older one."""
        self._add(outcome)
        if outcome.verdict != "late":
            self.write(mutant=dataclasses.asdict(outcome.mutant), verdict=outcome.verdict, how=outcome.how)


class Runner:
    """Builds and tests mutants of one language."""

    def __init__(self, language: ModuleType, seed: int, deadline: float, log: Log) -> None:
        self.language, self.seed, self.deadline, self.log = language, seed, deadline, log
        self.shared = FOLDER / language.NAME / "shared"

    def tests(self, unit: str, environment: dict[str, str], quick: bool, log: Path, limit: float) -> int | None:
        """pytest's exit code; None where the processor's time was up."""
        count = str(QUICK if quick else 0)
        command = [
            sys.executable,
            "-m",
            "mutation.run_tests",
            self.language.selection(unit, quick),
            count,
            str(self.seed),
        ]
        variables = {**os.environ, **environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        with log.open("w") as output:
            process = subprocess.Popen(
                [*command, *self.files(unit, quick)], cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            resource.prlimit(process.pid, resource.RLIMIT_CPU, (round(limit), round(limit)))
            try:
                code = process.wait(timeout=10 * limit)
            except subprocess.TimeoutExpired:  # asleep
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return None
        return None if code in (-signal.SIGXCPU, -signal.SIGKILL) else code

    def files(self, unit: str, quick: bool) -> list[str]:
        """The test files: that of all kernels, what the language's kernel has of its own, at last what its operation has."""
        tests = [*(ROOT / "tests").glob(f"test_{self.language.NAME}_*.py")]
        named = [p for p in tests if unit.startswith(p.stem.removeprefix(f"test_{self.language.NAME}_"))]
        if not quick:
            named += [p for p in (ROOT / "tests").glob("test_*.py") if unit.startswith(p.stem.removeprefix("test_"))]
        return [str(p) for p in (ROOT / "tests" / "test_kernels.py", *sorted(named))]

    def calibrate(self, unit: str, quick: bool, folder: Path) -> float:
        """Seconds of a processor that the unchanged kernel's tests take; ends the run if they fail."""
        if (unit, quick) not in self.log.clean:
            environment, problem = self.language.build(unit, None, self.shared, folder, quick)
            begin = resource.getrusage(resource.RUSAGE_CHILDREN)
            code = None if problem else self.tests(unit, environment, quick, folder / "log", LIMIT)
            if code != 0:
                text = problem or (folder / "log").read_text()
                raise RuntimeError(f"the tests of the unchanged {unit} fail ({code}): {text[-3000:]}")
            end = resource.getrusage(
                resource.RUSAGE_CHILDREN
            )  # those of other threads count, too: a limit all the same
            self.log.timed(unit, quick, end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime)
        return self.log.clean[unit, quick]

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
                if code not in (0, 1, pytest.ExitCode.NO_TESTS_COLLECTED):
                    return Outcome(mutant, "killed", f"the process ended with {code}")
                if code == 1:
                    lines = (folder / "log").read_text(errors="replace").splitlines()
                    return Outcome(mutant, "killed", next((line for line in lines if "Error" in line), "")[:200])
        return Outcome(mutant, "survived" if compiled else "invalid")


def choose(options: argparse.Namespace, log: Log) -> list[tuple[ModuleType, Mutant]]:
    """All mutants, or a sample of them, without those known to be equivalent or judged before.

    In the order of a hash with the seed: a sample stays the same when other lines change or more are known.
    """
    known = equivalents()
    judged = {o.mutant.key for o in log.outcomes if not (options.again and o.verdict == "survived")}
    found = [
        (language, mutant)
        for name, language in LANGUAGES.items()
        if options.language in (None, name)
        for path in language.files()
        if options.file is None or re.search(options.file, path.name)
        for mutant in language.mutants(path)
    ]
    if not options.all:
        found.sort(key=lambda pair: zlib.crc32(f"{options.seed}{pair[1].key}".encode()))
        if options.spread:
            path = lambda pair: (len(pair[0].units(pair[1].path)), pair[1].path)  # noqa: E731
            by_file = itertools.groupby(sorted(found, key=path), key=path)  # shared headers last, for they take longest
            rounds = itertools.zip_longest(*(list(pairs) for _, pairs in by_file))
            found = [pair for pairs in rounds for pair in pairs if pair]
        found = found[: options.count]
    return [(language, mutant) for language, mutant in found if mutant.key not in known | judged]


def main() -> int:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--language", choices=LANGUAGES)
    parser.add_argument("--file", help="a regular expression")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30, help="no mutant is begun after so many")
    parser.add_argument("--resume", type=Path, metavar="LOG")
    for name in ("spread", "all", "again", "summary"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args()
    log = Log(options.resume)
    if options.summary:
        RESULTS.write_text(summary(log, options.seed))
        return report(log.outcomes)
    chosen = choose(options, log)
    deadline = time.monotonic() + (1e9 if options.all else 60 * options.minutes)
    runners = {name: Runner(language, options.seed, deadline, log) for name, language in LANGUAGES.items()}
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

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("mutants", total=len(chosen))
        for future in as_completed([pool.submit(examine, *pair) for pair in chosen]):
            outcome = future.result()
            log.judged(outcome)
            counts = Counter(o.verdict for o in log.outcomes)
            progress.update(task, advance=1, description=f"{counts['killed']} killed, {counts['survived']} survived")
            if outcome.verdict == "survived" or not sys.stdout.isatty():  # a log: what is done stays known
                print(f"{outcome.verdict}: {outcome.mutant}\n    {outcome.how}".rstrip(), flush=True)
    return report(log.outcomes)


def _table(title: str, outcomes: list[Outcome], key: Callable[[Mutant], str]) -> list[str]:
    """Lines of killed and all by file or change."""
    counts = Counter((key(o.mutant), o.verdict) for o in outcomes)
    names = sorted({name for name, _ in counts})
    lines = [
        f"{counts[n, 'killed']:5d} of {counts[n, 'killed'] + counts[n, 'survived']:3d}  {n}"
        for n in names
        if counts[n, "killed"] + counts[n, "survived"]
    ]
    return ["", f"by {title}", *lines]


def summary(log: Log, seed: int) -> str:
    """What is kept in the repository of a run."""
    known = equivalents()
    lines = [
        "Mutants of the GPU kernels that the tests killed, of those judged, by tests/mutate.py --summary.",
        f"{time.strftime('%Y-%m-%d')}, seed {seed}. Equivalent ones (equivalent.txt) and such that don't compile don't count.",
    ]
    for name, folder in FOLDERS.items():
        judged = [o for o in log.outcomes if o.mutant.path.startswith(folder)]
        own = [o for o in judged if o.mutant.key not in known]
        counts = Counter(o.verdict for o in own)
        total = counts["killed"] + counts["survived"]
        if total:
            rate = f"{counts['killed']} of {total} killed, {counts['killed'] / total:.1%}"
            lines += ["", f"{name}: {rate}; {counts['invalid']} didn't compile, {len(judged) - len(own)} equivalent"]
            lines += [f"at first survived: {m}" for m in log.stronger if m.path.startswith(folder)]
            lines += _table("file", own, lambda m: m.path)
            lines += _table("change", own, lambda m: m.what)
            lines += [f"\nsurvived: {o.mutant}" for o in own if o.verdict == "survived"]
    return "\n".join(lines) + "\n"


def report(outcomes: list[Outcome]) -> int:
    """Counts by language, and the survivors; the exit code."""
    known = equivalents()
    outcomes = [o for o in outcomes if o.mutant.key not in known]
    survivors = [o.mutant for o in outcomes if o.verdict == "survived"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = "\n".join(f"{m.path}\n- {m.before.strip()}\n+ {m.after.strip()}\n# why?\n" for m in survivors)
    (FOLDER / "survivors.txt").write_text(text)
    (FOLDER / "killed.txt").write_text("\n".join(f"{o.mutant}\n    {o.how}" for o in outcomes if o.verdict == "killed"))
    print()
    low = 0
    for name in LANGUAGES:
        counts = Counter(o.verdict for o in outcomes if o.mutant.path.startswith(FOLDERS[name]))
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
