"""What the generated sets have in common: attributes, their numbering, and fresh images that a caption is true of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ratlip.data import facts
from ratlip.data.batches import centre_crop, to_network
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

    @property
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


def generated_set(prepared: Prepared) -> GeneratedSet:
    """The set that these data were drawn from. DataError for photographs, whose attributes nobody knows."""
    settings = prepared.manifest["settings"] if prepared.train.attributes is not None else {}
    if (name := settings.get("dataset")) not in GENERATED:
        raise DataError(f"{prepared.folder}: needs images whose attributes are known (a generated set)")
    module = import_module(f"ratlip.data.{name}")
    used = {key: settings[key] for key in SceneSettings.model_fields if key in settings}
    return GeneratedSet(module, used, prepared.manifest["resize"], module.attributes_of_set(**used))
