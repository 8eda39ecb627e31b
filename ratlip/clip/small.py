"""Training the small CLIP on the captions of a prepared data set (profiles with `clip.source: train`)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from safetensors.torch import save_file
from torch import Tensor, nn

from ratlip.cache import check_archive, claim, weights_digest
from ratlip.clip.frozen import OPENAI_MEAN, OPENAI_STD, FrozenClip, normalise
from ratlip.clip.loading import build_small_clip, load_clip
from ratlip.clip.pairs import PairBatches
from ratlip.clip.pairs import partial as names_a_part
from ratlip.clip.towers import ImageTower, SmallClip
from ratlip.clip.vocabulary import Vocabulary
from ratlip.data.batches import random_crop, to_network
from ratlip.data.generated import generated_set
from ratlip.data.prepared import Prepared, Split
from ratlip.errors import DataError, RunError, WeightsError
from ratlip.fast.tower import accelerate_tower
from ratlip.files import atomic_path, write_json, write_text
from ratlip.progress import bar
from ratlip.settings import ClipSettings
from ratlip.settings.sections import CAME_LATER

# The fields of ClipSettings on which the shape of the small CLIP depends, and those on which its weights do.
ARCHITECTURE = "patch_size width layers heads text_width text_layers text_heads embed_dim context_length".split()
TRAINED_BY = (
    *ARCHITECTURE,
    "steps",
    "batch_size",
    "lr",
    "weight_decay",
    "warmup",
    "hard_negatives",
    "seed",
    *CAME_LATER,
)
LOG_EVERY, CHECKPOINT_EVERY = 25, 200  # steps; a checkpoint falls on a logged step
MASKED_UNTIL = 0.8  # share of the steps that are done on some of the patches, where the settings ask for it


def contrastive_loss(images: Tensor, texts: Tensor, logit_scale: Tensor, positives: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy where an image may have several right texts in the batch, and the reverse.

    `images` (B,E), `texts` (C,E) of unit length; `positives` bool (B,C): which texts are true of which image, one of
    the first B at least of each. Each row's target is spread evenly over its positives: with none off the diagonal this
    is the loss of Radford et al. (2021). Texts that are true of no image are wrong answers alone, and ask nothing.
    """
    logits, right = logit_scale * images @ texts.T, positives.float()
    asked = positives.any(0)
    to_text = F.cross_entropy(logits, right / right.sum(1, keepdim=True))
    to_image = F.cross_entropy(logits.T[asked], (right / right.sum(0).clamp(min=1)).T[asked])
    return (to_text + to_image) / 2


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up over `warmup` steps to `peak`, then half a cosine down to 0 at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_small_clip(
    prepared: Prepared,
    settings: ClipSettings,
    folder: Path | str,
    device: str | torch.device = "cpu",
    *,
    image_size: int,
    crop: int | None = None,
    flip: bool = False,
    progress: bool = True,
) -> FrozenClip:
    """Train a small CLIP on `prepared.train`, go on where a training was interrupted, or load a finished one.

    `image_size`: its input side in pixels; `crop`: side of the random square cut from the stored images (default
    `image_size`) and resized to it; `flip`: mirror half of them. Writes into `folder`: settings.json, vocabulary.json,
    arch.json, metrics.jsonl, training.pt (checkpoint, while it lasts), clip.safetensors and, last, manifest.json. On
    the CPU the weights are a function of settings and data alone, an interruption included (with as many threads).
    Raises WeightsError where `folder` belongs to another training, DataError where images are smaller than the crop,
    RunError where the loss is no number.
    """
    folder, split = Path(folder), prepared.train
    view: dict[str, Any] = dict(image_size=image_size, crop=crop or image_size, flip=flip)
    trained_by = {name: getattr(settings, name) for name in TRAINED_BY}
    trained_by = {name: value for name, value in trained_by.items() if (name, value) not in CAME_LATER.items()}
    identity = dict(settings=trained_by, **view, data=prepared.manifest["content_sha256"])
    claim(folder, identity, what="a small CLIP", error=WeightsError, file="settings.json", sign="manifest.json")
    if (folder / "manifest.json").is_file():
        return load_clip(settings, folder, device)
    if view["crop"] > (side := prepared.manifest["resize"]):
        why = f"its images have {side} px, too few to cut {view['crop']} px"
        raise DataError(f"{prepared.folder}: {why}; lower data.crop, or prepare with a larger data.resize")
    vocabulary = Vocabulary.build(split.all_captions, settings.context_length)
    vocabulary.save(folder / "vocabulary.json")
    arch = dict(image_size=image_size, **{n: trained_by[n] for n in ARCHITECTURE}, vocab_size=len(vocabulary))
    write_json(folder / "arch.json", arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model: Any = build_small_clip(**arch).to(device)
    for tower in (model.visual, model):  # the same numbers up to rounding; its weights may learn
        accelerate_tower(tower)
    origin = generated_set(prepared) if names_a_part(split) else None
    batches = PairBatches(split, settings.batch_size, settings.seed, settings.hard_negatives, origin)
    _fit(model, vocabulary, batches, partial(_crops, split, **view), settings, folder, progress)
    with atomic_path(folder / "clip.safetensors") as draft:
        save_file({name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}, draft)
    made = dict(
        fingerprint=weights_digest(model),
        hard_negatives_from=batches.origin,
        train_images=len(split),
        parameters=sum(p.numel() for p in model.parameters()),
        words=len(vocabulary.words),
        cut_captions=vocabulary.share_cut(split.all_captions),
        versions={"torch": torch.__version__},
    )
    write_json(folder / "manifest.json", identity | made)
    (folder / "training.pt").unlink(missing_ok=True)
    return load_clip(settings, folder, device)


def _fit(
    model: Any, words: Vocabulary, batches: PairBatches, crops: Callable, s: ClipSettings, folder: Path, progress: bool
) -> None:
    """Train `model` in place from the last checkpoint in `folder`, or from the start."""
    device, steps, optimizers = model.logit_scale.device, s.steps, _optimizers(model, s)
    mean, std = (torch.tensor(c, device=device).view(1, 3, 1, 1) for c in (OPENAI_MEAN, OPENAI_STD))
    first, log = _resume(folder, model, optimizers)
    shown: dict[str, Any] = dict(desc="small CLIP", initial=first, total=steps, unit="step", enabled=progress)
    losses, since = [], time.perf_counter()
    for step in (steps_bar := bar(range(first, steps), **shown)):
        chosen, captions, right, rng = batches(step)
        images = normalise(crops(chosen, rng=rng).to(device), mean, std)
        tokens, positives = words(captions).to(device), torch.from_numpy(right).to(device)
        if batches.made is None:
            positives |= (tokens[:, None] == tokens).all(-1)
        model.visual.seen = (
            _some_patches(model.visual, len(chosen), s.masked, rng) if step < MASKED_UNTIL * steps else None
        )
        image_embeddings, text_embeddings, scale = model(images, tokens)
        model.visual.seen = None
        loss = contrastive_loss(image_embeddings, text_embeddings, scale, positives)
        rate = learning_rate(step, steps, s.warmup, s.lr)
        for optimizer in optimizers:
            for part in optimizer.param_groups:
                part["lr"] = rate
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # Radford et al. (2021), section 2.5
        losses.append(loss.detach())
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            mean_loss = torch.stack(losses).mean().item()
            speed = round(len(losses) * len(chosen) / (time.perf_counter() - since), 1)
            row = dict(step=step + 1, loss=mean_loss, lr=rate, logit_scale=model.logit_scale.exp().item())
            log.append(row | dict(images_per_s=speed))
            write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in log))
            steps_bar.set_postfix(loss=f"{mean_loss:.3f}", images_per_s=speed)
            if not math.isfinite(mean_loss):
                mend = f"lower clip.lr (now {s.lr}) or raise clip.warmup (now {s.warmup})"
                raise RunError(f"{folder}: the loss of the small CLIP is {mean_loss} at step {step + 1}; {mend}")
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
                state = dict(model=model.state_dict(), step=step + 1, log=log)
                state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
                with atomic_path(folder / "training.pt") as draft:
                    torch.save(state, draft)
            losses, since = [], time.perf_counter()


