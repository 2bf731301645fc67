"""Write the labelled task of the Python standard library: which area is a function from?

python tools/stdlib_task.py data/stdlib_task
"""

import argparse
import sys

from distft.errors import DistftError
from distft.prepare.stdlib_task import write_stdlib_task


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write train.jsonl and test.jsonl of the standard library's task."
    )
    parser.add_argument("directory", help="where the files go")
    parser.add_argument("--library", help="a standard library; by default that of this Python")
    arguments = parser.parse_args()
    try:
        task = write_stdlib_task(arguments.directory, arguments.library)
    except DistftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(
        f"{arguments.directory}: {task.num_train:,} functions to train on and {task.num_test:,} to test on, "
        f"from {len(task.areas)} areas of Python {task.python}'s standard library"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
