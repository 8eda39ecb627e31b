"""The attribute classifier of the generated sets: a small CNN that reads their attributes off an image.

It is trained on real training images alone, never on generated ones or captions. `judge.json` keeps its accuracy on
real test images: a score on generated images means something only next to that. An attribute counts as right only where
its gate (`ratlip.scores.gate`) finds an object with a shape at all.

A caption may name a part of the attributes: right is then what agrees in those named (`judge_captions`), in the reading
that agrees in most where an image has two objects (`ratlip.data.facts`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ratlip.cache import check_archive, differences
from ratlip.data import facts
from ratlip.data.batches import real_images
from ratlip.data.generated import generated_set
from ratlip.data.prepared import Prepared, Split
from ratlip.data.synthetic import ATTRIBUTES
from ratlip.errors import DataError, WeightsError
from ratlip.files import atomic_path, read_json, write_json
from ratlip.progress import bar
from ratlip.scores import gate

SEED = 0
WIDTH = 96  # of the last hidden layer


class Judge(nn.Module):
    """Three strided convolutions and one classifying head an attribute; `gate`: the same, for "is there an object".

    Two objects have more to read: then a second convolution at each size, and twice the width at the end.
    """

    def __init__(self, image_size: int, channels: int = 24, values: facts.Values = ATTRIBUTES, gate: bool = True):
        super().__init__()
        self.values = {name: tuple(each) for name, each in values.items()}
        deep, side = facts.two_objects(values), -(-image_size // 8)
        widths, last = (3, channels, 2 * channels, (2 + 2 * deep) * channels), (1 + deep) * WIDTH
        layers: list[nn.Module] = []
        for a, b in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
            layers += [nn.Conv2d(b, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()] if deep else []
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * side * side, last), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(last, len(each)) for name, each in self.values.items()})
        if deep:
            self.trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter less time
        self.gate: Any = Judge(image_size, values={"object": ("absent", "present")}, gate=False) if gate else None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B,3,S,S) in [-1,1] -> one tensor of logits (B, number of values) for each attribute."""
        trunk = self.trunk(images)
        return {name: head(trunk) for name, head in self.heads.items()}


def attribute_targets(attributes: list[dict[str, str]], values: facts.Values = ATTRIBUTES) -> dict[str, Tensor]:
    """Known attributes of N images -> int64 (N,) for each attribute."""
    return {n: torch.tensor([each.index(known[n]) for known in attributes]) for n, each in values.items()}


@torch.no_grad()
def judge_codes(judge: Judge, images: Tensor) -> np.ndarray:
    """What the judge finds in images (N,3,S,S): the numbers of the values, int16 (N,K); UNNAMED where no object is."""
    parts = [part.clamp(-1, 1) for part in images.split(256)]
    found = [torch.stack([logits.argmax(1) for logits in judge(part).values()], dim=1) for part in parts]
    if judge.gate is not None:
        there = [judge.gate(part)["object"].argmax(1) == 1 for part in parts]
        found = [each.where(seen[:, None], facts.UNNAMED) for each, seen in zip(found, there, strict=True)]
    return torch.cat(found).cpu().numpy().astype(np.int16)


def best_readings(found: np.ndarray, says: np.ndarray, values: facts.Values) -> tuple[np.ndarray, np.ndarray]:
    """Of what was found (N,K), the reading that agrees with most of what is said (N,K): (N,K), and whether: bool (N,K).

    What is not named always agrees. The first of equally good readings is taken.
    """
    shows = facts.readings(found, facts.coding(values))
    agreed = (says[:, None] == facts.UNNAMED) | (says[:, None] == shows)
    rows = np.arange(len(found)), agreed.sum(axis=2).argmax(axis=1)
    return shows[rows], agreed[rows]


def judge_captions(judge: Judge, images: Tensor, says: np.ndarray) -> np.ndarray:
    """Whether the judge finds in images (N,3,S,S) what their captions say (N,K) (`facts.says`): bool (N,K).

    What a caption does not name is not wrong: a caption's image is right where its row is all true.
    """
    return best_readings(judge_codes(judge, images), says, judge.values)[1]


def judge_right(judge: Judge, images: Tensor, attributes: list[dict[str, str]]) -> dict[str, Tensor]:
    """For each attribute, whether the judge finds the named value in each image (N,3,S,S): bool (N,)."""
    found = torch.from_numpy(judge_codes(judge, images))
    targets = attribute_targets(attributes, judge.values)
    return {name: found[:, column] == target for column, (name, target) in enumerate(targets.items())}


def judge_shares(judge: Judge, images: Tensor, attributes: list[dict[str, str]]) -> dict[str, float]:
    """Share of images (N,3,S,S) in which the judge finds what the caption names, for each attribute."""
    return {name: float(hits.float().mean()) for name, hits in judge_right(judge, images, attributes).items()}


def chance(values: facts.Values = ATTRIBUTES) -> dict[str, float]:
    """Share that guessing would get right, for each attribute."""
    return {name: 1 / len(each) for name, each in values.items()}


def load_judge(
    prepared: Prepared, folder: str | Path, *, crop: int, image_size: int, steps: int = 600, progress: bool = True
) -> Judge:
    """The judge for a prepared generated set, trained at its first use and kept in `folder`.

    Raises DataError where no attributes are known, WeightsError where the kept file is damaged.
    """
    if prepared.train.attributes is None:
        raise DataError(f"{prepared.folder}: the judge needs images whose attributes are known (a generated set)")
    note, weights = Path(folder) / "judge.json", Path(folder) / "judge.pt"
    data = prepared.manifest["content_sha256"]
    identity = dict(data=data, crop=crop, image_size=image_size, steps=steps, seed=SEED, gate=gate.VERSION)
    judge, test = Judge(image_size, values=generated_set(prepared).values), prepared.test
    mend = "delete the folder and the judge is trained anew"
    try:
        kept = dict(read_json(note)["identity"]) if note.is_file() else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{note}: not readable ({type(error).__name__}); {mend}") from error
    if kept is not None and not differences(kept, identity):
        try:
            judge.load_state_dict(torch.load(weights, weights_only=True))
            check_archive(weights)
        except Exception as error:  # a torn file raises a dozen classes
            raise WeightsError(f"{weights}: not readable ({type(error).__name__}); {mend}") from error
        return judge.eval()
    _fit(judge, prepared.train, crop, image_size, steps, progress)
    images = real_images(prepared.train, range(len(prepared.train)), crop, image_size)
    gate.fit(judge.gate, images, SEED, progress)
    seen = real_images(test, range(len(test)), crop, image_size)
    accuracy, passed = judge_shares(judge, seen, test.attributes or []), gate.shares_passed(judge.gate, seen, SEED)
    with atomic_path(weights) as draft:
        torch.save(judge.state_dict(), draft)
    write_json(note, {"identity": identity, "accuracy_on_real_test_images": accuracy, "object_found_in": passed})
    return judge


def _fit(judge: Judge, split: Split, crop: int, image_size: int, steps: int, progress: bool) -> None:
    rng, generator = np.random.default_rng([SEED, 31]), torch.Generator().manual_seed(SEED)
    images, targets = (
        real_images(split, range(len(split)), crop, image_size),
        attribute_targets(split.attributes or [], judge.values),
    )
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
