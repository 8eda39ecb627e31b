"""Reading the files of the official layouts: tables, captions and split lists, with every mistake noted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ratlip.data.records import SPLITS, Problems, Record, Records, check_images
from ratlip.data.safe_pickle import load_names
from ratlip.errors import DataError


def find_root(root: str | Path, dataset: str, parts: Sequence[str], picture: str) -> Path:
    """The folder that holds `parts[0]`: `root`, or the one folder in it that does, or the parent of a part.

    `parts` are the folders that the layout has at its top, `picture` shows the layout. Raises DataError with
    it.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder; the root of {dataset} looks like this:\n{picture}")
    if (root / parts[0]).is_dir():
        return root
    inside = sorted(folder for folder in root.iterdir() if (folder / parts[0]).is_dir())
    if len(inside) == 1:
        return inside[0]
    if inside:
        names = ", ".join(folder.name for folder in inside)
        raise DataError(f"{root}: holds several roots of {dataset} ({names}); name one of them")
    parent = root.absolute().parent
    if root.absolute().name in parts and (parent / parts[0]).is_dir():
        return parent
    raise DataError(
        f"{root}: is no root of {dataset} (there is no folder {parts[0]} in it); a root looks like this:\n{picture}"
    )


def read_text(path: Path) -> str:
    """The text of a file; bytes that are no UTF-8 become U+FFFD."""
    return path.read_bytes().decode("utf-8-sig", "replace")


def read_table(path: Path, types: Sequence[Callable], expected: str, problems: Problems) -> dict | None:
    """Rows of white-space separated fields as {first field: second} or {first: (second, third, ...)}.

    `types` convert the fields; the last field takes the rest of the line. A missing file (then the answer is
    None), a row that does not parse and a first field that occurs twice are added to `problems`, rows with
    the number of their line.
    """
    if not path.is_file():
        problems.add(path, "the file is missing")
        return None
    table = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        fields = line.split(maxsplit=len(types) - 1)
        try:
            key, *values = [convert(field.strip()) for convert, field in zip(types, fields, strict=True)]
        except ValueError:
            problems.add(f"{path}:{number}", f"expected {expected!r}, found {line.strip()!r}")
            continue
        if key in table:
            problems.add(f"{path}:{number}", f"{key!r} occurs twice")
        table[key] = values[0] if len(values) == 1 else tuple(values)
    return table


def read_captions(path: Path, problems: Problems) -> tuple[str, ...]:
    """The captions of one image, one a line, as they are but for white workspace.

    Runs of U+FFFD, which stand for blanks in some files of Reed et al., become one blank, as in the published
    code.
    """
    try:
        lines = read_text(path).replace("\ufffd", " ").split("\n")
    except FileNotFoundError:
        problems.add(path, "the caption file is missing")
        return ()
    captions = tuple(" ".join(line.split()) for line in lines if line.strip())
    if not captions:
        problems.add(path, "the caption file is empty")
    return captions


def _merge(lists: dict[Path, tuple[str, Sequence[str]]], problems: Problems) -> dict[str, str]:
    """{name: split} of several lists; a name that occurs twice is a problem."""
    splits: dict[str, str] = {}
    for path, (split, names) in lists.items():
        for name in names:
            if name in splits:
                problems.add(
                    path,
                    f"{name} occurs twice" if splits[name] == split else f"{name} is in both splits, train and test",
                )
            splits.setdefault(name, split)
    return splits


def pickled_split(root: Path, problems: Problems) -> dict[str, str] | None:
    """{image name: "train" or "test"} of the two `filenames.pickle`; None if there is neither."""
    paths = {split: root / split / "filenames.pickle" for split in ("train", "test")}
    if not any(path.is_file() for path in paths.values()):
        return None
    lists = {}
    for split, path in paths.items():
        try:
            lists[path] = split, load_names(path)
        except FileNotFoundError:
            problems.add(path, "the file is missing, though the other split has one")
        except ValueError as error:
            problems.add(path, str(error))
    return _merge(lists, problems)


def class_split(root: Path, problems: Problems) -> dict[str, str] | None:
    """{class folder: "train" or "test"} of trainvalclasses.txt, testclasses.txt; None if there is neither."""
    paths = {"train": root / "trainvalclasses.txt", "test": root / "testclasses.txt"}
    if not any(path.is_file() for path in paths.values()):
        return None
    lists = {}
    for split, path in paths.items():
        if path.is_file():
            lists[path] = split, read_text(path).split()
        else:
            problems.add(path, "the file is missing, though the other split has one")
    return _merge(lists, problems)


def finish(records: list[Record], problems: Problems, about: dict) -> Records:
    """The reader's result with the counts that every manifest states; or DataError if there are any problems.

    Before it stops it decodes the images too, so that the message is complete: mending one thing does not
    bring up the next.
    """
    if problems.found:
        check_images([record for record in records if record.path.is_file()], problems)
    elif not records:
        problems.add(problems.subject, "there is no image in it")
    problems.raise_if_any()
    labels = {split: {record.label for record in records if record.split == split} for split in SPLITS}
    return Records(
        records,
        {
            **about,
            "labels": {split: len(found) for split, found in labels.items()},
            "labels_in_both_splits": len(labels["train"] & labels["test"]),
        },
    )
