"""A folder of your own: pictures with `metadata.jsonl` (Hugging Face's imagefolder), or with a `.txt` beside each.

Split: `train/` and `test/` (and `validation/`, if any) where they are; else by name: a picture is test if 10 divides
the first 8 hex digits of the sha256 of its file name, so that one added later moves no other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ratlip.cache import file_digest
from ratlip.data.layout import finish, read_captions, read_text, root_problems
from ratlip.data.records import SPLITS, VALIDATION, Problems, Record, Records
from ratlip.errors import DataError

LAYOUT = """\
  folder/metadata.jsonl        {"file_name": "a.jpg", "text": "one caption"}, or a list of captions; a line a picture
  folder/a.jpg ...
or
  folder/a.jpg, folder/a.txt   captions, one a line
either also in folder/train/ and folder/test/"""
READ = frozenset(".jpg .jpeg .png .webp .bmp .gif .tif .tiff".split())
UNREAD = frozenset(".heic .heif .avif .svg .psd .dng .cr2 .nef".split())  # pictures that Pillow does not open
METADATA = "metadata.jsonl"
ABOUT_FOLDER = frozenset("readme license licence".split())  # texts that no picture needs to stand beside
TEST_SHARE = 10

Captions = dict[Path, tuple[str, ...]]  # of each picture


def read(root: str | Path) -> Records:
    """All pictures below `root`, sorted by path, as records with their captions; labels are unknown (-1).

    Names that begin with a dot are left out. Raises DataError that lists every problem with its path.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder; a folder of your own looks like this:\n{LAYOUT}")
    problems, files = root_problems(root, "your pictures"), _files(root)
    images = [path for path in files if path.suffix.lower() in READ]
    for path in files:
        if path.suffix.lower() in UNREAD:
            problems.add(path, "pictures of this kind are not read; save it as .png or .jpg")
        elif path.name in ("metadata.csv", "metadata.parquet"):
            problems.add(path, f"is not read; write it as {METADATA}, one JSON object a line")
    tables = [path for path in files if path.name == METADATA]
    captions = _of_tables(tables, images, problems)
    beside = [image for image in images if not _table_of(image, tables)]
    captions |= _of_texts(beside, files, tables, problems)
    splits, rule = _splits(root, images, problems)
    _same_picture_twice(images, splits, problems)
    records = [
        Record(path.relative_to(root).as_posix(), splits[path], captions[path], path=path, upright=True)
        for path in images
        if path in captions and path in splits
    ]
    if images and not problems and (empty := set(SPLITS) - {record.split for record in records}):
        mend = "make the folders train/ and test/, or add pictures"
        problems.add(root, f"the split leaves no picture for {', '.join(sorted(empty))}; {mend}")
    layouts = [name for name, there in ((METADATA, tables), (".txt", beside)) if there]
    others = Counter(path.suffix.lower() for path in files if path.suffix.lower() not in {*READ, ".txt", ".jsonl"})
    return finish(records, problems, {"split": rule, "layout": layouts, "other_files": dict(others)})


def split_of_name(name: str) -> str:
    """ "train" or "test", by the hash of a file's name."""
    return "test" if int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % TEST_SHARE == 0 else "train"


def _files(root: Path) -> list[Path]:
    """All files below `root`, sorted; links to folders are not followed (what they lead to is inside anyway)."""
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if not name.startswith((".", "__MACOSX"))]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted(found)


def _of_tables(tables: list[Path], images: list[Path], problems: Problems) -> Captions:
    """Captions of the pictures that the metadata files name; `problems` gets those they do not, and bad lines."""
    captions, there = Captions(), set(images)
    for table in tables:
        for number, line in enumerate(read_text(table).split("\n"), start=1):
            if not line.strip():
                continue
            where = f"{table}:{number}"
            try:
                name, said = _row(line)
            except ValueError as error:
                problems.add(where, str(error))
                continue
            path = Path(os.path.normpath(table.parent / name))
            if table.parent not in path.parents:
                problems.add(where, f"file_name {name!r} leads out of {table.parent}")
            elif path in captions:
                problems.add(where, f"{name} is named twice")
            elif path not in there:
                problems.add(path, f"the picture is missing ({where} names it)")
            if not said:
                problems.add(where, f"the caption of {name} is empty")
            captions[path] = said
    for path in images:
        if path not in captions and (above := _table_of(path, tables)):
            problems.add(path, f"is not named in {above}; add a line, or remove it")
    return captions


def _table_of(path: Path, tables: list[Path]) -> Path | None:
    """The metadata file nearest to `path`, in its folder or one above; None where there is none."""
    return next((table for folder in path.parents if (table := folder / METADATA) in tables), None)


def _row(line: str) -> tuple[str, tuple[str, ...]]:
    """File name and captions of a line of a metadata file; ValueError says what is wrong with it."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is no JSON ({error})") from None
    name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
    texts: list[Any] = text if isinstance(text, list) else [text]
    if not isinstance(name, str) or not name or not all(isinstance(each, str) for each in texts):
        has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"expected file_name (a name) and text (a caption, or a list of them), found {has}")
    said = [" ".join(each.split()) for each in texts]
    return name, tuple(said) if all(said) else ()


def _of_texts(images: list[Path], files: list[Path], tables: list[Path], problems: Problems) -> Captions:
    """Captions of pictures with a .txt of the same name; `problems` gets pictures and texts that stand alone."""
    captions, taken = {}, dict[Path, Path]()
    for path in images:
        text = path.with_suffix(".txt")
        if first := taken.get(text):
            problems.add(text, f"stands beside two pictures, {first.name} and {path.name}; rename one")
            continue
        taken[text] = path
        captions[path] = read_captions(text, problems)
    for path in files:
        alone = path.suffix.lower() == ".txt" and path not in taken and path.stem.lower() not in ABOUT_FOLDER
        if alone and not _table_of(path, tables):
            problems.add(path, "the picture of this name is missing beside it")
    return captions


def _splits(root: Path, images: list[Path], problems: Problems) -> tuple[dict[Path, str], str]:
    """The split of each picture, and the rule in words."""
    if not any((root / split).is_dir() for split in SPLITS):
        rule = f"by file name: test if {TEST_SHARE} divides the first 8 hex digits of its sha256"
        return {path: split_of_name(path.name) for path in images}, rule
    for split in SPLITS:
        if not (root / split).is_dir():
            other = "test" if split == "train" else "train"
            mend = f"make it, or take the pictures out of {other}/, so that they are split by their names"
            problems.add(root / split, f"the folder is missing, though {other}/ is there; {mend}")
    first = {path: path.relative_to(root).parts[0] for path in images}
    for path, name in first.items():
        if name not in (*SPLITS, VALIDATION):
            problems.add(path, "lies in no split; put it into train/ or test/")
    return {path: name for path, name in first.items() if name in (*SPLITS, VALIDATION)}, "folders train/ and test/"


def _same_picture_twice(images: Iterable[Path], splits: dict[Path, str], problems: Problems) -> None:
    """Note files of the same content in different splits: what is tested must not have been trained on."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in images:
        if path in splits and path.is_file():
            by_size[path.stat().st_size].append(path)
    first: dict[str, Path] = {}
    for path in (path for paths in by_size.values() if len(paths) > 1 for path in paths):
        other = first.setdefault(file_digest(path), path)
        if splits[other] != splits[path]:
            problems.add(path, f"is the same picture as {other}, which is in {splits[other]}; remove one")
