"""Which images and captions meet in a batch of the small CLIP, and which of them are true of one another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ratlip.data.prepared import Split


def group_names(split: Split) -> list[str]:
    """For each image, a text that it shares with those whose captions are true of it too, its positives: its attributes
    where they are known, else its set of captions (template captions repeat).
    """
    if split.attributes is not None:
        return [json.dumps(a, sort_keys=True) for a in split.attributes]
    return ["\n".join(sorted(set(captions))) for captions in split.captions]


def caption_groups(split: Split) -> np.ndarray:
    """The group of each caption, int64 (captions,), in the order of `split.all_captions`: see `group_names`."""
    return np.repeat(_numbered(group_names(split)), np.diff(split.caption_offsets))


def neighbourhoods(split: Split) -> list[np.ndarray]:
    """Groupings, int64 (n,) each, that say which images are hard to tell apart: equal number = neighbours.

    With known attributes, one for each: images that agree in all the others. Else one, the class; none if unknown.
    """
    if (known := split.attributes) is not None:
        others = [[{k: v for k, v in a.items() if k != left_out} for a in known] for left_out in known[0]]
        return [_numbered([json.dumps(a, sort_keys=True) for a in each]) for each in others]
    labels = np.asarray(split.labels)
    return [_numbered(labels)] if (labels >= 0).all() and len(np.unique(labels)) > 1 else []


def _numbered(keys: Sequence | np.ndarray) -> np.ndarray:
    return np.unique(np.asarray(keys), return_inverse=True)[1].astype(np.int64).reshape(-1)


class PairBatches:
    """Which images, and which of their captions, make up the batch of a step: a pure function of (seed, step).

    Without hard negatives, images are drawn at random: colour and background tell most pairs apart, and a CLIP learns
    little else. With them, half of the batch is drawn at random, and each of the others is a neighbour (of a grouping
    of `neighbourhoods` drawn each time) of one of these, of another group.
    """

    def __init__(self, split: Split, batch_size: int, seed: int, hard_negatives: bool = True):
        self.captions, self.batch_size, self.seed = split.captions, batch_size, seed
        self.group = _numbered(group_names(split))
        groupings = neighbourhoods(split) if hard_negatives else []
        self.neighbourhoods = [_Neighbours(numbers, self.group) for numbers in groupings]
        self.origin = "none" if not groupings else "labels" if split.attributes is None else "attributes"

    def __call__(self, step: int) -> tuple[np.ndarray, list[str], np.random.Generator]:
        """Image numbers (B,), one caption of each, and the generator for whatever else is random in this step."""
        rng, total, size = np.random.default_rng([self.seed, step]), len(self.group), self.batch_size
        chosen = rng.choice(total, size, replace=size > total)
        if self.neighbourhoods:
            half = size // 2
            which = rng.integers(len(self.neighbourhoods), size=half)
            for number, neighbours in enumerate(self.neighbourhoods):
                positions = np.flatnonzero(which == number)
                chosen[size - half + positions] = neighbours.of(chosen[positions], rng)
        return chosen, [self.captions[i][rng.integers(len(self.captions[i]))] for i in chosen], rng


class _Neighbours:
    """Draws another image of a neighbourhood but not of the group: sorted by both, a stretch less one within it."""

    def __init__(self, neighbourhood: np.ndarray, group: np.ndarray):
        self.order = np.lexsort((group, neighbourhood))
        self.start, self.stop = self._stretch(neighbourhood)
        self.skip, self.resume = self._stretch(neighbourhood * (group.max() + 1) + group)

    def _stretch(self, numbers: np.ndarray) -> list[np.ndarray]:
        """Where each element's equals begin and end in the sorted order."""
        return [np.searchsorted(numbers[self.order], numbers, side) for side in ("left", "right")]

    def of(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A neighbour of each image (n,); where it has none, any image."""
        start, skip, resume = self.start[images], self.skip[images], self.resume[images]
        others = (self.stop[images] - start) - (resume - skip)
        position = start + rng.integers(np.maximum(others, 1))
        position = np.where(position >= skip, position + (resume - skip), position)
        anywhere = rng.integers(len(self.order), size=len(images))
        return self.order[np.where(others > 0, position, anywhere)]
