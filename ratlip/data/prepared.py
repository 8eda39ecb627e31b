"""The prepared format: one folder with all images resized once, their captions, and a manifest.

<folder>/dataset/        a `datasets.DatasetDict` on disk (Arrow), with the columns of `SCHEMA`
<folder>/manifest.json   settings, rule of the split, counts, checksums; it comes last: where it is, all is there
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from ratlip import __version__
from ratlip.cache import check_identity, digest, file_digest
from ratlip.data.records import SPLITS, VALIDATION, Problems, Record, in_order, open_image
from ratlip.errors import DataError
from ratlip.files import atomic_path, read_json, write_json
from ratlip.progress import bar

FORMAT = 1
BATCH_BYTES = 32 << 20  # pixels held in memory before they go to disk, about
LISTED = ("name", "hash", "resize", "settings", "counts", "records_sha256", "content_sha256")  # in every manifest
LIBRARIES = ("pillow", "numpy", "pyarrow", "datasets")  # those that decide the pixels and the files
AGAIN = "delete the folder and prepare it again"
TEXT, BYTES = pa.string(), pa.binary()
EVERY = (*SPLITS, VALIDATION)
SCHEMA = pa.schema(  # pixels: raw RGB; attributes: JSON, or ""; mask: packed bits, or empty; named: a bit an attribute
    {"key": TEXT, "label": pa.int64(), "height": pa.int32(), "width": pa.int32(), "pixels": BYTES}
    | {"captions": pa.list_(TEXT), "attributes": TEXT, "mask": BYTES}
    | {"named": pa.list_(pa.int32())}
)


def settings_hash(settings: dict, resize: int) -> str:
    """12 hex digits of everything that decides what `prepare` writes from the same source."""
    return digest({"format": FORMAT, "resize": resize, "settings": settings}, 12)


def prepare(
    records: Iterable[Record],
    out: str | Path,
    *,
    resize: int,
    settings: dict,
    source: str | Path,
    workers: int | None = None,
    progress: bool = True,
) -> Prepared:
    """Decode, crop (birds), resize and store all images and captions in folder `out`, whole or not at all.

    The shorter side of each image becomes `resize` pixels by Pillow's antialiased bilinear filter, as torchvision's
    Resize does in the published code (official.md: "images are resized to 304"). `records` may be a generator; memory
    does not grow with their number. `settings` (JSON values; its "dataset" names the set) are kept in the manifest with
    `records.about`. `source` is the name of the dataset root (a path is cut to its last part).

    An `out` prepared before with equal settings is opened, not written. Raises DataError that lists everything wrong
    with the records, or says that `out` holds something else.
    """
    out, source = Path(out), Path(source).absolute().name
    ready = existing(out, resize=resize, settings=settings)
    if ready is not None:
        _check_same_source(ready, records)
        return ready
    _check_replaceable(out)
    name = str(settings.get("dataset") or source)
    total = len(records) if isinstance(records, Sized) else None
    rows = in_order(partial(_encode, resize=resize), records, workers)
    rows = bar(rows, total=total, desc=f"prepare {name}", unit="image", enabled=progress)
    try:
        with atomic_path(out) as draft:
            checksums = _write_dataset(rows, draft, Problems(f"{name} ({source})"), BATCH_BYTES // (3 * resize**2))
            versions = {"ratlip": __version__, **{library: version(library) for library in LIBRARIES}}
            manifest = {"format": FORMAT, "name": name, "source": source, "resize": resize, **_counts(draft)}
            manifest |= {**checksums, "settings": settings, "hash": settings_hash(settings, resize)}
            manifest |= {"files": _digests(draft)}
            manifest |= {"about": getattr(records, "about", {}), "versions": versions}
            write_json(draft / "manifest.json", manifest)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error}); free disk space or choose another") from error
    return load_prepared(out)


def existing(out: str | Path, *, resize: int, settings: dict) -> Prepared | None:
    """The complete prepared folder at `out`, or None; it lets a caller skip reading the source.

    Raises DataError if `out` is complete but was prepared with other settings.
    """
    out = Path(out)
    if not (out / "manifest.json").is_file():
        return None
    prepared, wanted = load_prepared(out), {"resize": resize, "settings": settings}
    check_identity(out, {key: prepared.manifest[key] for key in wanted}, wanted, what="prepared data", error=DataError)
    return prepared


def _check_same_source(ready: Prepared, records: Iterable[Record]) -> None:
    """With equal settings, a list of records must be the one prepared (a generator is left unread)."""
    if not isinstance(records, Sized):
        return
    checksum = hashlib.sha256()
    for record in records:
        checksum.update(_checked(record))
    if checksum.hexdigest() != ready.manifest["records_sha256"]:
        images = f"it had {len(ready.train) + len(ready.test)} images, there are {len(records)} now"
        changed = f"the source has changed since ({images}, or their captions, classes or split differ)"
        raise DataError(f"{ready.folder}: {changed}; delete the folder to prepare it anew, or choose another")


def _check_replaceable(out: Path) -> None:
    """Only what an earlier `prepare` can have left may be replaced, never a folder of the user's."""
    if out.is_file():
        raise DataError(f"{out}: is a file; choose a folder")
    foreign = {item.name for item in out.glob("*")} - {"dataset", "manifest.json"}
    foreign |= {item.name for item in out.glob("dataset/*")} - {*EVERY, "dataset_dict.json"}
    if foreign:
        raise DataError(f"{out}: holds other files ({', '.join(sorted(foreign)[:3])}); choose an empty folder")


