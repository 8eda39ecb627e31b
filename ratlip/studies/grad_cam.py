"""Where on an image does the frozen CLIP see the caption? Class activation maps, and numbers for them.

The maps are those of pytorch-grad-cam (Grad-CAM: Selvaraju et al., 2017). The paper shows such maps for each h and
gives no number; here every map is measured: `energy_on_object`, `coverage`, `concentration`. Before a map is believed
it has to beat controls on real images, whose masks are exact (`validate`, after Adebayo et al., "Sanity checks for
saliency maps", 2018). Charts are in `ratlip.plots.charts`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ratlip.clip.frozen import FrozenClip, shuffled
from ratlip.data.batches import centre_crop, real_images
from ratlip.data.prepared import Split
from ratlip.data.synthetic import object_mask
from ratlip.plots.pictures import as_pixels
from ratlip.progress import bar
from ratlip.studies import compare, grid
from ratlip.training.generation import Run, generate
from ratlip.training.step import sample_latents
from ratlip.workspace import Workspace

CAMS = ("GradCAM", "HiResCAM", "ScoreCAM")  # classes of pytorch_grad_cam; no SVD, whose sign is arbitrary
TARGETS = ("cosine", "projection")
WHOLE = 0.8  # "the whole object": the best map of a real object, on the patch grid, reaches 0.9 of its pixels
EXPLAINED_LATENTS = 2**31 + 6  # a "step" that neither training nor the scores use
CONTROLS = ("area", "wrong caption", "random weights", "another image")


@dataclass(frozen=True)
class Method:
    """How a map is made: the `cam`, one of `CAMS`; the `target`, one of `TARGETS`; and the layer.

    The layer is `ln_1` of an image block (0 to L-1, or -1, -2, ... from the end), the tokens as its attention reads
    them: in a CLIP that reads its class token, patch tokens after the last attention have no gradient. "cosine" is the
    similarity itself; "projection", the length of the embedding along the sentence, does not level off at a match.
    """

    cam: str = "GradCAM"
    block: int = -1
    target: str = "cosine"

    def __post_init__(self):
        if self.cam not in CAMS or self.target not in TARGETS:
            raise ValueError(f"a method is one of {CAMS} and one of {TARGETS}, not {self.cam!r} and {self.target!r}")

    def __str__(self) -> str:
        block = {-1: "the last block", -2: "the last but one"}.get(self.block, f"block {self.block}")
        return f"{self.cam}, {self.target}, {block}"


PAPER = Method()


def candidates(clip: FrozenClip) -> list[Method]:
    """The methods that notebook 6 compares: Grad-CAM of three blocks with both targets, and two relatives.

    HiRes-CAM (Draelos and Carin, 2020) does not average the gradient over the patches. Score-CAM (Wang et al., 2020)
    shows CLIP the image through each channel, and weighs the channel by the similarity that is left.
    """
    blocks = range(-1, -1 - min(3, clip.layers), -1)
    grad_cams = [Method("GradCAM", block, target) for target in TARGETS for block in blocks]
    return [*grad_cams, Method("HiResCAM", -1, "projection"), Method("ScoreCAM", -1, "cosine")]


class _Embedding(nn.Module):
    """Images -> embeddings, with a gradient although no weight of the frozen CLIP wants one."""

    def __init__(self, clip: FrozenClip):
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor) -> Tensor:
        return self.clip.embed_images(images.detach().requires_grad_(torch.is_grad_enabled()))


def _patches(clip: FrozenClip, tokens: Tensor) -> Tensor:
    """Tokens of a block -> (B,C,g,g), without the class token (which, where there is one, comes first)."""
    tokens = tokens if clip.model.visual.transformer.batch_first else tokens.transpose(0, 1)
    return tokens[:, -(clip.grid**2) :].transpose(1, 2).unflatten(2, (clip.grid, clip.grid))


def similarity_maps(
    clip: FrozenClip, images: Tensor, sentences: Tensor, method: Method = PAPER, batch_size: int = 64
) -> Tensor:
    """Which pixels make CLIP find the sentence: (N,S,S) float32 in [0,1] on the CPU.

    images (N,3,S,S) in [-1,1], S = `clip.image_size`; sentences (N,E), their text embeddings, of any length. Each map
    is scaled by itself to 0 .. 1 (all 0 where nothing is positive), so two maps do not say which image fits better.
    The patch grid is enlarged bilinearly. Score-CAM takes `clip.width` passes an image.
    """
    if len(images) != len(sentences):
        raise ValueError(f"{len(images)} images and {len(sentences)} sentences: one each is needed")
    if not -clip.layers <= method.block < clip.layers:
        raise ValueError(f"{method}: {clip.name} has the blocks 0 to {clip.layers - 1}")
    if not len(images):
        return torch.empty(0, *images.shape[2:])
    import pytorch_grad_cam  # here, because it takes 2 s and only the maps need it

    device, maps, unit = clip.mean.device, [], partial(F.normalize, dim=0)
    seen: Callable[[Tensor], Tensor] = unit if method.target == "cosine" else nn.Identity()
    texts = sentences.to(device).split(batch_size)
    layer = clip.model.visual.transformer.resblocks[method.block].ln_1
    with torch.enable_grad(), contextlib.redirect_stderr(io.StringIO()):  # Score-CAM draws a progress bar an image
        cam = getattr(pytorch_grad_cam, method.cam)(_Embedding(clip), [layer], partial(_patches, clip))
        cam.batch_size = 256  # read by Score-CAM: channels at once
        try:
            for batch, wanted in zip(images.split(batch_size), texts, strict=True):
                targets = [lambda embedding, text=text: seen(embedding) @ unit(text) for text in wanted]
                maps.append(torch.from_numpy(cam(batch.to(device), targets)))
        finally:
            cam.activations_and_grads.release()
    return torch.cat(maps).clamp(0, 1)


def _checked(maps: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor]:
    masks = torch.ones_like(maps) if masks is None else masks
    if maps.ndim != 3 or masks.shape != maps.shape:
        raise ValueError(f"maps must be (N,S,S) and masks of the same shape, not {maps.shape} and {masks.shape}")
    return maps.double(), masks.double()


def energy_on_object(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of each map's sum that lies in the mask: float64 (N,). A map of zeros counts as a uniform one."""
    maps, masks = _checked(maps, masks)
    total = maps.sum((1, 2))
    return torch.where(total > 0, (maps * masks).sum((1, 2)) / total.clamp(min=1e-12), masks.mean((1, 2)))


