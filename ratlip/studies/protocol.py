"""How a Frechet distance moves with the way it is measured: one run, one change at a time.

For one published model, 14.81, 19.5, 26.9 and 55 were reported on the birds. Here the generator stays, and the number
of images, the reference, crops and flips, resizing, extractor, numeric range and the last batch change one by one,
from the protocol "standard" of `ratlip.scores.evaluation`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ratlip.cache import digest, weights_digest
from ratlip.data.batches import centre_crop, cut, to_network
from ratlip.data.prepared import Split
from ratlip.data.store import Store
from ratlip.errors import RunError
from ratlip.files import read_json, write_json
from ratlip.progress import bar
from ratlip.scores.evaluation import PUBLISHED_PASSES, TEST_LATENTS, reference_numbers, reference_store, test_pairs
from ratlip.scores.extractors import Extractor, cached_inception, clip_extractor, inception_extractor, judge_extractor
from ratlip.scores.metrics import frechet_distance
from ratlip.settings import load_settings
from ratlip.training.generation import generate, load_generator
from ratlip.training.loop import is_complete
from ratlip.training.step import sample_latents
from ratlip.workspace import Workspace

BESIDE_REAL = ("extractor", "range", "protocol")  # aspects that say what as many real test images get, and "images"
CROPS = 47  # stream of random numbers of the reference's random crops
PARTS = 8  # disjoint parts, at most, over which the spread is taken


def resize(images: Tensor, size: int, how: str) -> Tensor:
    """float32 (B,3,c,c) in [0,255] by "antialias" (bilinear), "bicubic", or "nearest" as published (difference 5)."""
    mode = "bilinear" if how == "antialias" else how
    return F.interpolate(images, size=size, mode=mode, antialias=mode != "nearest").clamp(0, 255)


def reference_images(
    split: Split,
    numbers: Sequence[int],
    crop: int,
    image_size: int,
    *,
    side: int | None = None,
    flip: bool = False,
    how: str = "antialias",
    via: int | None = None,
) -> Tensor:
    """Real images as float32 (N,3,S,S) in [-1,1], in ways that differ from `ratlip.data.batches.real_images`.

    `side`: random squares of this side, a function of the image's number, instead of the middle one of side `crop`.
    `flip`: half of them mirrored. `how`: see `resize`. `via`: to that size and back, by `how`.
    """
    squares = []
    for number in numbers:
        pixels, rng = split.image(int(number)), np.random.default_rng([CROPS, int(number)])
        if side is None:
            square = centre_crop(pixels, crop)
        else:
            top, left = (int(rng.integers(length - side + 1)) for length in pixels.shape[:2])
            square = cut(pixels, top, left, side)
        squares.append(cut(square, 0, 0, len(square), mirrored=flip and rng.random() < 0.5))
    images = torch.from_numpy(np.stack(squares).transpose(0, 3, 1, 2).copy()).float()
    if via is not None:
        images = resize(images, via, how)
    if images.shape[-1] != image_size:
        images = resize(images, image_size, how)
    return to_network(images, image_size)


def _rounded(value: float | np.floating) -> float:
    return float(f"{value:.5g}")


class _Study:
    """One run under measurement. `used`: the extractors by name, "features" being that of the standard protocol."""

    def __init__(self, workspace: Workspace, folder: Path):
        self.workspace, self.folder, self.settings = workspace, folder, load_settings(folder / "config.yaml")
        self.e, self.prepared, self.clip = workspace.settings.evaluation, workspace.prepared, workspace.clip
        self.generator = load_generator(folder, self.settings, self.clip)
        self.numbers = reference_numbers(self.prepared, self.e.images)
        self.total = max(*self.e.study, self.e.images)
        base, published, *others = self._extractors()
        self.others = [f"other{i}" for i in range(len(others))]
        self.used = {"features": base, "published": published, **dict(zip(self.others, others, strict=True))}
        self.identity = {"generator": weights_digest(self.generator), "seed": self.settings.seed}
        self.identity |= {"data": self.prepared.manifest["content_sha256"], "extractor": base.key}
        self.identity |= {"images": self.e.images, "batch_size": self.e.batch_size}
        self.identity |= {"others": [each.key for each in others], "study": sorted(set(self.e.study))}

    def _extractors(self) -> list[Extractor]:
        """That of the standard protocol, the same in the published range, and what else needs no download."""
        e, device, judge = self.e, self.clip.mean.device, self.workspace.judge
        second = self.workspace.independent if self.workspace.independent is not None else self.clip
        if e.extractor == "inception":
            pair = [inception_extractor(e.extractor_weights, way, device) for way in ("standard", "published")]
        else:
            pair = [clip_extractor(second, (), way) for way in ("standard", "published")]
        others = [clip_extractor(self.clip), clip_extractor(second)]
        if judge is not None:
            others.append(judge_extractor(judge, weights_digest(judge)))
        weights = e.extractor_weights or cached_inception()
        if Path(weights).is_file():
            others.append(inception_extractor(weights, "standard", device))
        return [*pair, *{each.key: each for each in others if each.key != pair[0].key}.values()]

    def variants(self) -> dict[str, dict[str, dict]]:
        """Aspect -> variant -> what it changes of the standard protocol, which each aspect begins with.

        Changes are `images` (how many generated ones), `extractor` (its name in `used`), `reference` (split and
        numbers of real images), or options of `reference_images`. Where crops are as large as the images, resizing
        is to three quarters and back, for there is nothing to do.
        """
        e, data, size = self.e, self.workspace.settings.data, self.workspace.settings.model.image_size
        test, train = len(self.prepared.test), len(self.prepared.train)
        few = np.linspace(0, train - 1, min(test, train)).astype(int)
        side = data.crop if data.resize > data.crop else data.crop * 7 // 8
        random, mirrored = f"random crops, {side} px", "half of them mirrored"
        via = size * 3 // 4
        resizing: dict[str, dict] = {"not resized": {}} if data.crop == size else {}
        for how in ("antialias", "bicubic", "nearest"):
            if data.crop == size:
                resizing[f"to {via} px and back, {how}"] = {"how": how, "via": via}
            else:
                resizing[f"{data.crop} to {size} px, {how}"] = {"how": how} if how != "antialias" else {}
        passes = min(PUBLISHED_PASSES * test, self.total)  # 12 over the captions, or all images that there are
        return {
            "images": {f"{count} images": {"images": count} for count in sorted(set(e.study))},
            "reference": {
                f"{len(self.numbers)} training images": {},
                f"{len(few)} training images": {"reference": ("train", few)},
                f"{test} test images": {"reference": ("test", np.arange(test))},
            },
            "crops": {
                "centre crop": {},
                random: {"side": side},
                f"centre crop, {mirrored}": {"flip": True},
                f"{random}, {mirrored}": {"side": side, "flip": True},
            },
            "resizing": resizing,
            "extractor": {self.used[name].name: {"extractor": name} for name in ("features", *self.others)},
            "range": {"standard": {}, "published": {"extractor": "published"}},
            "last_batch": {"kept": {}, "dropped": {"images": self._full_batches(e.images)}},
            "protocol": {"standard": {}, "published": {"extractor": "published", "images": self._full_batches(passes)}},
        }

    def _full_batches(self, count: int) -> int:
        return count - count % self.e.batch_size or count

    def rows(self, aspect: str) -> list[dict]:
        """What every variant of an aspect gives."""
        rows, names = [], ("features", *self.others) if aspect == "extractor" else ("features", "published")
        title = {"range": "numeric range", "last_batch": "last batch"}.get(aspect, aspect)
        store = self.generated(names, self.e.images if aspect == "extractor" else self.total)
        for variant, changes in self.variants()[aspect].items():
            options = dict(images=self.e.images, extractor="features", reference=("train", self.numbers)) | changes
            count, name, which = (options.pop(key) for key in ("images", "extractor", "reference"))
            reference, every = self.real(name, *which, **options), store[name]
            real, test = None, len(self.prepared.test)
            if aspect == "images":
                real = self.real(name, "test", np.arange(test))[:count] if count <= test else None
            elif aspect in BESIDE_REAL:
                real = self.real(name, "test", np.arange(min(test, self.e.images)))
            value, label = frechet_distance(every[:count], reference), self.used[name].label("frechet_distance")
            row = {"aspect": title, "variant": variant, "images": count, "value": _rounded(value), "label": label}
            row["real"] = _rounded(frechet_distance(real, reference)) if real is not None else None
            if aspect == "images":
                parts = min(len(every) // count, PARTS)
                found = [frechet_distance(every[i * count : (i + 1) * count], reference) for i in range(parts)]
                spread = _rounded(np.std(found, ddof=1)) if parts > 1 else None
                row |= {"mean": _rounded(np.mean(found)), "parts": parts, "spread": spread}
            rows.append(row)
        return rows

    def generated(self, names: Sequence[str], count: int) -> Store:
        """Features of the first `count` generated images: the images of the scores, and more."""
        captions, extractors = test_pairs(self.prepared, count)[1], {name: self.used[name] for name in names}
        latent = sample_latents(self.settings.seed, TEST_LATENTS, count, self.settings.model.latent_size)

        def read(rows: np.ndarray) -> dict:
            sentence = self.clip.embed_text([captions[i] for i in rows]).cpu()
            images = generate(self.generator, latent[rows], sentence, len(rows))
            return {name: each(images)["features"] for name, each in extractors.items()}

        keys = {name: each.key for name, each in extractors.items()}
        columns = {name: self._column(name) for name in names}
        store = Store(self.folder, "study", {**self.identity, "extractors": keys}, count, columns)
        return store.fill(read, self.e.batch_size, desc=f"study: {count} images", progress=self.workspace.progress)

    def _column(self, name: str) -> tuple[tuple[int, ...], str]:
        return (self.used[name].widths["features"],), "float32"

    def real(self, name: str, split: str, numbers: np.ndarray, **how) -> np.ndarray:
        """Features of real images, seen the way `how` says (`reference_images`); kept in the workspace."""
        root, s, shown = self.workspace.root, self.workspace.settings, self.workspace.progress
        source, extractor, crop, size = self.prepared[split], self.used[name], s.data.crop, s.model.image_size
        if not how:
            return reference_store(root, s, self.prepared, extractor, numbers, shown, split=split)["features"]
        identity = {"extractor": extractor.key, "data": self.identity["data"], "split": split, "study": how}
        identity |= {"crop": crop, "image_size": size, "numbers": digest(numbers.tolist())}
        store = Store(root, "features", identity, len(numbers), {"features": self._column(name)})

        def read(rows: np.ndarray) -> dict:
            return extractor(reference_images(source, numbers[rows], crop, size, **how))

        return store.fill(read, self.e.batch_size, desc=f"real {split} images", progress=shown)["features"]


def study(workspace: Workspace, folder: str | Path | None = None) -> list[dict]:
    """Frechet distances of one complete run under every protocol, as tidy rows; half a minute at demo size.

    `folder`: a run of the workspace (default: that of its settings). A row has aspect, variant, images (generated),
    value, label (printed name with extractor) and real (what real test images get under the same variant, or None).
    The first row of an aspect is the standard protocol. Rows of "images" have parts, mean and spread: value is of the
    first n images, mean and sd are over disjoint parts of n images. Crops, flips and resizing are those of the
    reference; the generated images are the same in all rows.

    Kept in <run>/protocol-study.json, aspect by aspect: an interrupted study goes on where it was.
    """
    folder = Path(folder) if folder else workspace.run_folder
    if not is_complete(folder):
        raise RunError(f"{folder}: not trained to its last step; run `ratlip train` with the same settings")
    measured, path = _Study(workspace, folder), folder / "protocol-study.json"
    aspects = measured.variants()
    try:
        kept = read_json(path)
        found = kept["rows"] if kept["identity"] == measured.identity else {}
    except (OSError, ValueError, KeyError, TypeError):
        found = {}
    missing = [name for name in aspects if name not in found]
    for name in bar(missing, desc="protocol study", unit="aspect", enabled=workspace.progress and bool(missing)):
        found[name] = measured.rows(name)
        write_json(path, {"identity": measured.identity, "rows": found})
    for store in folder.glob("study-*"):
        shutil.rmtree(store)
    return [row for name in aspects for row in found[name]]