def _checked(record: Record, content: str = "") -> bytes:
    """What a checksum covers of a record: all but the pixels, whose own checksum is `content`."""
    fields = [record.key, record.split, record.label, record.captions, record.box, record.attributes, content]
    fields += [] if record.named is None else [record.named]
    return json.dumps(fields, default=str).encode()


def _encode(record: Record, resize: int) -> tuple[Record, dict[str, Any] | str]:
    """The record's row of the dataset (and its "content" checksum), or a text that says what is wrong."""
    try:
        image, mask = open_image(record)
    except ValueError as error:
        return record, str(error)
    short, long = sorted(image.size)
    width, height = (resize if side == short else int(resize * long / short) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        mask = mask and mask.resize((width, height), Image.Resampling.NEAREST)
    pixels, packed = image.tobytes(), b"" if mask is None else np.packbits(np.asarray(mask) > 127).tobytes()
    content = hashlib.sha256(f"{width}x{height}".encode() + packed + pixels).hexdigest()
    attributes = "" if record.attributes is None else json.dumps(record.attributes)
    row = {"key": record.key, "label": record.label, "captions": record.captions, "attributes": attributes}
    names = sorted(record.attributes or ())
    if record.named and (len(record.named) != len(record.captions) or not set().union(*record.named) <= set(names)):
        return record, f"named={record.named!r} should list attributes ({', '.join(names)}) for each caption"
    row["named"] = [sum(1 << names.index(name) for name in each) for each in record.named or ()]
    return record, {**row, "height": height, "width": width, "pixels": pixels, "mask": packed, "content": content}


def _write_dataset(encoded: Iterable[tuple], draft: Path, problems: Problems, held: int) -> dict[str, str]:
    """Write `draft`/dataset from what `_encode` gives, some `held` rows of a split in memory; return the checksums.

    Raises DataError that lists all that is wrong with the records.
    """
    draft.mkdir()
    rows: dict[str, list[dict]] = {split: [] for split in EVERY}
    split_of: dict[str, str] = {}
    given, stored = hashlib.sha256(), hashlib.sha256()
    with ExitStack() as stack:
        files = {s: stack.enter_context(pa.ipc.new_stream(str(draft / f"{s}.arrow"), SCHEMA)) for s in EVERY}

        def flush(split: str) -> None:
            files[split].write_batch(pa.RecordBatch.from_pylist(rows[split], schema=SCHEMA))
            rows[split].clear()

        for record, row in encoded:
            for message in _wrong_with(record, row, split_of):
                problems.add(record.where, message)
            split_of[record.key] = record.split
            if not problems:  # otherwise nothing will be kept: only look on for what else is wrong
                given.update(_checked(record))
                stored.update(_checked(record, row.pop("content")))
                rows[record.split].append(row)
                if len(rows[record.split]) >= held:
                    flush(record.split)
        for split in EVERY:
            flush(split)
    empty = [f"{split}: the split has no image" for split in SPLITS if split not in split_of.values()]
    problems.found = problems.found or empty
    problems.raise_if_any()
    if VALIDATION not in split_of.values():
        (draft / f"{VALIDATION}.arrow").unlink()
    _save(draft)
    return {"records_sha256": given.hexdigest(), "content_sha256": stored.hexdigest()}


def _wrong_with(record: Record, row: dict | str, known: Container[str]) -> list[str]:
    """Everything that is wrong with a record and with the `row` that `_encode` made of it."""
    wrong = [row] if isinstance(row, str) else []
    if record.key in known:
        wrong.append(f"the key {record.key!r} occurs twice")
    if record.split not in EVERY:
        wrong.append(f"the split is {record.split!r}, not one of {', '.join(EVERY)}")
    if not record.captions or not all(map(str.strip, record.captions)):
        wrong.append("a caption is empty, or there is none")
    return wrong


def _save(draft: Path) -> None:
    """Turn the streamed files into a saved DatasetDict, memory-mapped from one to the other."""
    import datasets  # here, because it takes 0.6 s and only writing needs it

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # `prepare` has its own
    try:
        files = {split: draft / f"{split}.arrow" for split in EVERY}
        parts = {split: datasets.Dataset.from_file(str(file)) for split, file in files.items() if file.is_file()}
        datasets.DatasetDict(parts).save_to_disk(str(draft / "dataset"))
    finally:
        if shown:
            datasets.enable_progress_bars()
    for path in draft.glob("*.arrow"):
        path.unlink()


def _counts(folder: Path) -> dict[str, dict]:
    """What the manifest counts of each split; image sizes are height, width."""
    splits = [Split(folder, name) for name in EVERY if (folder / "dataset" / name).is_dir()]
    sizes = {s.name: {"smallest": s.sizes.min(0).tolist(), "largest": s.sizes.max(0).tolist()} for s in splits}
    captions = {s.name: len(s.all_captions) for s in splits}
    return {"counts": {s.name: len(s) for s in splits}, "captions": captions, "image_sizes": sizes}


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files below `dataset`, by their paths from `folder`."""
    paths = sorted(path for path in (folder / "dataset").rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in paths}


def check_files(prepared: Prepared) -> None:
    """DataError that names the files whose SHA-256 is not the manifest's (of before, a manifest has none).

    Reads all data once, hence it is for the start of a training, not for each opening.
    """
    noted: dict[str, str] = prepared.manifest.get("files") or {}
    found = _digests(prepared.folder) if noted else {}
    if noted != found:
        names = sorted(name for name in {*noted, *found} if noted.get(name) != found.get(name))
        raise DataError(f"{prepared.folder}: changed since it was prepared: {', '.join(names)}; {AGAIN}")


def load_prepared(folder: str | Path) -> Prepared:
    """Open a prepared folder (memory-mapped: nothing is read until it is asked for).

    Raises DataError if it is missing, incomplete, damaged, or of another version of the format.
    """
    folder = Path(folder)
    path, wrong = folder / "manifest.json", ""
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; make it with `ratlip prepare`")
    if not path.is_file():
        raise DataError(f"{folder}: has no manifest.json, so it is not prepared, or not completely; {AGAIN}")
    try:
        manifest = read_json(path)
        if manifest["format"] != FORMAT:
            wrong = f"was written in format {manifest['format']}, this ratlip reads format {FORMAT}"
        elif missing := [key for key in LISTED if key not in manifest]:
            wrong = f"is damaged (no {', '.join(missing)})"
    except (ValueError, KeyError, TypeError) as error:
        wrong = f"is damaged ({error!r})"
    if wrong:
        raise DataError(f"{path}: {wrong}; {AGAIN}")
    try:
        more = {VALIDATION: Split(folder, VALIDATION)} if VALIDATION in manifest["counts"] else {}
        prepared = Prepared(folder, manifest, Split(folder, "train"), Split(folder, "test"), **more)
    except Exception as error:  # whatever Arrow makes of a missing or damaged file
        raise DataError(f"{folder / 'dataset'}: is damaged or incomplete ({error}); {AGAIN}") from error
    for name, number in manifest["counts"].items():
        if len(prepared[name]) != number:
            wrong = f"has {len(prepared[name])} images, the manifest says {number}"
            raise DataError(f"{folder / 'dataset' / name}: {wrong}; {AGAIN}")
    return prepared


def _view(column: pa.ChunkedArray, i: int) -> np.ndarray:
    """Value i of a binary column as a uint8 view of the column's own memory (`column[i].as_buffer()` would copy it)."""
    value = column.slice(range(len(column))[i], 1).chunk(0)
    _, offsets, content = value.buffers()
    start, stop = np.frombuffer(offsets, dtype=np.int32)[value.offset : value.offset + 2]
    return np.frombuffer(content or b"", dtype=np.uint8)[start:stop]


class Split:
    """The images of one split, in a fixed order, as views of the memory-mapped files.

    keys: list[str]. labels: np.int64 (n,). sizes: np.int32 (n,2), height and width. captions: list of list of str.
    all_captions: the same, flattened; those of image i are all_captions[caption_offsets[i]:caption_offsets[i + 1]],
    caption_offsets: int64 (n+1,). attributes: list[dict] or None. named: bool (captions, attributes), which of them
    (in alphabetic order) each caption names, or None where captions name all, or nobody knows.
    """

    def __init__(self, folder: Path, name: str):
        files = sorted((folder / "dataset" / name).glob("*.arrow"))
        table = pa.concat_tables(pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in files)
        self.folder, self.name = folder, name
        self.keys: list[str] = table["key"].to_pylist()
        self.labels: np.ndarray = table["label"].to_numpy()
        self.sizes = np.stack([table["height"], table["width"]], axis=1)
        self.captions: list[list[str]] = table["captions"].to_pylist()
        self.caption_offsets = np.cumsum([0, *map(len, self.captions)], dtype=np.int64)
        attributes = table["attributes"].to_pylist()
        self.attributes = [json.loads(text or "{}") for text in attributes] if any(attributes) else None
        self.named = self._named(table["named"].to_pylist()) if "named" in table.column_names else None
        self._pixels, self._masks = table["pixels"], table["mask"]

    def _named(self, bits: list[list[int] | None]) -> np.ndarray | None:
        flat = np.array(list(chain.from_iterable(each or () for each in bits)), dtype=np.int32)
        return (flat[:, None] >> np.arange(len(self.attributes[0]))) & 1 > 0 if len(flat) and self.attributes else None

    def __len__(self) -> int:
        return len(self.keys)

    def __reduce__(self):
        return Split, (self.folder, self.name)  # a worker process maps the files too, and gets no copy

    @cached_property
    def all_captions(self) -> list[str]:
        return list(chain.from_iterable(self.captions))

    def image(self, i: int) -> np.ndarray:
        """Image i: uint8 (H,W,3) RGB, a read-only view, not a copy."""
        return _view(self._pixels, i).reshape(*self.sizes[i], 3)

    def mask(self, i: int) -> np.ndarray | None:
        """Where the object of image i is: bool (H,W), or None if that is not known."""
        packed, size = _view(self._masks, i), self.sizes[i]
        return np.unpackbits(packed, count=size.prod()).astype(bool).reshape(size) if packed.size else None


@dataclass(frozen=True, repr=False)
class Prepared:
    """A complete prepared folder: `.train` and `.test` (or `["train"]`), `.manifest`, `.folder`.

    `.validation` is None where the set has no such split.
    """

    folder: Path
    manifest: dict
    train: Split
    test: Split
    validation: Split | None = None

    def __getitem__(self, split: str) -> Split:
        return {each.name: each for each in (self.train, self.test, self.validation) if each is not None}[split]

    def __repr__(self) -> str:
        counts = ", ".join(f"{number} {split}" for split, number in self.manifest["counts"].items())
        return f"Prepared({self.manifest['name']}, resize {self.manifest['resize']}, {counts}, {self.folder})"