def coverage(maps: Tensor, masks: Tensor | None = None, level: float = 0.5) -> Tensor:
    """Share of the mask (without masks: of the image) where the map reaches `level` times its own maximum.

    maps, masks (N,S,S) -> float64 (N,); NaN where a mask is empty, 0 for a map of zeros. It is 1 for a map that
    covers everything, so the coverage of the background, `coverage(maps, ~masks)`, belongs beside it.
    """
    maps, masks = _checked(maps, masks)
    most = maps.amax((1, 2), keepdim=True)
    return (((maps >= level * most) & (most > 0)) * masks).sum((1, 2)) / masks.sum((1, 2))


def concentration(maps: Tensor) -> Tensor:
    """How little of the image a map is about: 1 - H(p) / log P, p the map divided by its sum, P its pixels.

    maps (N,S,S) -> float64 (N,) in [0,1]: 0 for a uniform map (and for zeros), 1 for a single pixel.
    """
    share = _checked(maps, None)[0].flatten(1)
    pixels, total = share.shape[1], share.sum(1, keepdim=True)
    share = torch.where(total > 0, share / total.clamp(min=1e-12), torch.full_like(share, 1 / pixels))
    return (1 - torch.special.entr(share).sum(1) / np.log(pixels)).clamp(0, 1)


