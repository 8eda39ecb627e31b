"""What each layer of a generator knows of the caption, and what one changed word does to it.

Two claims of the paper are about this: attention keeps the recurrence from forgetting, and every layer reaches the
global text. A linear probe (a ridge classifier, as in Alain and Bengio 2016, arXiv:1610.01644) reads an attribute from
what an affine is given, or from the map after a block, of captions that it was not fitted on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from ratlip.data import facts
from ratlip.data.generated import GeneratedSet, generated_set
from ratlip.data.prepared import Prepared
from ratlip.networks import ConditionalAffine
from ratlip.scores.evaluation import TEST_LATENTS, test_pairs
from ratlip.studies.inspection import outputs
from ratlip.training.generation import Run
from ratlip.training.step import sample_latents

FOLDS, SIDE, STRENGTH = 5, 4, 1.0  # maps are averaged down to SIDE x SIDE; ridge of standardised features


def accuracy(features: Tensor, labels: np.ndarray, seed: int = 0) -> float:
    """Share of labels (N,) that a linear probe reads off features (N,K) rightly, over `FOLDS` parts left out in turn.

    NaN where a value occurs fewer times than there are folds.
    """
    if np.unique(labels, return_counts=True)[1].min() < FOLDS:
        return float("nan")
    probe = make_pipeline(StandardScaler(), RidgeClassifier(alpha=STRENGTH * features.shape[1]))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    return float(cross_val_score(probe, features.double().numpy(), labels, cv=folds).mean())


@torch.no_grad()
def layers(run: Run, prepared: Prepared, count: int = 512) -> tuple[dict[tuple[str, int], Tensor], np.ndarray]:
    """What is read at each place of a generator for `count` test captions, each with a latent of its own.

    {("condition", layer): (N,D), ("map", block): (N,C*16), ("image", 1): ...}, and what the captions say: (N,K).
    """
    part, made = prepared.test, generated_set(prepared)
    numbers, captions = test_pairs(prepared, count)
    latent = sample_latents(run.settings.seed, TEST_LATENTS, count, run.settings.model.latent_size)
    sentence = run.clip.embed_text(captions)
    blocks = [*run.generator.mapper.fusion_blocks, *run.generator.synthesis_blocks]
    maps: dict[nn.Module, Tensor] = {}
    for at in range(0, count, 64):
        rows = slice(at, at + 64)
        given = latent[rows].to(sentence.device), sentence[rows]
        for block, each in outputs(run.generator, blocks, *given).items():
            small = F.adaptive_avg_pool2d(each.float(), SIDE).flatten(1).cpu()
            maps[block] = torch.cat([maps[block], small]) if block in maps else small
    read = run.generator.conditions(latent.to(sentence.device), sentence)
    found = {("condition", i): each.cpu() for i, each in enumerate(read, start=1)}
    found |= {("map", i): maps[block] for i, block in enumerate(blocks, start=1)}
    rows_of = [
        part.caption_offsets[i] + part.captions[i].index(text) for i, text in zip(numbers, captions, strict=True)
    ]
    return found, facts.says(part, made.table)[rows_of]


def readable(run: Run, prepared: Prepared, count: int = 512, every: int = 4) -> pd.DataFrame:
    """How well each attribute is read at each place: columns place, layer, attribute, accuracy, chance (largest class).

    Only captions that name an attribute count for it; of two objects, only those that also say how they stand to each
    other, since else nobody can say which is the first. Of the conditions, each `every`-th layer and the last.
    """
    found, says = layers(run, prepared, count)
    table, rows = generated_set(prepared).table, []
    names = list(table)
    last = max(layer for place, layer in found if place == "condition")
    for (place, layer), features in found.items():
        if place == "condition" and layer % every != 1 and layer != last:
            continue
        for column, name in enumerate(names):
            kept = says[:, column] != facts.UNNAMED
            if facts.two_objects(names) and facts.RELATION in names and name.startswith((facts.FIRST, facts.SECOND)):
                kept &= says[:, names.index(facts.RELATION)] != facts.UNNAMED
            labels = says[kept, column]
            row: dict[str, Any] = {"place": place, "layer": layer, "attribute": name, "captions": int(kept.sum())}
            row["accuracy"] = accuracy(features[torch.from_numpy(kept)], labels)
            rows.append(row | {"chance": float(np.bincount(labels).max() / len(labels))})
    return pd.DataFrame(rows)


@torch.no_grad()
def word_effect(run: Run, made: GeneratedSet, attributes: list[Mapping[str, str]], seed: int = 0) -> pd.DataFrame:
    """What one changed word does to each affine: columns layer, change, gamma, beta.

    The root mean square change of gamma (beta) over channels when a word of the caption is changed
    (`GeneratedSet.pair`), the latent kept, as a share of its standard deviation between captions; mean over captions.
    """
    rng, rows = np.random.default_rng(seed), []
    affines = [module for module in run.generator.modules() if isinstance(module, ConditionalAffine)]
    device, size = run.clip.mean.device, run.settings.model.latent_size
    latent = sample_latents(seed, TEST_LATENTS, len(attributes), size).to(device)
    for change in made.changes:
        pairs = [made.pair(known, change, rng) for known in attributes]
        parts = [part for affine in affines for part in (affine.gamma, affine.beta)]
        ways = ([pair.caption for pair in pairs], [pair.changed for pair in pairs])
        one, other = (outputs(run.generator, parts, latent, run.clip.embed_text(texts)) for texts in ways)
        for layer, affine in enumerate(affines, start=1):
            row: dict[str, Any] = {"layer": layer, "change": change}
            for name, part in {"gamma": affine.gamma, "beta": affine.beta}.items():
                spread = one[part].std(dim=0).square().mean().sqrt()
                moved = (one[part] - other[part]).square().mean(dim=1).sqrt().mean()
                row[name] = float(moved / spread) if spread > 0 else float("nan")
            rows.append(row)
    return pd.DataFrame(rows)
