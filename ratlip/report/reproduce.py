"""`make reproduce`: Snakemake, and one sentence where another one, or what a killed one left, is in its way.

    python -m ratlip.report.reproduce WORDS-OF-SNAKEMAKE

Snakemake's own lock is a file, which a killed process leaves for ever, and it does not say whose it is. Hence one of
ours around it, which ends with its process (`files.one_writer`): whoever holds it after a killed one removes what that
one left. A lock of a Snakemake that was not started by make may be alive; it stays.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from ratlip.errors import RatlipError
from ratlip.files import one_writer

HOME = Path(".snakemake")
ONLY_LOOK = {"-n", "--dry-run", "--dryrun", "--unlock"}
ELSEWHERE = """{locks}: a Snakemake that make did not start works here, or was killed; wait until it has ended, or
 where none runs: make reproduce SNAKEFLAGS=--unlock, then make reproduce"""


def main(words: list[str]) -> int:
    """Run `snakemake WORDS`: its exit status; 2 where another `make reproduce` is at work here."""
    if ONLY_LOOK & {*words}:
        return _snakemake(words)
    locks, killed = HOME / "locks", (HOME / "make" / "writer.json").is_file()
    try:
        with one_writer(HOME / "make"):
            if killed:
                shutil.rmtree(locks, ignore_errors=True)
            in_the_way = locks.is_dir() and any(locks.iterdir())
            status = _snakemake(words)
    except RatlipError as error:
        print(f"make reproduce: {error}", file=sys.stderr)
        return 2
    if status and in_the_way:
        print("make reproduce: " + ELSEWHERE.replace("\n", "").format(locks=locks), file=sys.stderr)
    return status


def _snakemake(words: list[str]) -> int:
    from snakemake.cli import main as snakemake  # here: it takes a second, and who is refused need not wait for it

    try:
        snakemake(words)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