def overlap(masks: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of two sets of masks (N,S,S): float64 (N,)."""
    a, b = masks.bool(), others.bool()
    return (a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp(min=1).double()


def map_scores(maps: Tensor, masks: Tensor | None = None) -> dict[str, float]:
    """Means over images. With masks (N,S,S): "coverage" of the object, "spill" (coverage of the background), "energy"
    on the object, its "area"; without: "coverage" of the image. Always "concentration". NaN where there is no image.
    """
    each = {"coverage": coverage(maps, masks)}
    if masks is not None:
        each |= {"spill": coverage(maps, ~masks), "energy": energy_on_object(maps, masks)}
        each["area"] = masks.double().mean((1, 2))
    each["concentration"] = concentration(maps)
    return {name: float(values.nanmean()) for name, values in each.items()}


def real_masks(split: Split, numbers: Sequence[int], crop: int, image_size: int) -> Tensor | None:
    """Exact object masks of `real_images` of the same numbers: bool (N,S,S); None where the set has none."""
    found = [centre_crop(mask, crop) for mask in map(split.mask, map(int, numbers)) if mask is not None]
    if len(found) < len(numbers):
        return None
    cover = torch.from_numpy(np.stack(found)).float()[:, None]
    if crop != image_size:
        cover = F.interpolate(cover, size=image_size, mode="bilinear", antialias=True, align_corners=False)
    return cover[:, 0] > 0.5


def estimated_masks(images: Tensor, backgrounds: Sequence[str]) -> Tensor:
    """`synthetic.object_mask` of images (N,3,S,S) in [-1,1], by the background each caption names: bool (N,S,S)."""
    return torch.from_numpy(object_mask(as_pixels(images), backgrounds))


def plausible(masks: Tensor, reference: Tensor) -> Tensor:
    """Whether each mask (N,S,S) has the area of an object: bool (N,). False where a generator drew nothing, say.

    Half the smallest area in `reference` (M,S,S) at least, and halfway from the largest to the whole image at most.
    """
    area, known = masks.double().mean((1, 2)), reference.double().mean((1, 2))
    return (area >= known.min() / 2) & (area <= (known.max() + 1) / 2)


@dataclass(frozen=True)
class Material:
    """Images (N,3,S,S) in [-1,1], sentences (N,E), captions; masks (N,S,S) and the captions' backgrounds, or None."""

    images: Tensor
    sentences: Tensor
    captions: list[str]
    masks: Tensor | None
    backgrounds: list[str] | None

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> Material:
        """The first `count` of it."""
        parts: list[Any] = [None if part is None else part[:count] for part in vars(self).values()]
        return Material(*parts)


def real_material(workspace: Workspace, split: str, count: int, seed: int = 0) -> Material:
    """`count` real images of a split (fewer where it has fewer), drawn by `seed`, each with one caption."""
    part, s = workspace.prepared[split], workspace.settings
    rng = np.random.default_rng([seed, 6])
    numbers = rng.permutation(len(part))[:count].tolist()
    captions = [part.captions[n][int(rng.integers(len(part.captions[n])))] for n in numbers]
    which = (part, numbers, s.data.crop, s.model.image_size)
    backgrounds = part.attributes and [part.attributes[n]["background"] for n in numbers]
    sentences = workspace.clip.embed_text(captions).cpu()
    return Material(real_images(*which), sentences, captions, real_masks(*which), backgrounds)


def validate(clip: FrozenClip, random_clip: FrozenClip, material: Material, method: Method) -> pd.DataFrame:
    """Share of the map's energy on the object, an image a row, and what the controls get instead.

    "map": the image's own caption. "area": a uniform map. "wrong caption": that of another image of `material`.
    "random weights": the same by `random_clip` (see `shuffled`). "another image": the map of another image with its
    own caption, which holds whatever is common to all maps (objects lie near the middle).
    """
    m, half = material, len(material) // 2
    if m.masks is None:
        raise ValueError("material without masks cannot validate maps: only the generated set has them")
    maps = similarity_maps(clip, m.images, m.sentences, method)
    wrong = similarity_maps(clip, m.images, m.sentences.roll(half, 0), method)
    random = similarity_maps(random_clip, m.images, m.sentences, method)
    shown = {"map": maps, "area": torch.ones_like(maps), "wrong caption": wrong, "random weights": random}
    shown["another image"] = maps.roll(half, 0)
    return pd.DataFrame({name: energy_on_object(each, m.masks) for name, each in shown.items()})


def margins(energies: pd.DataFrame) -> pd.DataFrame:
    """By how much the map beats each control: mean and standard error of the paired difference over images.

    `energies`: from `validate`. "beaten" where the mean exceeds two standard errors.
    """
    differences = pd.DataFrame({name: energies["map"] - energies[name] for name in CONTROLS})
    found = pd.DataFrame({"margin": differences.mean(), "se": differences.sem()})
    return found.assign(beaten=found["margin"] > 2 * found["se"])


def compare_methods(clip: FrozenClip, material: Material, methods: Sequence[Method]) -> pd.DataFrame:
    """One row a method: means of `validate`, smallest margin, its standard error, whether all controls are beaten."""
    random_clip, rows = shuffled(clip), {}
    for method in methods:
        energies = validate(clip, random_clip, material, method)
        table = margins(energies)
        smallest = table.loc[table["margin"].idxmin(), ["margin", "se"]]
        rows[method] = {**energies.mean(), **smallest, "valid": bool(table["beaten"].all())}
    return pd.DataFrame.from_dict(rows, orient="index")


def drawn(run: Run, material: Material, seed: int = 0) -> Tensor:
    """What a run draws for the captions of `material`, all runs from the same latents: images (N,3,S,S) in [-1,1]."""
    latent = sample_latents(seed, EXPLAINED_LATENTS, len(material), run.settings.model.latent_size)
    return generate(run.generator, latent, material.sentences)


def sweep(workspace: Workspace, runs: pd.DataFrame, material: Material, methods: dict[str, Method]) -> pd.DataFrame:
    """`map_scores` of every run (a row of `grid.results`) by every method: one row each.

    Columns: method (its key), label, seed, hidden_size, the scores and, where the background is known, "found": the
    share of images with a plausible object. There, the object is estimated by colour, and all scores but
    "concentration" are about these images.
    """
    rows = []
    for row in bar(list(runs.itertuples()), desc="maps", unit="run", enabled=workspace.progress):
        run = grid.open_run(workspace, row)
        images = drawn(run, material)
        kept, masks, found = torch.ones(len(images), dtype=torch.bool), None, {}
        if material.backgrounds is not None and material.masks is not None:
            masks = estimated_masks(images, material.backgrounds)
            kept = plausible(masks, material.masks)
            masks, found = masks[kept], {"found": float(kept.double().mean())}
        for name, method in methods.items():
            maps = similarity_maps(run.clip, images, material.sentences, method)
            scores = map_scores(maps[kept], masks) | found | {"concentration": float(concentration(maps).mean())}
            which = {"method": name, "label": row.label, "seed": row.seed, "hidden_size": row.hidden_size}
            rows.append(which | scores)
    return pd.DataFrame(rows)


def whole_object(frame: pd.DataFrame, label: str) -> tuple[float, str]:
    """Mean coverage of a variant over its seeds, and the verdict on "its maps cover the whole object".

    "supported" where the 95 % t interval lies above `WHOLE`, "contradicted" where below; else, and with fewer than
    `compare.FEWEST` seeds, "undecided".
    """
    values = frame.loc[frame["label"] == label, "coverage"].dropna()
    if len(values) < 2:
        return float(values.mean()), "undecided"
    lead = float(values.mean()) - WHOLE
    decided = abs(lead) > compare.half_interval(values) and len(values) >= compare.FEWEST
    return lead + WHOLE, ("supported" if lead > 0 else "contradicted") if decided else "undecided"


def against_others(frame: pd.DataFrame, label: str, column: str = "coverage") -> pd.DataFrame:
    """`compare.paired` of the variant `label` with each other one, a row each; "undecided" where one has no number."""
    rows, unknown = {}, compare.Difference(np.nan, np.nan, np.nan, 0, "undecided")
    for other in [name for name in frame["label"].unique() if name != label]:
        both = frame[frame["label"].isin([label, other])].pivot(index="seed", columns="label", values=column)
        found = unknown if both.dropna().empty else compare.paired(frame, label, other, column)
        rows[other] = {"difference": found.mean, "low": found.low, "high": found.high, "verdict": found.verdict}
    return pd.DataFrame.from_dict(rows, orient="index")
