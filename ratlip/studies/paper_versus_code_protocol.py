"""Notebook 07: where paper and published code part in images, scores, training and files.

Difference 5, real images shrunk by nearest: `drawn` to `told_apart`; 6, the range that Inception sees: to `distances`;
7, mismatched sentences in a batch of one: to `matching_learned`; 8, `calls_today`; 10, `surviving_files`; 11, unused
parameters: `without_gradient`, `dead_parameters`; 12, `resumed_runs`. (9, a dropped batch, needs no code.)
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import scipy.linalg
import torch
from torch import Tensor
from torch.nn import functional as F

from ratlip.clip.frozen import FrozenClip, with_normalisation
from ratlip.clip.pairs import caption_facts
from ratlip.data import synthetic
from ratlip.data.batches import Batches, real_images, to_network
from ratlip.data.prepared import Prepared
from ratlip.networks import Discriminator
from ratlip.networks.losses import discriminator_loss, hinge
from ratlip.plots.pictures import save_images
from ratlip.scores.evaluation import embed, test_pairs
from ratlip.scores.extractors import published_range
from ratlip.scores.metrics import frechet_distance
from ratlip.settings import Settings, load_settings
from ratlip.training.generation import file_names, load_generator
from ratlip.training.loop import train
from ratlip.training.session import build_networks
from ratlip.training.step import mismatch
from ratlip.workspace import Workspace


def drawn(size: int, count: int, variant: int = 0) -> Tensor:
    """Pictures of the generated set at any size: uint8 (count,3,size,size).

    Picture i has the same attributes at every size and in every `variant`, and a position and shade of its own.
    """
    known = synthetic.combinations()["train"]
    streams = [np.random.default_rng([75, variant, size, i]) for i in range(count)]
    pictures = [synthetic.render(known[i % len(known)], size, stream)[0] for i, stream in enumerate(streams)]
    return torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy())


def radial_spectrum(images: Tensor) -> Tensor:
    """Mean power of each spatial frequency 0 .. S/2 - 1 (cycles an image), all directions: (B,S/2).

    images (B,3,S,S) in [-1,1]; of their grey value, under a Hann window, without its mean.
    """
    grey, size = images.mean(1), images.shape[-1]
    window = torch.hann_window(size)
    grey = (grey - grey.mean((1, 2), keepdim=True)) * window[:, None] * window
    power = torch.fft.fftshift(torch.fft.fft2(grey).abs().square(), dim=(1, 2)).flatten(1)
    away = torch.arange(size) - size // 2
    radius = (away[:, None].square() + away.square()).sqrt().round().long().clamp(max=size // 2).flatten()
    total = torch.zeros(len(images), size // 2 + 1).index_add_(1, radius, power)
    return (total / torch.bincount(radius))[:, : size // 2]


def comb(images: Tensor, period: int = 7) -> Tensor:
    """Share of the squared steps between neighbours that lies at each position modulo `period`: (B,period).

    images (B,3,S,S). 256 -> 224 by nearest leaves out every eighth row and column, so that every seventh step of the
    result is a double one. Without that, each share is near 1/period.
    """
    grey = images.mean(1)
    steps = grey.diff(dim=2).square().mean(1) + grey.diff(dim=1).square().mean(2)
    whole = steps.shape[1] // period * period
    shares = steps[:, :whole].unflatten(1, (-1, period)).sum(1)
    return shares / shares.sum(1, keepdim=True)


def told_apart(first: Tensor, second: Tensor, ridge: float = 10.0) -> float:
    """Held-out accuracy (0 to 1) of a linear classifier of two sets of features (N,F); guessing gives 0.5.

    Ridge regression of the class on the standardised features, fitted to every other row.
    """
    x = torch.cat([first, second]).double()
    y = torch.cat([torch.ones(len(first)), -torch.ones(len(second))]).double()
    fit = torch.arange(len(x)) % 2 == 0
    x = (x - x[fit].mean(0)) / x[fit].std(0).clamp(min=1e-12)
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    gram = x[fit].T @ x[fit] + ridge * torch.eye(x.shape[1]).double()
    weights = torch.linalg.solve(gram, x[fit].T @ y[fit])
    return float(((x[~fit] @ weights).sign() == y[~fit]).double().mean())


def through_transform_input(images: Tensor) -> Tensor:
    """Images (B,3,S,S) in [-1,1] -> what reaches Inception as published, within about [-0.19, 0.43].

    torchvision's ImageNet weights expect pixels normalised by ImageNet's mean and standard deviation, which its own
    `transform_input` (run here without the network) turns into [-1,1]. Pixels in [0,1] come out in this range.
    """
    from torchvision.models.inception import Inception3  # here, because it takes 1.2 s and nothing else needs it

    return Inception3._transform_input(SimpleNamespace(transform_input=True), (images + 1) / 2)


def in_both_ranges(clip: FrozenClip, images: Tensor) -> dict[str, Tensor]:
    """Embeddings (N,E) by `clip` of images (N,3,S,S) in [-1,1], in the "standard" and "published" range."""
    clip = with_normalisation(clip, "standard")
    narrow = published_range(images, clip.mean.cpu(), clip.std.cpu())
    return {"standard": embed(clip, images), "published": embed(clip, narrow)}


def real_in_both_ranges(clip: FrozenClip, prepared: Prepared, settings: Settings, count: int) -> dict[str, Tensor]:
    """`in_both_ranges` of `count` real training images, spread over the split (or of all that there are)."""
    numbers = np.linspace(0, len(prepared.train) - 1, min(count, len(prepared.train))).astype(int)
    return in_both_ranges(clip, real_images(prepared.train, numbers, settings.data.crop, settings.model.image_size))


def distances(features: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """Frechet distance in either range; not FID, for the extractor is a CLIP."""
    return {name: frechet_distance(each, reference[name]) for name, each in features.items()}


def merged_as_published(arguments: Sequence[str], settings: dict) -> dict:
    """Settings as a command line with defaults of its own gives them, laid over those of a yaml file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch_size", type=int, default=1)
    return {**settings, **vars(parser.parse_args(list(arguments)))}


