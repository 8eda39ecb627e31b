"""Feature extractors of the distances between sets of images, registered with torch-fidelity.

* Inception-v3, as torch-fidelity has it, from a local file or by download: FID, KID, IS as the field means them.
* A CLIP, for where no such weights are to be had: features are image embeddings, classes (for IS) are captions. Tables
  call the scores FD, KD and IS *of that CLIP*: they compare runs that share the CLIP, and nothing else.

All take 8-bit images, as torch-fidelity's do: a generated image is rounded as if it were saved first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ratlip.cache import file_digest
from ratlip.clip.frozen import FrozenClip, with_normalisation
from ratlip.clip.loading import brief
from ratlip.data.batches import to_bytes
from ratlip.data.prepared import Prepared, Split
from ratlip.errors import WeightsError
from ratlip.scores.judge import WIDTH, Judge
from ratlip.settings import Settings

if TYPE_CHECKING:
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

# torch-fidelity is imported where an extractor is made: with torchvision 1.2 s, which reading scores need not wait for.
CLASSES = 1000  # captions that serve as classes, at most
OFFICIAL_INCEPTION = "6726825d"  # first digits of the SHA-256 of torch-fidelity's weights
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMES = {"frechet_distance": "FD", "kernel_distance": "KD", "kernel_distance_sd": "sd of KD", "inception_score": "IS"}
NAMES |= {"precision": "precision", "recall": "recall"}
RANGES = {"standard": "", "published": ", published range"}  # what is added to the name of an extractor
INCEPTION_NAMES = NAMES | {"frechet_distance": "FID", "kernel_distance": "KID", "kernel_distance_sd": "sd of KID"}


def fit(images: Tensor, size: int) -> Tensor:
    """Images (B,3,S,S) in [-1,1] at another size, as CLIP resizes: bicubic with a low-pass filter, clamped."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)


