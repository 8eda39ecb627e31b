"""The prepared format: one folder with all images resized once, their captions, and a manifest.

<folder>/dataset/        a `datasets.DatasetDict` on disk (Arrow); columns key, label, height, width,
                         pixels (raw RGB bytes), captions (list of string), attributes (JSON or ""),
                         mask (packed bits or empty)
<folder>/manifest.json   settings, rule of the split, counts, checksums; it comes last: where it is, all
is there
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from ratlip.data.records import SPLITS, Problems, Record, in_order, open_image
from ratlip.errors import DataError
from ratlip.files import atomic_path, read_json, write_json
from ratlip.progress import bar

FORMAT = 1
BATCH_BYTES = 32 << 20  # pixels held in memory before they go to disk
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("pixels", pa.binary()),
        ("captions", pa.list_(pa.string())),
        ("attributes", pa.string()),
        ("mask", pa.binary()),
    ]
)


def settings_hash(settings: dict, resize: int) -> str:
    """12 hex digits of everything that decides what `prepare` writes from the same source."""
    text = json.dumps({"format": FORMAT, "resize": resize, "settings": settings}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# -------------------------------------------------------------------------------------------------- writing


def prepare(
    records: Iterable[Record],
    out: str | Path,
    *,
    resize: int,
    workers: int | None = None,
    settings: dict,
    source: str | Path,
    progress: bool = True,
) -> Prepared:
    """Decode, crop (birds), resize and store all images and captions in folder `out`, whole or not at all.

    The shorter side of each image becomes `resize` pixels by Pillow's antialiased bilinear filter, as
    torchvision's Resize does in the published code (official.md: "images are resized to 304"). Every image is
    decoded in full, once: the pass that resizes is the pass that validates, into a temporary folder beside
    `out`. `records` may be a generator; memory does not grow with their number. `settings` (JSON values; its
    "dataset" names the set) are kept in the manifest with `records.about`. `source` is the name of the
    dataset root (a path is cut to its last part).

    An `out` prepared before with equal settings is opened, not written. Raises DataError that lists
    everything wrong with the records, or says that `out` holds something else.
    """
    out = Path(out)
    ready = existing(out, resize=resize, settings=settings)
    if ready is not None:
        _check_same_source(ready, records)
        return ready
    _check_replaceable(out)
    source = Path(source).absolute().name
    name = str(settings.get("dataset") or source)
    try:
        with atomic_path(out) as draft:
            facts = _write_dataset(
                records,
                draft,
                resize,
                workers,
                Problems(f"{name} ({source})"),
                partial(bar, desc=f"prepare {name}", unit="image", enabled=progress),
            )
            manifest = {
                "format": FORMAT,
                "name": name,
                "source": source,
                "resize": resize,
                **facts,
                "settings": settings,
                "hash": settings_hash(settings, resize),
                "about": getattr(records, "about", {}),
                "versions": _versions(),
            }
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
    manifest = _read_manifest(out)
    if manifest["hash"] != settings_hash(settings, resize):
        wanted = {"resize": resize, **json.loads(json.dumps(settings, default=str))}
        found = {"resize": manifest["resize"], **manifest["settings"]}
        differing = [
            f"{key} is {found.get(key)!r} there and {wanted.get(key)!r} now"
            for key in dict.fromkeys([*wanted, *found])
            if found.get(key) != wanted.get(key)
        ]
        raise DataError(
            f"{out}: was prepared with other settings ({'; '.join(differing)}); "
            "choose another folder, or delete this one to prepare it anew"
        )
    return load_prepared(out)


def _check_same_source(ready: Prepared, records: Iterable[Record]) -> None:
    """With equal settings, a list of records must be the one prepared (a generator is left unread)."""
    if not isinstance(records, (list, tuple)):
        return
    digest = hashlib.sha256()
    for record in records:
        digest.update(_identity(record))
    if digest.hexdigest() != ready.manifest["records_sha256"]:
        count = sum(ready.manifest["counts"].values())
        raise DataError(
            f"{ready.folder}: the source has changed since this folder was prepared (it had "
            f"{count} images, there are {len(records)} now, or their captions, classes or split "
            "differ); delete the folder to prepare it anew, or choose another"
        )


def _check_replaceable(out: Path) -> None:
    """Only what an earlier `prepare` can have left may be replaced, never a folder of the user's."""
    if out.is_dir():
        foreign = sorted(set(item.name for item in out.iterdir()) - {"dataset", "manifest.json"})
        inside = out / "dataset"
        if inside.is_dir():
            foreign += sorted(set(item.name for item in inside.iterdir()) - {*SPLITS, "dataset_dict.json"})
        if foreign:
            raise DataError(f"{out}: holds other files ({', '.join(foreign[:3])}); choose an empty folder")
    elif out.exists():
        raise DataError(f"{out}: is a file; choose a folder")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    import ratlip

    libraries = {name: version(name) for name in ("pillow", "numpy", "pyarrow", "datasets")}
    return {"ratlip": ratlip.__version__, **libraries}


