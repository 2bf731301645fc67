"""A long run of tests/hostile/test_fuzz.py: `python tools/fuzz.py --minutes 30 [--subject deepspeed text]`.

Takes the subjects in turn, until the time is over. A finding is shrunk to its smallest edits, printed with
what reproduces it, and kept below `--keep` for the next run; then the run goes on with the next subject.
Exits with 1 if anything was found.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from hostile.fuzzing import EDITS, Edit, Subject, make_subjects
from hostile.guard import Guard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--subject", nargs="+", help="only these formats")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--keep", type=Path, default=Path(".hypothesis") / "fuzz")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="fuzz_") as directory, Guard() as guard:
        subjects = make_subjects(Path(directory))
        chosen = [s for s in subjects if arguments.subject is None or s.name in arguments.subject]
        if not chosen:
            parser.error(f"--subject: choose of {', '.join(subject.name for subject in subjects)}")
        end = time.monotonic() + 60 * arguments.minutes
        turn, num_found = 0, 0
        while time.monotonic() < end and chosen:
            subject = chosen[turn % len(chosen)]
            if not _holds(subject, guard, Path(directory) / "scratch", arguments.seed + turn, arguments.keep):
                num_found += 1
                chosen.remove(subject)  # it would be found again and again
            turn += 1
    print(f"{turn} turns, {num_found} findings")
    sys.exit(num_found > 0)


def _holds(subject: Subject, guard: Guard, scratch: Path, number: int, keep: Path) -> bool:
    """Try 200 damaged files; print what was found, and return whether nothing was."""

    @seed(number)
    @settings(
        max_examples=200,
        deadline=None,
        database=DirectoryBasedExampleDatabase(keep),
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(file=st.sampled_from(subject.files()), edits=EDITS)
    def check(file: str, edits: list[Edit]) -> None:
        subject.check(guard, scratch, file, edits)

    started = time.monotonic()
    try:
        check()
    except AssertionError as found:
        notes = "\n".join(getattr(found, "__notes__", ()))
        print(f"{subject.name}, seed {number}: {found}\n{notes}", flush=True)
        return False
    print(f"{subject.name}: nothing in {time.monotonic() - started:.0f} s", flush=True)
    return True


if __name__ == "__main__":
    main()