def lowest_hinge(same: bool) -> float:
    """The lowest hinge(real) + hinge(mismatched) / 2 that any logits reach; `same`: both pairs are one."""
    logits = torch.linspace(-3, 3, 601)
    real, other = F.relu(1 - logits), F.relu(1 + logits) / 2
    return float((real + other).min() if same else real.min() + other.min())


def matching_learned(workspace: Workspace, batch_size: int, images: int = 1600, seed: int = 0) -> dict[str, float]:
    """What D learns about matching from `images` images in batches of one size, mismatched as published.

    Trained on its two hinge terms of real images alone. "same": share of the mismatched sentences that were the
    image's own; "right": share of test images with a higher logit for their own sentence than for that of the next
    test image (a tie counts half; guessing gives 0.5).
    """
    prepared, clip, sentences = workspace.prepared, workspace.clip, workspace.sentences()
    s, device = workspace.settings.model_copy(update={"seed": seed}), clip.mean.device
    facts = torch.from_numpy(caption_facts(prepared.train))
    discriminator = build_networks(s, clip)[1].to(device)
    optimiser = torch.optim.Adam(discriminator.parameters(), s.training.lr_d, betas=s.training.betas)
    data = Batches(prepared.train, crop=s.data.crop, flip=s.data.flip, seed=seed, batch_size=batch_size)
    same, right = [], []

    def logits(images: Tensor, *sentences: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            features, _ = clip.features(images.to(device), s.model.feature_blocks, embedding=False)
        return discriminator(features, *sentences)

    for step in range(-(-images // batch_size)):
        batch = data[step]
        own = sentences[batch["caption"]]
        other = mismatch(batch["caption"], sentences, facts, "published", seed, step)
        same.append(float((own == other).all(1).float().mean()))
        true, false = logits(to_network(batch["images"], s.model.image_size), own.to(device), other.to(device))
        optimiser.zero_grad()
        (hinge(true, real=True) + hinge(false, real=False) / 2).backward()
        optimiser.step()
    numbers, captions = test_pairs(prepared, min(240, len(prepared.test)))
    shown = real_images(prepared.test, numbers, s.data.crop, s.model.image_size)
    sentence = clip.embed_text(captions)
    kept = [i for i in range(len(captions) - 1) if captions[i] != captions[i + 1]]
    for rows in torch.tensor(kept).split(64):
        with torch.no_grad():
            true, false = logits(shown[rows], sentence[rows], sentence[rows + 1])
        right.append((true > false).float() + (true == false).float() / 2)
    return {"same": float(np.mean(same)), "right": float(torch.cat(right).mean())}


def calls_today() -> dict[str, str]:
    """What the calls on which the published code rests do here: "works", "works, to go" or "fails"."""
    calls = {
        "torch.distributed.get_world_size() in a single process": lambda: torch.distributed.get_world_size(),
        "tensor.cuda() without a GPU": lambda: torch.zeros(1).cuda(torch.cuda.device_count()),  # one that is not there
        "pandas.read_csv(.., delim_whitespace=True)": lambda: pd.read_csv(io.StringIO("1 2\n"), delim_whitespace=True),
        "scipy.linalg.sqrtm(.., disp=False)": lambda: scipy.linalg.sqrtm(np.eye(2), disp=False),
    }
    return {name: _outcome(call) for name, call in calls.items()}


def _outcome(call: Callable[[], object]) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except Exception:
            return "fails"
    going = any(issubclass(each.category, (DeprecationWarning, FutureWarning)) for each in caught)
    return "works, to go" if going else "works"


def surviving_files(images: Tensor, names: str, batch_size: int) -> int:
    """How many files there are after images (N,3,S,S) were saved by the names of `generation.file_names`."""
    with tempfile.TemporaryDirectory() as folder:
        save_images(images, folder, file_names(len(images), 1, names, batch_size))
        return len(list(Path(folder).glob("*.png")))


def without_gradient(discriminator: Discriminator, clip: FrozenClip, batch_size: int = 4) -> dict[str, int]:
    """Parameters of D that a whole D loss, penalty included, gives no gradient: name -> their number."""
    draw, device = torch.Generator().manual_seed(0), clip.mean.device
    size = (batch_size, len(discriminator.blocks) + 1, clip.width, clip.grid, clip.grid)
    real, fake = torch.randn(2, *size, generator=draw).to(device)
    sentence = torch.randn(batch_size, clip.embed_dim, generator=draw).to(device)
    discriminator.zero_grad()
    discriminator_loss(discriminator, real, fake, sentence, sentence.roll(-1, 0)).total.backward()
    return {name: p.numel() for name, p in discriminator.named_parameters() if p.grad is None}


def dead_parameters(discriminator: Discriminator) -> int:
    """Numbers in shortcuts that are built where channels are equal, hence never used."""
    blocks = (*discriminator.blocks, discriminator.main)
    unused = [block.shortcut for block in blocks if block.shortcut is not None and not block.mixes]
    return sum(p.numel() for shortcut in unused for p in shortcut.parameters())


def resumed_runs(steps: int = 8, stopped: int = 4) -> dict[str, float]:
    """Runs of the profile smoke that were stopped after `stopped` of `steps` steps and resumed each way.

    `training.resume` -> distance of the generator's final parameters from those of a run that never stopped, as a
    share of the distance that the steps after the stop move them.
    """
    overrides = {"training.steps": steps, "training.ema": 0, "training.sample_every": 1000}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        workspace = Workspace.of(load_settings("smoke", overrides), root, progress=False)
        prepared, clip, sentences = workspace.prepared, workspace.clip, workspace.sentences()

        def trained(name: str, way: str = "exact", **options) -> Tensor:
            settings = load_settings("smoke", {**overrides, "training.resume": way})
            options |= {"accelerator": "cpu", "progress": False}
            run = train(settings, prepared, clip, sentences, root / name, **options)
            return torch.cat([p.detach().flatten() for p in load_generator(run, settings, clip).parameters()])

        whole = trained("whole")
        for _ in range(stopped):  # each sitting saves and stops after one step
            half = trained("stopped", end=0.0)
        changes = {}
        for way in ("exact", "published"):
            (root / way).mkdir()
            shutil.copy(root / "stopped" / "checkpoint.pt", root / way)
            changes[way] = float((trained(way, way) - whole).norm() / (whole - half).norm())
    return changes
