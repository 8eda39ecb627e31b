"""The judge of the generated set: a small CNN that reads the attributes of `data.synthetic` off an image.

It is trained on real training images alone, never on generated ones and never on captions, so it cannot be
flattered by what the generator was trained on. `judge()` reports its own accuracy on real test images: a
score on generated images means something only next to that.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ratlip.data.batches import real_images
from ratlip.data.synthetic import ATTRIBUTES
from ratlip.errors import DataError, WeightsError
from ratlip.files import atomic_path, read_json, write_json
from ratlip.progress import bar


class Judge(nn.Module):
    """Three strided convolutions and one classifying head an attribute."""

    def __init__(self, image_size: int, channels: int = 24):
        super().__init__()
        widths = (3, channels, 2 * channels, 2 * channels)
        layers = []
        for a, b in zip(widths, widths[1:]):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        side = -(-image_size // 8)
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * side * side, 96), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(96, len(values)) for name, values in ATTRIBUTES.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B,3,S,S) in [-1,1] -> one tensor of logits (B, number of values) for each attribute."""
        trunk = self.trunk(images)
        return {name: head(trunk) for name, head in self.heads.items()}


def attribute_targets(attributes: list[dict[str, str]]) -> dict[str, Tensor]:
    """Known attributes of N images -> int64 (N,) for each attribute."""
    return {
        name: torch.tensor([values.index(each[name]) for each in attributes]) for name, values in ATTRIBUTES.items()
    }


def judge_shares(judge: Judge, images: Tensor, attributes: list[dict[str, str]]) -> dict[str, float]:
    """Share of images (N,3,S,S) in which the judge finds what the caption names, for each attribute."""
    right = judge_right(judge, images, attributes)
    return {name: float(hits.float().mean()) for name, hits in right.items()}


@torch.no_grad()
def judge_right(judge: Judge, images: Tensor, attributes: list[dict[str, str]]) -> dict[str, Tensor]:
    """For each attribute, whether the judge finds the named value in each image: bool (N,)."""
    targets = attribute_targets(attributes)
    parts = [judge(part.clamp(-1, 1)) for part in images.split(256)]
    return {
        name: torch.cat([part[name] for part in parts]).argmax(dim=1).cpu() == target
        for name, target in targets.items()
    }


def chance() -> dict[str, float]:
    """Share that guessing would get right, for each attribute."""
    return {name: 1 / len(values) for name, values in ATTRIBUTES.items()}


def load_judge(
    prepared, folder: str | Path, *, crop: int, image_size: int, steps: int = 600, seed: int = 0, progress: bool = True
) -> Judge:
    """The judge for a prepared generated set, trained on its first use and kept in `folder`."""
    folder = Path(folder)
    if prepared.train.attributes is None:
        raise DataError(f"{prepared.folder}: the judge needs images whose attributes are known (the generated set)")
    identity = {
        "data": prepared.manifest["content_sha256"],
        "crop": crop,
        "image_size": image_size,
        "steps": steps,
        "seed": seed,
    }
    judge = Judge(image_size)
    if (folder / "judge.json").is_file() and read_json(folder / "judge.json")["identity"] == identity:
        try:
            judge.load_state_dict(torch.load(folder / "judge.pt", weights_only=True))
        except Exception as error:  # a torn file raises a dozen classes
            raise WeightsError(
                f"{folder / 'judge.pt'}: not readable ({type(error).__name__}); "
                "delete the folder and the judge is trained anew"
            ) from error
        return judge.eval()
    _fit(judge, prepared.train, crop=crop, image_size=image_size, steps=steps, seed=seed, progress=progress)
    accuracy = judge_shares(
        judge, real_images(prepared.test, range(len(prepared.test)), crop, image_size), prepared.test.attributes
    )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "judge.pt") as draft:
        torch.save(judge.state_dict(), draft)
    write_json(folder / "judge.json", {"identity": identity, "accuracy_on_real_test_images": accuracy})
    return judge


def _fit(judge: Judge, split, *, crop: int, image_size: int, steps: int, seed: int, progress: bool) -> None:
    rng = np.random.default_rng([seed, 31])
    generator = torch.Generator().manual_seed(seed)
    images = real_images(split, range(len(split)), crop, image_size)
    targets = attribute_targets(split.attributes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in judge.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    optimiser = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    judge.train()
    for _ in bar(range(steps), desc="judge", enabled=progress):
        chosen = torch.from_numpy(rng.integers(0, len(split), 64))
        x = images[chosen]
        # Noise of varying strength: generated images are less clean than rendered ones.
        strength = 0.1 * torch.rand(len(x), 1, 1, 1, generator=generator)
        x = x + strength * torch.randn(x.shape, generator=generator)
        loss = sum(F.cross_entropy(logits, targets[name][chosen]) for name, logits in judge(x).items())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    judge.eval()
