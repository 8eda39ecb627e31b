"""The attribute classifier of the generated set: a small CNN that reads the attributes of `data.synthetic`.

It is trained on real images alone, never on generated ones or captions. `judge.json` keeps its accuracy on real test
images: a score on generated images means something only next to that.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ratlip.cache import differences
from ratlip.data.batches import real_images
from ratlip.data.prepared import Prepared, Split
from ratlip.data.synthetic import ATTRIBUTES
from ratlip.errors import DataError, WeightsError
from ratlip.files import atomic_path, read_json, write_json
from ratlip.progress import bar

SEED = 0
WIDTH = 96  # of the last hidden layer


class Judge(nn.Module):
    """Three strided convolutions and one classifying head an attribute."""

    def __init__(self, image_size: int, channels: int = 24):
        super().__init__()
        widths, side = (3, channels, 2 * channels, 2 * channels), -(-image_size // 8)
        layers: list[nn.Module] = []
        for a, b in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * side * side, WIDTH), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(values)) for name, values in ATTRIBUTES.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B,3,S,S) in [-1,1] -> one tensor of logits (B, number of values) for each attribute."""
        trunk = self.trunk(images)
        return {name: head(trunk) for name, head in self.heads.items()}


def attribute_targets(attributes: list[dict[str, str]]) -> dict[str, Tensor]:
    """Known attributes of N images -> int64 (N,) for each attribute."""
    return {n: torch.tensor([values.index(each[n]) for each in attributes]) for n, values in ATTRIBUTES.items()}


@torch.no_grad()
def judge_right(judge: Judge, images: Tensor, attributes: list[dict[str, str]]) -> dict[str, Tensor]:
    """For each attribute, whether the judge finds the named value in each image (N,3,S,S): bool (N,)."""
    parts = [judge(part.clamp(-1, 1)) for part in images.split(256)]
    found = {name: torch.cat([part[name] for part in parts]).argmax(dim=1).cpu() for name in ATTRIBUTES}
    return {name: found[name] == target for name, target in attribute_targets(attributes).items()}


def judge_shares(judge: Judge, images: Tensor, attributes: list[dict[str, str]]) -> dict[str, float]:
    """Share of images (N,3,S,S) in which the judge finds what the caption names, for each attribute."""
    return {name: float(hits.float().mean()) for name, hits in judge_right(judge, images, attributes).items()}


def chance() -> dict[str, float]:
    """Share that guessing would get right, for each attribute."""
    return {name: 1 / len(values) for name, values in ATTRIBUTES.items()}


def load_judge(
    prepared: Prepared, folder: str | Path, *, crop: int, image_size: int, steps: int = 600, progress: bool = True
) -> Judge:
    """The judge for a prepared generated set, trained at its first use and kept in `folder`.

    Raises DataError where no attributes are known, WeightsError where the kept file is damaged.
    """
    if prepared.train.attributes is None:
        raise DataError(f"{prepared.folder}: the judge needs images whose attributes are known (the generated set)")
    note, weights = Path(folder) / "judge.json", Path(folder) / "judge.pt"
    data = prepared.manifest["content_sha256"]
    identity = dict(data=data, crop=crop, image_size=image_size, steps=steps, seed=SEED)
    judge, test = Judge(image_size), prepared.test
    if note.is_file() and not differences(read_json(note)["identity"], identity):
        try:
            judge.load_state_dict(torch.load(weights, weights_only=True))
        except Exception as error:  # a torn file raises a dozen classes
            mend = "delete the folder and the judge is trained anew"
            raise WeightsError(f"{weights}: not readable ({type(error).__name__}); {mend}") from error
        return judge.eval()
    _fit(judge, prepared.train, crop, image_size, steps, progress)
    accuracy = judge_shares(judge, real_images(test, range(len(test)), crop, image_size), test.attributes or [])
    with atomic_path(weights) as draft:
        torch.save(judge.state_dict(), draft)
    write_json(note, {"identity": identity, "accuracy_on_real_test_images": accuracy})
    return judge


def _fit(judge: Judge, split: Split, crop: int, image_size: int, steps: int, progress: bool) -> None:
    rng, generator = np.random.default_rng([SEED, 31]), torch.Generator().manual_seed(SEED)
    images, targets = real_images(split, range(len(split)), crop, image_size), attribute_targets(split.attributes or [])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for layer in judge.modules():
            if callable(reset := getattr(layer, "reset_parameters", None)):
                reset()
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    judge.train()
    for _ in bar(range(steps), desc="judge", enabled=progress):
        chosen = torch.from_numpy(rng.integers(0, len(split), 64))
        x = images[chosen]
        # Noise of varying strength: generated images are less clean than rendered ones.
        strength = 0.1 * torch.rand(len(x), 1, 1, 1, generator=generator)
        x = x + strength * torch.randn(x.shape, generator=generator)
        losses = [F.cross_entropy(logits, targets[name][chosen]) for name, logits in judge(x).items()]
        loss = sum(losses, start=torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    judge.eval()
