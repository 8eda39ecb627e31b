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

from ratlip.cache import Store, digest, weights_digest
from ratlip.data.batches import centre_crop, to_network
from ratlip.data.prepared import Split
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

ASPECTS = ("images", "reference", "crops", "resizing", "extractor", "range", "last_batch", "protocol")
CROPS = 47  # stream of random numbers of the reference's random crops
PARTS = 8  # disjoint parts, at most, over which the spread is taken


def resize(images: Tensor, size: int, how: str) -> Tensor:
    """float32 (B,3,c,c) in [0,255] at another size. "antialias": bilinear with a low-pass filter (standard);
    "bicubic": with one too; "nearest": as published (difference 5).
    """
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
        square, rng = split.image(int(number)), np.random.default_rng([CROPS, int(number)])
        if side is None:
            square = centre_crop(square, crop)
        else:
            top, left = (rng.integers(length - side + 1) for length in square.shape[:2])
            square = square[top : top + side, left : left + side]
        squares.append(square[:, ::-1] if flip and rng.random() < 0.5 else square)
    images = torch.from_numpy(np.stack(squares).transpose(0, 3, 1, 2).copy()).float()
    for size in (via, image_size):
        if size is not None and (size == via or images.shape[-1] != size):
            images = resize(images, size, how)
    return to_network(images, image_size)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