def published_range(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Images (B,3,H,W) in [-1,1] as the published evaluation shows them to its network (difference 6).

    Our reading of "values in about [-0.2, 0.43] instead of [-1,1]": undoing a normalisation that never was, pixel u in
    [0,1] becomes u * std + mean (1,3,1,1). With ImageNet's, and 2x - 1 after it, that is [-0.03, 0.43], [-0.09, 0.36]
    and [-0.19, 0.26] for red, green, blue: a quarter of the contrast. With a CLIP's own, its first layer gets u instead
    of (u - mean) / std.
    """
    return 2 * ((images + 1) / 2 * std + mean) - 1


@dataclass(frozen=True)
class Extractor:
    """A registered extractor, ready for use. `module(uint8 images)` is what torch-fidelity calls.

    `name`: what tables print. `key`: its name in torch-fidelity's registry, which tells weights, numeric range and
    classes. `features_key`: the same without the classes. `names`: printed name of each score.
    """

    name: str
    key: str
    features_key: str
    module: FeatureExtractorBase
    widths: dict[str, int]
    names: dict[str, str]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B,3,S,S) in [-1,1] -> float32 "features" (B,E) and, if it has classes, "logits" (B,C)."""
        device = next(self.module.parameters()).device
        found = self.module(to_bytes(images).to(device))
        return {name: values.float().cpu() for name, values in zip(self.widths, found, strict=True)}

    def label(self, score: str) -> str:
        """Printed name of a score, e.g. "FD (small CLIP ab12cd)"."""
        return f"{self.names[score]} ({self.name})"


def _register(key: str, layers: tuple[str, ...], network: nn.Module, read: Callable) -> FeatureExtractorBase:
    """Make `network` known to torch-fidelity as `key`; `read`: images in [-1,1] -> the values of `layers`."""
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

    class Registered(FeatureExtractorBase):
        def __init__(self, name: str, features_list: Sequence[str], **options):
            super().__init__(name, features_list)
            self.network = network

        get_provided_features_list = staticmethod(lambda: layers)
        get_default_feature_layer_for_metric = staticmethod(lambda metric: layers[-1 if metric == "isc" else 0])
        can_be_compiled = staticmethod(lambda: False)

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            found = dict(zip(layers, read(images.float() / 127.5 - 1), strict=True))
            return tuple(found[layer] for layer in self.features_list)

    FEATURE_EXTRACTORS_REGISTRY.pop(key, None)  # the same weights, loaded a second time
    register_feature_extractor(key, Registered)
    return Registered(key, list(layers)).eval()


def class_captions(split: Split, limit: int = CLASSES) -> list[str]:
    """At most `limit` distinct captions, spread evenly over a split: the classes of a CLIP's IS."""
    distinct = list(dict.fromkeys(split.all_captions))
    return [distinct[i] for i in np.linspace(0, len(distinct) - 1, min(limit, len(distinct))).astype(int)]


def clip_extractor(clip: FrozenClip, captions: Sequence[str] = (), value_range: str = "standard") -> Extractor:
    """A CLIP as extractor: image embeddings (raw) and, with `captions`, its zero-shot logits against them.

    Images of another size are resized (`fit`). The standard normalisation, whatever `clip` has.
    """
    clip = with_normalisation(clip, "standard")
    classes = F.normalize(clip.embed_text(captions), dim=1)

    def read(images: Tensor) -> tuple[Tensor, ...]:
        images = fit(images, clip.image_size)
        if value_range == "published":
            images = published_range(images, clip.mean, clip.std)
        embedding = clip.embed_images(images)
        if not captions:
            return (embedding,)
        cosine = F.normalize(embedding.float(), dim=1) @ classes.T.to(embedding.device)
        return embedding, clip.model.logit_scale.exp() * cosine

    features_key, widths = f"clip-{clip.fingerprint}-{value_range}", {"features": clip.embed_dim}
    widths |= {"logits": len(captions)} if captions else {}
    class_digest = hashlib.sha256("\n".join(captions).encode()).hexdigest()[:8] if captions else "none"
    module = _register(key := f"{features_key}-{class_digest}", tuple(widths), clip, read)
    return Extractor(clip.name + RANGES[value_range], key, features_key, module, widths, NAMES)


def judge_extractor(judge: Judge, digest: str) -> Extractor:
    """The last hidden layer of the attribute classifier, which saw no captions. `digest`: that of its weights."""
    key = f"judge-{digest}"
    module = _register(key, ("features",), judge, lambda images: (judge.trunk(images),))
    return Extractor("judge", key, key, module, {"features": WIDTH}, NAMES)


def inception_extractor(
    weights: str | Path | None = None, value_range: str = "standard", device: str | torch.device = "cpu"
) -> Extractor:
    """torch-fidelity's Inception-v3: pool features (2048) and logits without bias (1008).

    `weights`: a local file, else torch-fidelity's own are downloaded once (into torch's cache). Raises WeightsError
    with what to do where they are missing or damaged; no pickled code is run. The published code has torchvision's
    weights instead, so that even with `value_range` "published" its FIDs are not these.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    path, own = Path(weights) if weights else _downloaded_inception(), Path(URL_INCEPTION_V3).name
    if not path.is_file():
        mend = f"give torch-fidelity's {own} ({URL_INCEPTION_V3}), or set evaluation.extractor: clip"
        raise WeightsError(f"evaluation.extractor_weights={path}: no such file; {mend}, or use the profile demo")
    layers, digest = ["2048", "logits_unbiased"], file_digest(path)[:8]
    key = "inception-v3-compat" if value_range == "standard" else "inception-v3-compat-published"
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # the constructor would run pickled code
        with torch.random.fork_rng(devices=[]):  # it draws weights before it reads them
            module = FeatureExtractorInceptionV3(key, layers, feature_extractor_weights_path=str(path))
    except Exception as error:  # unpickling, zip and shape errors share no base class
        problem = f"is no intact file of torch-fidelity's Inception ({brief(error)[:120]})"
        raise WeightsError(f"{path}: {problem}; copy {own} again (pickled code is never run)") from error
    if value_range == "published":
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        # The network's own first step gives (byte - 128) / 128. Resizing is linear, so this may come after.
        module.Conv2d_1a_3x3.register_forward_pre_hook(
            lambda _, inputs: (published_range((inputs[0] * 128 + 128) / 127.5 - 1, mean, std),)
        )
    official, key, widths = digest == OFFICIAL_INCEPTION, f"{key}-{digest}", {"features": 2048, "logits": 1008}
    name = ("Inception-v3" if official else f"Inception-v3, other weights {digest}") + RANGES[value_range]
    return Extractor(name, key, key, module.to(device), widths, INCEPTION_NAMES if official else NAMES)


def cached_inception() -> Path:
    """Where torch's cache keeps torch-fidelity's weights, be they there or not."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name


def _downloaded_inception() -> Path:
    """The weights in torch's cache, fetched at first use and compared with their hash."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path, url = cached_inception(), URL_INCEPTION_V3
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=OFFICIAL_INCEPTION, progress=False)
        except Exception as error:  # urllib, sockets, the hash, a read-only cache
            raise WeightsError(
                f"Inception weights are not here and could not be downloaded: fetch {url} where there is network, copy "
                "it here and set evaluation.extractor_weights: FILE; or use the profile demo, which needs no download "
                f"({type(error).__name__}: {brief(error)[:120]})"
            ) from error
    return path


def choose_extractor(
    settings: Settings, prepared: Prepared, clip: FrozenClip, independent: FrozenClip | None = None
) -> Extractor:
    """What `settings.evaluation` asks for: Inception, or the independent CLIP (else `clip`) with test captions."""
    e = settings.evaluation
    if e.extractor == "inception":
        return inception_extractor(e.extractor_weights, e.inception_range, clip.mean.device)
    chosen = independent if independent is not None else clip
    return clip_extractor(chosen, class_captions(prepared.test), e.inception_range)
