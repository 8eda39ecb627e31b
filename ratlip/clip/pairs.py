"""Which images and captions meet in a batch of the small CLIP, and which of them are true of one another."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from ratlip.data.prepared import Split


def group_names(split: Split) -> list[str]:
    """For each image, a text that it shares with those whose captions are true of it too, and with no other.

    Its attributes, where they are known; else its set of captions (template captions made of a class name or of
    facial attributes repeat). Images of one group are positives of one another.
    """
    if split.attributes is not None:
        return [json.dumps(a, sort_keys=True) for a in split.attributes]
    return ["\n".join(sorted(set(captions))) for captions in split.captions]


def caption_groups(split: Split) -> np.ndarray:
    """The group of each caption, int64 (captions,), in the order of `split.all_captions`: see `group_names`."""
    return np.repeat(_numbered(group_names(split)), np.diff(split.caption_offsets))


def neighbourhoods(split: Split) -> list[np.ndarray]:
    """Groupings, int64 (n,) each, that say which images are hard to tell apart: equal number = neighbours.

    With known attributes, one grouping for each attribute: images that agree in all the others. Else, one: images of
    the same class. An empty list where neither is known.
    """
    if split.attributes is not None:
        texts = [
            [json.dumps({k: v for k, v in a.items() if k != left_out}, sort_keys=True) for a in split.attributes]
            for left_out in split.attributes[0]
        ]
        return [_numbered(each) for each in texts]
    labels = np.asarray(split.labels)
    return [_numbered(labels)] if (labels >= 0).all() and len(np.unique(labels)) > 1 else []


def _numbered(keys: Sequence | np.ndarray) -> np.ndarray:
    return np.unique(np.asarray(keys), return_inverse=True)[1].astype(np.int64).reshape(-1)


class PairBatches:
    """Which images, and which of their captions, make up the batch of a step: a pure function of (seed, step).

    Without hard negatives, images are drawn at random. Colour and background alone tell most random pairs apart, so a
    CLIP trained on them learns little else. With hard negatives, half of the batch is drawn at random and each of the
    others is a neighbour of one of these (`neighbourhoods`, the grouping drawn at random each time) of another group:
    for images of known attributes the two differ in one attribute only, for others they are of one class.
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
    """Draws, for an image, another one of its neighbourhood but not of its group.

    Sorted by neighbourhood, then group, a neighbourhood is one stretch and the group within it another: a draw from
    the first that skips the second.
    """

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
