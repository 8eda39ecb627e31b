"""`ratlip verify`: whether released results are intact, follow from their raw data, and come out again.

Three levels, each PASS, FAIL or INCONCLUSIVE. *intact*: every released file has the SHA-256 that `SHA256SUMS` holds,
none is missing and none is there beside them. *recomputable*: every table and answer, made anew from the raw results,
equals the file. *rerun*: runs at hand, or trained for this, against the released ones: equal, or inside the range of
the seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path
from typing import TYPE_CHECKING

from ratlip.cache import file_digest
from ratlip.errors import RatlipError, RunError
from ratlip.files import write_text
from ratlip.report import study
from ratlip.studies import released

if TYPE_CHECKING:
    from ratlip.workspace import Workspace

PASS, FAIL, OPEN = "PASS", "FAIL", "INCONCLUSIVE"
SUMS = "SHA256SUMS"
NOT_SUMMED = ("figures/", "models/", SUMS)  # figures are drawn anew by any version of matplotlib; models have their own


@dataclass(frozen=True)
class Check:
    """One level, its state, and a sentence for each thing that was found."""

    level: str
    state: str
    found: tuple[str, ...]


def _files(folder: Path) -> list[str]:
    every = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return [name for name in every if not name.startswith(NOT_SUMMED)]


def seal(folder: str | Path) -> Path:
    """Write the SHA-256 of every released file of `folder` into its SHA256SUMS, as `sha256sum -c` reads it."""
    folder = Path(folder)
    write_text(folder / SUMS, "".join(f"{file_digest(folder / name)}  {name}\n" for name in _files(folder)))
    return folder / SUMS


def intact(folder: str | Path) -> Check:
    """Every file against SHA256SUMS."""
    folder = Path(folder)
    if not (folder / SUMS).is_file():
        return Check("intact", OPEN, (f"{folder / SUMS} is missing; `ratlip study --release` writes it",))
    lines = [line.partition("  ") for line in (folder / SUMS).read_text("utf-8").splitlines()]
    kept = {name: digest for digest, _, name in lines}
    there = set(_files(folder))
    wrong = [f"{name} is missing" for name in kept if name not in there]
    wrong += [f"{name} was not released" for name in sorted(there - kept.keys())]
    wrong += [f"{name} was changed" for name in kept if name in there and file_digest(folder / name) != kept[name]]
    return Check("intact", FAIL if wrong else PASS, tuple(wrong) or (f"{len(kept)} files",))


def recomputable(folder: str | Path) -> Check:
    """Every table and answer, made anew, against the file."""
    folder, wrong = Path(folder), []
    try:
        made = study.documents(folder)
    except (RatlipError, ValueError, KeyError) as problem:
        return Check("recomputable", FAIL, (str(problem),))
    for name, text in made.items():
        stored = (folder / name).read_text("utf-8") if (folder / name).is_file() else ""
        if stored != text:
            lines = list(unified_diff(stored.splitlines(), text.splitlines(), n=0, lineterm=""))[3:5]
            wrong.append(f"{name} does not follow from runs/: {' | '.join(lines)}")
    return Check("recomputable", FAIL if wrong else PASS, tuple(wrong) or (f"{len(made)} tables and texts",))


def rerun(folder: str | Path, workspace: Workspace, wanted: Sequence[str] = ()) -> Check:
    """Runs at hand, and those of `wanted` ("LABEL:SEED", trained where they are missing), against the released ones."""
    found, told, states = released.read(folder), [], []
    at_hand = [f"{label}:{seed}" for label, seed in found.runs[["label", "seed"]].itertuples(index=False)]
    for each in wanted or at_hand:
        label, _, seed = each.rpartition(":")
        if not label or not seed.isdigit():
            raise RunError(f"{each}: should be LABEL:SEED, such as {at_hand[0]}")
        table = released.compare_again(workspace, folder, label, int(seed), train=bool(wanted))
        if table.empty:
            continue
        counts = table["state"].value_counts()
        states += list(counts.index)
        told.append(
            f"{each}: of {len(table)} scores {', '.join(f'{count} {state}' for state, count in counts.items())}"
        )
        far = table[table["state"] == "outside"]
        told += [f"{each}, step {r.step}, {r.score}: {r.again}, released {r.released}" for r in far.itertuples()]
    if not states:
        return Check("rerun", OPEN, (f"no released run is at hand; --rerun {at_hand[0]!r} trains one, in minutes",))
    return Check("rerun", FAIL if "outside" in states else PASS, tuple(told))


def verify(folder: str | Path, workspace: Workspace, wanted: Sequence[str] = ()) -> list[Check]:
    """All three levels, in order."""
    checks = [intact(folder), recomputable(folder)]
    try:
        return [*checks, rerun(folder, workspace, wanted)]
    except RunError as problem:
        return [*checks, Check("rerun", FAIL, (str(problem),))]
