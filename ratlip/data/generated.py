"""What the generated sets have in common: attributes, their numbering, and fresh images that a caption is true of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ratlip.data import facts
from ratlip.data.batches import centre_crop, to_network
from ratlip.data.scenes import exchanged
from ratlip.data.synthetic import some_of
from ratlip.errors import DataError
from ratlip.settings.sections import GENERATED, SceneSettings

if TYPE_CHECKING:
    from ratlip.data.prepared import Prepared

FRESH = 8  # stream of random numbers: no image of a split shares it


@dataclass(frozen=True)
class GeneratedSet:
    """A generated set as it was prepared. `values`: what each attribute can be; `table`: how values are numbered."""

    module: Any
    used: dict[str, int]  # how many values of each attribute, where the set lets one choose
    resize: int
    values: dict[str, tuple[str, ...]]

    @cached_property
    def table(self) -> dict[str, tuple[str, ...]]:
        return facts.coding(self.values)

    def fresh(
        self, says: np.ndarray, seed: int, *, crop: int, image_size: int, numbers: Iterable[int] | None = None
    ) -> tuple[Tensor, list[dict[str, str]]]:
        """New images that captions are true of: float32 (N,3,S,S) in [-1,1], and their attributes.

        says int (N,K), a row a caption (`facts.says`): what it leaves open is drawn, each value alike, whatever the
        split; so are position, shade and the like. Image i depends on `seed` and its number (default: i) alone.
        """
        images, attributes, names = [], [], list(self.table)
        for number, row in zip(range(len(says)) if numbers is None else numbers, says, strict=True):
            rng = np.random.default_rng([seed, FRESH, number])
            known = {n: self.table[n][code] for n, code in zip(names, row, strict=True) if code != facts.UNNAMED}
            attributes.append(self.module.complete(known, rng, **self.used))
            pixels, _ = self.module.render(attributes[-1], self.resize, rng)
            images.append(centre_crop(pixels, crop).transpose(2, 0, 1))
        return to_network(torch.from_numpy(np.stack(images)), image_size), attributes

    @cached_property
    def changes(self) -> tuple[str, ...]:
        """What `pair` can change: each attribute, and, of two objects, "exchanged"."""
        return (*self.values, *(["exchanged"] if facts.two_objects(self.values) else []))

    def pair(self, known: Mapping[str, str], change: str, rng: np.random.Generator) -> Pair:
        """A partial caption that is true of an image with these attributes, and it with one word changed: not true.

        `change` (one of `changes`): the attribute that gets another value; "exchanged": the words stay, and one goes to
        the other object. What is named, the wording and the wrong value are drawn by `rng`.
        """
        names, table = list(self.values), self.table
        shown = facts.readings(facts.codes([known], table), table)[0]
        own = [name.removeprefix(facts.FIRST) for name in names if name.startswith(facts.FIRST)]
        while True:
            if change in self.values:
                others = [value for value in self.values[change] if value != known[change]]
                part, wrong = {change}, {**known, change: str(rng.choice(others))}
            else:
                word = str(rng.choice(own))
                part, wrong = {facts.FIRST + word, facts.SECOND + word}, exchanged(known, [word])
            part |= set(some_of(names, rng))
            open_ = [name not in part for name in names]
            true, false = (np.where(open_, facts.UNNAMED, facts.codes([each], table)[0]) for each in (known, wrong))
            if not facts.true_of(false, shown):
                break
        named, wording = [name for name in names if name in part], rng.integers(2**32)
        texts = [self.module.say(each, named, np.random.default_rng(wording)) for each in (known, wrong)]
        return Pair(texts[0], texts[1], true, false)


class Pair(NamedTuple):
    """A caption that is true of an image, one that is not, and what each says: codes (K,) as in `facts.says`."""

    caption: str
    changed: str
    says: np.ndarray
    changed_says: np.ndarray


def generated_set(prepared: Prepared) -> GeneratedSet:
    """The set that these data were drawn from. DataError for photographs, whose attributes nobody knows."""
    settings = prepared.manifest["settings"] if prepared.train.attributes is not None else {}
    if (name := settings.get("dataset")) not in GENERATED:
        raise DataError(f"{prepared.folder}: needs images whose attributes are known (a generated set)")
    module = import_module(f"ratlip.data.{name}")
    used = {key: settings[key] for key in SceneSettings.model_fields if key in settings}
    return GeneratedSet(module, used, prepared.manifest["resize"], module.attributes_of_set(**used))
