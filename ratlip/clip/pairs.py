"""Which images and captions meet in a batch of the small CLIP, and which of them are true of one another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ratlip.data import facts

if TYPE_CHECKING:
    from ratlip.data.generated import GeneratedSet
    from ratlip.data.prepared import Split


def group_names(split: Split) -> list[str]:
    """For each image, a text that it shares with those whose captions are true of it too, where captions name all: its
    attributes where they are known, else its set of captions (template captions repeat).
    """
    if split.attributes is not None:
        return [json.dumps(a, sort_keys=True) for a in split.attributes]
    return ["\n".join(sorted(set(captions))) for captions in split.captions]


def partial(split: Split) -> bool:
    """Whether captions name a part of what is known of their image, so that they are true of many others."""
    return getattr(split, "named", None) is not None


def truths(*splits: Split) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each split, what its captions say (captions,K) and what its images show (images,R,K): see `data.facts`.

    Whole numbers, the same in all splits. Where captions name all (or nothing is known), K is 1: the image's group.
    """
    if all(partial(split) for split in splits):
        table = facts.values_of(splits)
        shown = [facts.readings(facts.codes(split.attributes or [], table), table) for split in splits]
        return [(facts.says(split, table), shows) for split, shows in zip(splits, shown, strict=True)]
    number = _numbered([name for split in splits for name in group_names(split)])
    parts = np.split(number, np.cumsum([len(split.captions) for split in splits])[:-1])
    counts = [np.diff(split.caption_offsets) for split in splits]
    return [(np.repeat(part, n)[:, None], part[:, None, None]) for part, n in zip(parts, counts, strict=True)]


def caption_facts(split: Split) -> np.ndarray:
    """What each caption says, and what its image shows: whole numbers (captions,1+R,K), in the order of `all_captions`.

    Row i says [i, 0], its image shows [i, 1:]; `facts.true_of` tells whether a caption is true of another's image.
    """
    ((says, shows),) = truths(split)
    return np.concatenate([says[:, None], np.repeat(shows, np.diff(split.caption_offsets), axis=0)], axis=1)


def neighbourhoods(split: Split) -> list[np.ndarray]:
    """Groupings, int64 (n,) each, that say which images are hard to tell apart: equal number = neighbours.

    With known attributes, one for each: images that agree in all the others. Else one, the class (in `data.scenes`,
    which has too many attributes for that, the pair); none if unknown.
    """
    if (known := _few_attributes(split)) is not None:
        others = [[{k: v for k, v in a.items() if k != left_out} for a in known] for left_out in known[0]]
        return [_numbered([json.dumps(a, sort_keys=True) for a in each]) for each in others]
    labels = np.asarray(split.labels)
    return [_numbered(labels)] if (labels >= 0).all() and len(np.unique(labels)) > 1 else []


def _few_attributes(split: Split) -> list[dict] | None:
    return split.attributes if split.attributes and not facts.two_objects(split.attributes[0]) else None


def _numbered(keys: Sequence | np.ndarray) -> np.ndarray:
    return np.unique(np.asarray(keys), return_inverse=True)[1].astype(np.int64).reshape(-1)


class Batch(NamedTuple):
    """Image numbers (B,), captions (C), which of them are true of which image (B,C), the generator for what is random.

    Caption i < B is one of image i. `positives` is bool; where captions name a part, C = 2 B: see `PairBatches`.
    """

    images: np.ndarray
    captions: list[str]
    positives: np.ndarray
    rng: np.random.Generator


class PairBatches:
    """Which images, and which of their captions, make up the batch of a step: a pure function of (seed, step).

    Without hard negatives, images are drawn at random: colour and background tell most pairs apart, and a CLIP learns
    little else. With them, half of the batch is drawn at random, and each of the others is a neighbour (of a grouping
    of `neighbourhoods` drawn each time) of one of these, of another group.

    Where captions name a part (`made`: the set that they are of), most of them are true of half the batch, or wrong in
    a colour: then each image meets two captions made for it, one true and one with a word changed that is not true of
    it (`GeneratedSet.pair`), as in NegCLIP (Yuksekgonul et al.: When and Why Vision-Language Models Behave like
    Bags-of-Words, 2023).
    """

    def __init__(
        self, split: Split, batch_size: int, seed: int, hard_negatives: bool = True, made: GeneratedSet | None = None
    ):
        self.made = made if partial(split) and hard_negatives else None
        self.attributes = split.attributes or []
        self.captions, self.batch_size, self.seed = split.captions, batch_size, seed
        self.group = _numbered(group_names(split))
        says, self.shows = truths(split)[0]
        self.says = dict(zip(split.all_captions, says, strict=True)) if partial(split) else None
        if self.made is not None:  # its own numbering
            table = self.made.table
            self.shows = facts.readings(facts.codes(self.attributes, table), table)
        groupings = neighbourhoods(split) if hard_negatives else []
        self.neighbourhoods = [_Neighbours(numbers, self.group) for numbers in groupings]
        self.origin = "none" if not groupings else "labels" if _few_attributes(split) is None else "attributes"

    def __call__(self, step: int) -> Batch:
        """The batch of a step: a pure function of the seed and it."""
        rng, total, size = np.random.default_rng([self.seed, step]), len(self.group), self.batch_size
        chosen = rng.choice(total, size, replace=size > total)
        if self.neighbourhoods:
            half = size // 2
            which = rng.integers(len(self.neighbourhoods), size=half)
            for number, neighbours in enumerate(self.neighbourhoods):
                positions = np.flatnonzero(which == number)
                chosen[size - half + positions] = neighbours.of(chosen[positions], rng)
        if self.made is not None:
            changes = rng.choice(self.made.changes, size)
            pairs = [
                self.made.pair(self.attributes[i], str(each), rng) for i, each in zip(chosen, changes, strict=True)
            ]
            captions = [pair.caption for pair in pairs] + [pair.changed for pair in pairs]
            says = [pair.says for pair in pairs] + [pair.changed_says for pair in pairs]
        else:
            captions = [self.captions[i][rng.integers(len(self.captions[i]))] for i in chosen]
            if self.says is None:
                return Batch(chosen, captions, self.group[chosen][:, None] == self.group[chosen], rng)
            says = [self.says[text] for text in captions]
        return Batch(chosen, captions, facts.true_of(np.stack(says), self.shows[chosen][:, None]), rng)


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