def _identity(record: Record, content: str = "") -> bytes:
    """What a checksum covers of a record: all but the pixels, whose own checksum is `content`."""
    fields = [record.key, record.split, record.label, record.captions, record.box, record.attributes, content]
    return json.dumps(fields, default=str).encode()


def _encode(record: Record, resize: int) -> tuple[Record, dict | str]:
    """The record's row of the dataset (and its "content" checksum), or a text that says what is wrong."""
    try:
        image, mask = open_image(record)
    except ValueError as error:
        return record, str(error)
    short, long = sorted(image.size)
    size = tuple(resize if side == short else int(resize * long / short) for side in image.size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
        mask = mask and mask.resize(size, Image.Resampling.NEAREST)
    pixels = image.tobytes()
    packed = b"" if mask is None else np.packbits(np.asarray(mask) > 127).tobytes()
    row = {
        "key": record.key,
        "label": record.label,
        "height": image.height,
        "width": image.width,
        "pixels": pixels,
        "captions": list(record.captions),
        "mask": packed,
        "attributes": "" if record.attributes is None else json.dumps(record.attributes),
    }
    content = hashlib.sha256(f"{image.width}x{image.height}".encode() + packed)
    content.update(pixels)
    return record, {**row, "content": content.hexdigest()}


class _SplitWriter:
    """Streams rows into one Arrow file and keeps count."""

    def __init__(self, path: Path):
        self.path, self.rows, self.bytes = path, [], 0
        self.images = self.captions = 0
        self.smallest, self.largest = [2**31, 2**31], [0, 0]
        self.stream = pa.ipc.new_stream(str(path), SCHEMA)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.bytes += len(row["pixels"])
        self.images += 1
        self.captions += len(row["captions"])
        size = [row["height"], row["width"]]
        self.smallest, self.largest = list(map(min, self.smallest, size)), list(map(max, self.largest, size))
        if self.bytes >= BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            self.stream.write_batch(pa.RecordBatch.from_pylist(self.rows, schema=SCHEMA))
        self.rows, self.bytes = [], 0

    def close(self) -> None:
        self.flush()
        self.stream.close()


def _write_dataset(
    records: Iterable[Record], draft: Path, resize: int, workers: int | None, problems: Problems, bar
) -> dict[str, Any]:
    """Write `draft`/dataset and return the manifest's facts about it; raise DataError if a record is bad."""
    draft.mkdir()
    writers = {split: _SplitWriter(draft / f"{split}.arrow") for split in SPLITS}
    keys, given, stored = set(), hashlib.sha256(), hashlib.sha256()
    total = len(records) if hasattr(records, "__len__") else None
    try:
        for record, row in bar(in_order(partial(_encode, resize=resize), records, workers), total=total):
            for wrong in _wrong_with(record, row, keys):
                problems.add(record.where, wrong)
            keys.add(record.key)
            if not problems:  # otherwise nothing will be kept: only look on for what else is wrong
                given.update(_identity(record))
                stored.update(_identity(record, row.pop("content")))
                writers[record.split].add(row)
    finally:
        for writer in writers.values():
            writer.close()
    for split, writer in writers.items():
        if not writer.images and not problems:
            problems.add(split, "the split has no image")
    problems.raise_if_any()
    _save(writers, draft / "dataset")
    return {
        "counts": {split: writer.images for split, writer in writers.items()},
        "captions": {split: writer.captions for split, writer in writers.items()},
        "image_sizes": {
            split: {"smallest": writer.smallest, "largest": writer.largest}  # height, width
            for split, writer in writers.items()
        },
        "records_sha256": given.hexdigest(),
        "content_sha256": stored.hexdigest(),
    }


def _wrong_with(record: Record, row: dict | str, keys: set[str]) -> list[str]:
    wrong = [row] if isinstance(row, str) else []
    if record.key in keys:
        wrong.append(f"the key {record.key!r} occurs twice")
    if record.split not in SPLITS:
        wrong.append(f"the split is {record.split!r}, not one of {', '.join(SPLITS)}")
    if not record.captions or any(not caption.strip() for caption in record.captions):
        wrong.append("a caption is empty, or there is none")
    return wrong


def _save(writers: dict[str, _SplitWriter], folder: Path) -> None:
    """Turn the streamed files into a saved DatasetDict, memory-mapped from one to the other."""
    import datasets

    with _quiet(datasets):
        parts = {split: datasets.Dataset.from_file(str(writer.path)) for split, writer in writers.items()}
        datasets.DatasetDict(parts).save_to_disk(str(folder))
    del parts
    for writer in writers.values():
        writer.path.unlink()


@contextmanager
def _quiet(datasets):
    """Without the progress bars of `datasets`: `prepare` has its own."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


# -------------------------------------------------------------------------------------------------- reading


def _read_manifest(folder: Path) -> dict:
    path = folder / "manifest.json"
    mend = "delete the folder and prepare it again"
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; make it with `ratlip prepare`")
    if not path.is_file():
        raise DataError(f"{folder}: has no manifest.json, so it is not prepared, or not completely; {mend}")
    try:
        manifest = read_json(path)
        written = manifest["format"]
        needed = ("name", "hash", "resize", "settings", "counts", "records_sha256", "content_sha256")
        missing = [key for key in needed if key not in manifest]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is damaged ({error!r}); {mend}") from error
    if written != FORMAT:
        raise DataError(f"{path}: was written in format {written}, this ratlip reads format {FORMAT}; {mend}")
    if missing:
        raise DataError(f"{path}: is damaged (no {', '.join(missing)}); {mend}")
    return manifest


def load_prepared(folder: str | Path) -> Prepared:
    """Open a prepared folder (memory-mapped: nothing is read until it is asked for).

    Raises DataError if it is missing, incomplete, damaged, or of another version of the format.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    import datasets

    try:
        parts = datasets.DatasetDict.load_from_disk(str(folder / "dataset"), keep_in_memory=False)
        tables = {split: parts[split].data.table for split in SPLITS}
    except Exception as error:  # whatever Arrow or datasets make of a missing or damaged file
        raise DataError(
            f"{folder / 'dataset'}: is damaged or incomplete ({error}); delete the folder and prepare it again"
        ) from error
    for split, table in tables.items():
        if table.num_rows != manifest["counts"][split]:
            raise DataError(
                f"{folder / 'dataset' / split}: has {table.num_rows} images, the manifest says "
                f"{manifest['counts'][split]}; delete the folder and prepare it again"
            )
    return Prepared(folder, manifest, {split: Split(folder, split, table) for split, table in tables.items()})


def _load_split(folder: Path, name: str) -> Split:
    return load_prepared(folder)[name]


class _Bytes:
    """The values of a binary Arrow column as uint8 views of the column's own memory.

    `column[i].as_buffer()` copies the value first.
    """

    def __init__(self, column: pa.ChunkedArray):
        self.chunks, places = [], []
        for chunk in column.chunks:
            _, offsets, values = chunk.buffers()
            ends = np.frombuffer(offsets, dtype=np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
            number = np.full(len(chunk), len(self.chunks))
            places.append(np.stack([number, ends[:-1], ends[1:]], axis=1))
            self.chunks.append(np.frombuffer(values or b"", dtype=np.uint8))
        self.places = np.concatenate(places)

    def __getitem__(self, i: int) -> np.ndarray:
        chunk, start, stop = self.places[i]
        return self.chunks[chunk][start:stop]


class Split:
    """The images of one split, in a fixed order, as views of the memory-mapped file.

    keys: list[str]. labels: np.int64 (n,). captions: list of list of str. all_captions: the same, flattened;
    the captions of image i are all_captions[caption_offsets[i]:caption_offsets[i + 1]], caption_offsets:
    int64 (n+1,). attributes: list[dict] or None.
    """

    def __init__(self, folder: Path, name: str, table: pa.Table):
        self.folder, self.name = folder, name
        self.keys: list[str] = table["key"].to_pylist()
        self.labels: np.ndarray = table["label"].to_numpy()
        self.captions: list[list[str]] = table["captions"].to_pylist()
        self.caption_offsets = np.cumsum([0, *map(len, self.captions)], dtype=np.int64)
        attributes = table["attributes"].to_pylist()
        self.attributes = [json.loads(text or "{}") for text in attributes] if any(attributes) else None
        self._heights, self._widths = table["height"].to_numpy(), table["width"].to_numpy()
        self._pixels, self._masks = _Bytes(table["pixels"]), _Bytes(table["mask"])

    def __len__(self) -> int:
        return len(self.keys)

    def __reduce__(self):
        return _load_split, (self.folder, self.name)  # a worker process maps the file too, and gets no copy

    @cached_property
    def all_captions(self) -> list[str]:
        return list(chain.from_iterable(self.captions))

    def image(self, i: int) -> np.ndarray:
        """Image i: uint8 (H,W,3) RGB, a read-only view, not a copy."""
        i = range(len(self))[i]
        return self._pixels[i].reshape(self._heights[i], self._widths[i], 3)

    def mask(self, i: int) -> np.ndarray | None:
        """Where the object of image i is: bool (H,W), or None if that is not known."""
        i = range(len(self))[i]
        packed = self._masks[i]
        if not packed.size:
            return None
        height, width = int(self._heights[i]), int(self._widths[i])
        return np.unpackbits(packed, count=height * width).astype(bool).reshape(height, width)


class Prepared:
    """A complete prepared folder: `.train` and `.test` (or `["train"]`), `.manifest`, `.folder`."""

    def __init__(self, folder: Path, manifest: dict, splits: dict[str, Split]):
        self.folder, self.manifest, self._splits = folder, manifest, splits
        self.train, self.test = (splits[name] for name in SPLITS)

    def __getitem__(self, split: str) -> Split:
        return self._splits[split]

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self[split])} {split}" for split in SPLITS)
        return f"Prepared({self.manifest['name']}, resize {self.manifest['resize']}, {counts}, {self.folder})"