class _Study:
    """One run under measurement. `base`: the extractor of the standard protocol. One method an aspect gives its rows;
    the first is the standard protocol's.
    """

    def __init__(self, workspace: Workspace, folder: Path):
        self.workspace, self.folder, self.settings = workspace, folder, load_settings(folder / "config.yaml")
        self.e, self.prepared, self.clip = workspace.settings.evaluation, workspace.prepared, workspace.clip
        self.second = workspace.independent if workspace.independent is not None else self.clip
        self.base, self.published = (self._extractor(each) for each in ("standard", "published"))
        self.numbers = reference_numbers(self.prepared, self.e.images)
        self.total = max(*self.e.study, self.e.images)
        self.generator = load_generator(folder, self.settings, self.clip)
        self.others = self._others()
        self.identity = {
            "generator": weights_digest(self.generator),
            "seed": self.settings.seed,
            "data": self.prepared.manifest["content_sha256"],
            "extractor": self.base.key,
            "images": self.e.images,
            "batch_size": self.e.batch_size,
            "others": [each.key for each in self.others],
            "study": sorted(set(self.e.study)),
        }

    def _extractor(self, value_range: str) -> Extractor:
        if self.e.extractor == "inception":
            return inception_extractor(self.e.extractor_weights, value_range, self.clip.mean.device)
        return clip_extractor(self.second, (), value_range)

    def _others(self) -> list[Extractor]:
        """The extractors beside the standard one that are to be had without a download."""
        found, judge = [clip_extractor(self.clip), clip_extractor(self.second)], self.workspace.judge
        if judge is not None:
            found.append(judge_extractor(judge, weights_digest(judge)))
        weights = self.e.extractor_weights or cached_inception()
        if Path(weights).is_file():
            found.append(inception_extractor(weights, "standard", self.clip.mean.device))
        return list({each.key: each for each in found if each.key != self.base.key}.values())

    def generated(self, extractors: dict[str, Extractor], count: int) -> Store:
        """Features of the first `count` generated images: the images of the scores, and more."""
        captions = test_pairs(self.prepared, count)[1]
        latent = sample_latents(self.settings.seed, TEST_LATENTS, count, self.settings.model.latent_size)

        def read(rows: np.ndarray) -> dict:
            sentence = self.clip.embed_text([captions[i] for i in rows]).cpu()
            images = generate(self.generator, latent[rows], sentence, len(rows))
            return {name: each(images)["features"] for name, each in extractors.items()}

        keys = {name: each.key for name, each in extractors.items()}
        columns = {name: ((each.widths["features"],), "float32") for name, each in extractors.items()}
        store = Store(self.folder, "study", {**self.identity, "extractors": keys}, count, columns)
        return store.fill(read, self.e.batch_size, desc=f"study: {count} images", progress=self.workspace.progress)

    def main(self) -> Store:
        return self.generated({"features": self.base, "published": self.published}, self.total)

    def real(self, split: str, numbers: np.ndarray, extractor: Extractor | None = None, **how) -> np.ndarray:
        """Features of real images, seen the way `how` says (`reference_images`); kept in the workspace."""
        home, s, shown = self.workspace.root, self.workspace.settings, self.workspace.progress
        source, extractor = self.prepared[split], extractor or self.base
        if not how:
            store = reference_store(home, s, self.prepared, extractor, numbers, shown, split=split)
            return store["features"]
        crop, size = s.data.crop, s.model.image_size
        identity = {"extractor": extractor.key, "data": self.identity["data"], "split": split, "study": how}
        identity |= {"crop": crop, "image_size": size, "numbers": digest(numbers.tolist())}
        columns = {"features": ((extractor.widths["features"],), "float32")}
        store = Store(home, "features", identity, len(numbers), columns)

        def read(rows: np.ndarray) -> dict:
            return extractor(reference_images(source, numbers[rows], crop, size, **how))

        return store.fill(read, self.e.batch_size, desc=f"real {split} images", progress=shown)["features"]

    def row(self, aspect, variant, features, reference, extractor=None, real=None) -> dict:
        """What one variant gives: generated `features` (N,E) and `real` ones against those of the `reference`."""
        return {
            "aspect": aspect,
            "variant": variant,
            "images": len(features),
            "value": _rounded(frechet_distance(features, reference)),
            "label": (extractor or self.base).label("frechet_distance"),
            "real": _rounded(frechet_distance(real, reference)) if real is not None else None,
        }

    def images(self) -> list[dict]:
        features, reference, rows = self.main()["features"], self.real("train", self.numbers), []
        test = self.real("test", np.arange(len(self.prepared.test)))
        for count in sorted(set(self.e.study)):
            real = test[:count] if count <= len(test) else None
            row = self.row("images", f"{count} images", features[:count], reference, real=real)
            parts = min(len(features) // count, PARTS)
            values = [frechet_distance(features[i * count : (i + 1) * count], reference) for i in range(parts)]
            spread = _rounded(np.std(values, ddof=1)) if parts > 1 else None
            rows.append({**row, "mean": _rounded(np.mean(values)), "parts": parts, "spread": spread})
        return rows

    def reference(self) -> list[dict]:
        features, test, train = self.main()["features"], len(self.prepared.test), len(self.prepared.train)
        few = np.linspace(0, train - 1, min(test, train)).astype(int)
        variants = {
            f"{len(self.numbers)} training images": ("train", self.numbers),
            f"{len(few)} training images": ("train", few),
            f"{test} test images": ("test", np.arange(test)),
        }
        shown = features[: self.e.images]
        return [self.row("reference", name, shown, self.real(*which)) for name, which in variants.items()]

    def crops(self) -> list[dict]:
        data = self.workspace.settings.data
        side = data.crop if data.resize > data.crop else data.crop * 7 // 8
        random, mirrored = f"random crops, {side} px", "half of them mirrored"
        variants = {"centre crop": {}, random: {"side": side}, f"centre crop, {mirrored}": {"flip": True}}
        return self._seen("crops", variants | {f"{random}, {mirrored}": {"side": side, "flip": True}})

    def resizing(self) -> list[dict]:
        """Where crops are as large as the images: to three quarters and back, for there is nothing to do."""
        crop, size = self.workspace.settings.data.crop, self.workspace.settings.model.image_size
        via, every = size * 3 // 4, ("antialias", "bicubic", "nearest")
        if crop != size:
            ways = {f"{crop} to {size} px, {how}": {"how": how} if how != every[0] else {} for how in every}
        else:
            ways = {f"to {via} px and back, {how}": {"how": how, "via": via} for how in every}
            ways = {"not resized": {}} | ways
        return self._seen("resizing", ways)

    def _seen(self, aspect: str, variants: dict[str, dict]) -> list[dict]:
        """The same generated images against the reference, seen in several ways."""
        features = self.main()["features"][: self.e.images]
        references = {name: self.real("train", self.numbers, **how) for name, how in variants.items()}
        return [self.row(aspect, name, features, reference) for name, reference in references.items()]

    def extractor(self) -> list[dict]:
        used = {"features": self.base} | {f"other{i}": each for i, each in enumerate(self.others)}
        store = self.generated(used, self.e.images)
        return [self._measured("extractor", each.name, store[name], each) for name, each in used.items()]

    def range(self) -> list[dict]:
        return self._both_ranges("numeric range", self.e.images)

    def _both_ranges(self, aspect: str, count: int) -> list[dict]:
        """The standard protocol, and `count` images in the published range."""
        store = self.main()
        return [
            self._measured(aspect, "standard", store["features"][: self.e.images], self.base),
            self._measured(aspect, "published", store["published"][:count], self.published),
        ]

    def _measured(self, aspect: str, variant: str, features: np.ndarray, extractor: Extractor) -> dict:
        """A row with reference and real images by the same extractor."""
        test = self.real("test", np.arange(min(len(self.prepared.test), self.e.images)), extractor)
        return self.row(aspect, variant, features, self.real("train", self.numbers, extractor), extractor, test)

    def _full_batches(self, count: int) -> int:
        return count - count % self.e.batch_size or count

    def last_batch(self) -> list[dict]:
        features, reference = self.main()["features"], self.real("train", self.numbers)
        counts = {"kept": self.e.images, "dropped": self._full_batches(self.e.images)}
        return [self.row("last batch", name, features[:count], reference) for name, count in counts.items()]

    def protocol(self) -> list[dict]:
        """All at once; the published one takes 12 passes over the captions, or all images that there are."""
        count = min(PUBLISHED_PASSES * len(self.prepared.test), self.total)
        return self._both_ranges("protocol", self._full_batches(count))


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
    try:
        kept = read_json(path)
        found = kept["rows"] if kept["identity"] == measured.identity else {}
    except (OSError, ValueError, KeyError, TypeError):
        found = {}
    missing = [name for name in ASPECTS if name not in found]
    for name in bar(missing, desc="protocol study", unit="aspect", enabled=workspace.progress and bool(missing)):
        found[name] = getattr(measured, name)()
        write_json(path, {"identity": measured.identity, "rows": found})
    for store in folder.glob("study-*"):
        shutil.rmtree(store)
    return [row for name in ASPECTS for row in found[name]]
