"""Reading the official layouts: where a root is, its tables, captions and split lists, with every mistake noted."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ratlip.data.records import SPLITS, Problems, Record, Records, in_order, open_image
from ratlip.errors import DataError
from ratlip.files import leading_out


@dataclass(frozen=True)
class Remote:
    """A file with a public address, and what it becomes in the dataset root."""

    url: str
    checksum: str  # as pooch writes it
    gives: str  # the file or folder that is there afterwards; for an archive, the one thing taken out
    size: int  # bytes


@dataclass(frozen=True)
class Source:
    """A dataset as its authors give it away: what its root looks like, and where each part of it comes from."""

    name: str
    parts: tuple[str, ...]  # folders at the top of the root; the first is in every root
    layout: str  # the root as a picture
    by_hand: str  # how to get what has no public address
    needed: tuple[tuple[str, ...], ...]  # what must then be there: one of each row
    licence: str  # what is known of the rights in the pictures, as sentences
    fetched: tuple[Remote, ...] = ()


def find_root(root: str | Path, source: Source) -> Path:
    """The dataset root: `root`, or the one folder in it that is a root, or the folder around it. DataError if none."""
    root, first = Path(root).expanduser(), source.parts[0]
    whole = root.absolute()
    inside = sorted(root.iterdir()) if root.is_dir() else []
    for folders in ([root], inside, [whole.parent] if whole.name in source.parts else []):
        found = [folder for folder in folders if (folder / first).is_dir()]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(folder.name for folder in found)
            raise DataError(f"{root}: holds several roots of {source.name} ({names}); name one of them")
    wrong = f"there is no folder {first} in it" if root.is_dir() else "there is no such folder"
    raise DataError(f"{root}: is no root of {source.name} ({wrong}); a root looks like this:\n{source.layout}")


def root_problems(root: Path, what: str) -> Problems:
    """The list of what is wrong with `what` in `root`, begun with the links that lead out of it: none is accepted."""
    problems = Problems(f"{what} in {root}")
    for link in leading_out(root):
        problems.add(link, f"is a link that leads out of {root} (to {link.readlink()}); copy its target in its place")
    return problems


def read_text(path: Path) -> str:
    """The text of a file; bytes that are no UTF-8 become U+FFFD."""
    return path.read_bytes().decode("utf-8-sig", "replace")


def read_rows(
    path: Path, parse: Callable[[str], tuple[Any, Any]], expected: str, problems: Problems, header: int = 0
) -> dict | None:
    """{key: value} as `parse` makes them of every line after the first `header` ones; None if the file is missing.

    `problems` gets the missing file, rows that `parse` refuses (ValueError) and repeated keys, with their line numbers.
    """
    if not path.is_file():
        problems.add(path, "the file is missing")
        return None
    rows: dict[Any, Any] = {}
    for number, line in enumerate(map(str.strip, read_text(path).split("\n")), start=1):
        if number <= header or not line:
            continue
        try:
            key, value = parse(line)
        except ValueError:
            problems.add(f"{path}:{number}", f"expected {expected}, found {line[:60]!r}")
            continue
        if key in rows:
            problems.add(f"{path}:{number}", f"{key} occurs twice")
        rows[key] = value
    return rows


def fields(*types: Callable[[str], Any]) -> Callable[[str], tuple[Any, Any]]:
    """A `parse` for `read_rows`: white-space separated fields as (first, second) or (first, (second, third, ...)).

    `types` convert the fields; the last field takes the rest of the line.
    """

    def parse(line: str) -> tuple[Any, Any]:
        pairs = zip(types, line.split(maxsplit=len(types) - 1), strict=True)
        key, *values = [convert(field) for convert, field in pairs]
        return key, values[0] if len(values) == 1 else tuple(values)

    return parse


def read_captions(path: Path, problems: Problems) -> tuple[str, ...]:
    """The captions of one image, one a line, as they are but for white space.

    Runs of U+FFFD, which stand for blanks in some files of Reed et al., become one blank, as in the published code.
    """
    lines = read_text(path).replace("\ufffd", " ").split("\n") if path.is_file() else []
    captions = tuple(" ".join(line.split()) for line in lines if line.strip())
    if not captions:
        problems.add(path, f"the caption file is {'empty' if lines else 'missing'}")
    return captions


class _NamesOnly(pickle.Unpickler):
    """A pickle is a program that may import and call anything; here only what needs no import comes out: lists, str."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it wants to import {module}.{name}, which was refused")


def load_names(path: str | Path) -> list[str]:
    """The list (or tuple) of strings in a pickle file of any protocol, those written by Python 2 included.

    Raises ValueError that says what is wrong if the file holds anything else; nothing of it is executed.
    """
    with open(path, "rb") as file:
        try:
            names = _NamesOnly(file, encoding="latin-1").load()
        except Exception as error:  # a damaged pickle raises whatever its bytes happen to trip over
            raise ValueError(f"is not a pickled list of names ({error})") from error
    if not isinstance(names, (list, tuple)):
        raise ValueError(f"holds a {type(names).__name__} where a list of names is expected")
    for position, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(f"holds a {type(name).__name__} at position {position} where a name is expected")
    return list(names)


def published_split(
    root: Path, images: Collection[str], unknown: str, problems: Problems, key: Callable[[str], str] = str
) -> tuple[dict[str, str], str] | None:
    """{image or class folder: "train" or "test"} of the lists in the root, and the rule in words; None without lists.

    `key` makes listed names those of `images`; one that is not among them is a problem, put in words by `unknown`.
    """
    pickles = [root / split / "filenames.pickle" for split in SPLITS]
    classes = [root / "trainvalclasses.txt", root / "testclasses.txt"]
    lists = next((files for files in (pickles, classes) if any(file.is_file() for file in files)), None)
    if lists is None:
        return None
    splits: dict[str, str] = {}
    for split, path in zip(SPLITS, lists, strict=True):
        names: list[str] = []
        try:
            names = [key(name) for name in (load_names(path) if lists is pickles else read_text(path).split())]
        except FileNotFoundError:
            problems.add(path, "the file is missing, though the other split has one")
        except ValueError as error:
            problems.add(path, str(error))
        problems.add_repeated(path, names)
        for name in names:
            if splits.setdefault(name, split) != split:
                problems.add(path, f"{name} is in both splits, train and test")
            if lists is pickles and images and name not in images:
                problems.add(path, f"{name} {unknown}")
    if lists is pickles:
        return splits, "published class-disjoint text-to-image split (train/, test/filenames.pickle)"
    return splits, "published class-disjoint split (trainvalclasses.txt, testclasses.txt)"


def finish(records: list[Record], problems: Problems, about: dict) -> Records:
    """The reader's result with the counts that every manifest states; or DataError if there are any problems.

    Before it stops it decodes the images too, so that mending one thing does not bring up the next. Where nothing is
    wrong `prepare` does the same, as it resizes.
    """

    def trouble(record: Record) -> str:
        try:
            open_image(record)
        except ValueError as error:
            return f"{record.where}: {error}"
        return ""

    if problems:
        there = [record for record in records if record.path and record.path.is_file()]
        problems.found += filter(None, in_order(trouble, there))
    elif not records:
        problems.add(problems.subject, "there is no image in it")
    problems.raise_if_any()
    labels = {split: {record.label for record in records if record.split == split} for split in SPLITS}
    counts = {split: len(found) for split, found in labels.items()}
    return Records(records, {**about, "labels": counts, "labels_in_both_splits": len(labels["train"] & labels["test"])})