def _some_patches(visual: ImageTower, count: int, masked: float, rng: Generator) -> Tensor | None:
    """For each of `count` images, the patches (count,k) that are left of all but a share `masked`; None: all of them.

    Half the patches are half the work for about the same lesson (Li et al.: Scaling Language-Image Pre-training via
    Masking, 2023).
    """
    patches = visual.grid_size[0] * visual.grid_size[1]
    left = max(1, round((1 - masked) * patches))
    return torch.from_numpy(rng.random((count, patches)).argsort(axis=1)[:, :left]) if masked else None


def _crops(split: Split, chosen: np.ndarray, crop: int, image_size: int, flip: bool, rng: Generator) -> Tensor:
    """Random squares of side `crop`, half of them mirrored if `flip`: float32 (B,3,S,S) in [-1,1] on the CPU."""
    draws = rng.random((len(chosen), 3))
    cut = [random_crop(split.image(int(i)), crop, flip, draw) for i, draw in zip(chosen, draws, strict=True)]
    return to_network(torch.from_numpy(np.stack(cut)), image_size)


def _optimizers(model: SmallClip, settings: ClipSettings) -> list[torch.optim.Optimizer]:
    """AdamW as open_clip sets it up: no decay of biases, norms, embeddings and the temperature.

    With `optimiser: muon`, the weight matrices of the blocks are left to Muon, at AdamW's rate and decay (Liu et al.:
    Muon is Scalable for LLM Training, 2025): half as many steps to the same accuracy.
    """
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    blocks = [p for name, p in learning if p.ndim == 2 and "resblocks" in name]
    plain = [p for name, p in learning if p.ndim < 2 or "embedding" in name]
    taken = {id(p) for p in [*plain, *(blocks if settings.optimiser == "muon" else [])]}
    decayed = [p for _, p in learning if id(p) not in taken]
    parts: list[dict] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    how: dict[str, Any] = dict(lr=settings.lr, weight_decay=settings.weight_decay)
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(parts, betas=(0.9, 0.98), **how)]
    if settings.optimiser == "muon":
        found.append(torch.optim.Muon(blocks, adjust_lr_fn="match_rms_adamw", **how))
    return found


def _resume(folder: Path, model: SmallClip, optimizers: list[torch.optim.Optimizer]) -> tuple[int, list[dict]]:
    """Load the last checkpoint, if there is one: the step to go on with and what was logged until then."""
    path = folder / "training.pt"
    if not path.is_file():
        return 0, []
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        check_archive(path)
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        return state["step"], state["log"]
    except Exception as error:
        raise WeightsError(f"{path} is damaged ({type(error).__name__}); remove it to start again") from error
