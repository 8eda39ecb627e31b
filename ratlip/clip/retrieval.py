"""A frozen CLIP on a prepared data set: embeddings of the captions, and how well it finds the right one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ratlip.clip.frozen import FrozenClip
from ratlip.clip.pairs import partial, truths
from ratlip.data.batches import centre_crop, to_network
from ratlip.data.facts import true_of
from ratlip.data.prepared import Prepared, Split
from ratlip.data.store import Store
from ratlip.progress import bar


def embed_captions(
    clip: FrozenClip, prepared: Prepared, folder: Path | str, progress: bool = True
) -> dict[str, np.ndarray]:
    """Raw text embeddings, by split: float32 (captions, E), row i for caption i of `split.all_captions`.

    Equal captions are embedded once, and all of them once for a data set and a CLIP: they are kept in `folder`.
    """
    data, found = prepared.manifest["content_sha256"], {}
    identity, home = {"data": data, "clip": clip.fingerprint}, Path(folder) / f"captions-{data[:8]}-{clip.fingerprint}"
    splits = dict(train=prepared.train, test=prepared.test, validation=getattr(prepared, "validation", None))
    for name, captions in ((name, split.all_captions) for name, split in splits.items() if split is not None):
        row_of = {text: row for row, text in enumerate(dict.fromkeys(captions))}
        texts = list(row_of)
        store = Store(home, name, identity, len(texts), {"embedding": ((clip.embed_dim,), "float32")})

        def read(rows: np.ndarray, texts: list[str] = texts) -> dict:
            return {"embedding": clip.embed_text([texts[i] for i in rows]).cpu()}

        store.fill(read, 256, desc=f"embed {name} captions", progress=progress)
        found[name] = store["embedding"][[row_of[text] for text in captions]]
    return found


@torch.no_grad()
def retrieval(
    clip: FrozenClip, split: Split, distractors: Split | None = None, batch_size: int = 128, progress: bool = False
) -> dict:
    """How well CLIP finds the caption of an image among others, and the image of a caption.

    Candidates are one caption of each image of `split` (image i gives its caption i modulo their count), equal strings
    counted once; `distractors`, another split, adds its captions as wrong ones. Right are the captions that are true of
    the image (`pairs.truths`), the distractors' too.

    Returns the number of `images`, `captions` (distinct candidates) and `distractors`, and for "image_to_text" and
    "text_to_image" each `R@1` and `R@10` (share of queries, 0 to 1, with a right answer among the first 1 or 10),
    `median_rank` (of the best right answer, from 1), `chance_R@1`, `chance_R@10`, `chance_rank`, and, where captions
    name all attributes, `attributes` (the share of queries whose first answer has it right) and `chance_attributes`.
    Ties count as wrong. Holds all similarities, images x candidates, in memory.
    """
    own, others = _candidates(split), _candidates(distractors) if distractors is not None else {}
    others = {text: i for text, i in others.items() if text not in own}
    captions, count = [*own, *others], len(own)
    right, texts = _right_answers(split, own, distractors, others), F.normalize(clip.embed_text(captions), dim=1)
    parts = []
    for start in bar(range(0, len(split), batch_size), desc="embed images", enabled=progress):
        numbers = range(start, min(start + batch_size, len(split)))
        images = torch.cat([centre_square(split.image(i), clip.image_size) for i in numbers])
        parts.append(F.normalize(clip.embed_images(images.to(clip.mean.device)), dim=1) @ texts.T)
    similarity = torch.cat(parts).cpu()
    to_text, to_image = _ranking(similarity, right), _ranking(similarity[:, :count].T, right[:, :count].T)
    if (truth := split.attributes) is not None and not partial(split):
        other = (distractors.attributes if distractors is not None else None) or []
        named = [truth[i] for i in own.values()] + [other[i] for i in others.values()]
        to_text |= _attributes_right(truth, named, similarity)
        to_image |= _attributes_right(named[:count], truth, similarity[:, :count].T)
    counts = {"images": len(split), "captions": count, "distractors": len(others)}
    return {**counts, "image_to_text": to_text, "text_to_image": to_image}


def _candidates(split: Split) -> dict[str, int]:
    """Distinct captions, one from each image, and the image that each came from."""
    first: dict[str, int] = {}
    for i, held in enumerate(split.captions):
        first.setdefault(held[i % len(held)], i)
    return first


def _right_answers(split: Split, own: dict[str, int], distractors: Split | None, others: dict[str, int]) -> Tensor:
    """bool (images, candidates `own` and `others`): whether the caption is true of the image, as far as is known."""
    splits = [split] if distractors is None else [split, distractors]
    (says, shows), *more = truths(*splits)
    rows = [
        [part.caption_offsets[i] + part.captions[i].index(text) for text, i in each.items()]
        for part, each in zip(splits, (own, others), strict=False)
    ]
    said = np.concatenate([part[0][numbers] for part, numbers in zip([(says, shows), *more], rows, strict=True)])
    right = np.concatenate([true_of(said, part[:, None]) for part in np.array_split(shows, len(shows) // 64 + 1)])
    column = {text: j for j, text in enumerate([*own, *others])}
    for i, held in enumerate(split.captions):
        right[i, [column[text] for text in held if text in column]] = True
    return torch.from_numpy(right)


def centre_square(image: np.ndarray, image_size: int) -> Tensor:
    """uint8 (H,W,3) -> the largest centred square, antialiased to (1,3,S,S) float32 in [-1,1]."""
    square = torch.tensor(centre_crop(image, min(image.shape[:2])))
    return to_network(square.permute(2, 0, 1)[None], image_size)


def _ranking(similarity: Tensor, right: Tensor) -> dict:
    """Rank of the best right answer of each row among the wrong ones, and what a random order would give."""
    best = similarity.masked_fill(~right, -torch.inf).max(1, keepdim=True).values
    rank = 1 + ((similarity >= best) & ~right).sum(1)
    total, good = right.shape[1], right.sum(1).double()
    result = {f"R@{k}": round(float((rank <= k).double().mean()), 5) for k in (1, 10)}
    result["median_rank"] = float(np.median(rank.numpy()))
    for k in (1, 10):
        missed = torch.ones_like(good)  # the chance that k draws without replacement are all wrong
        for j in range(min(k, total)):
            missed *= ((total - good - j) / (total - j)).clamp(min=0)
        result[f"chance_R@{k}"] = round(float((1 - missed).mean()), 5)
    return result | {"chance_rank": round(float(((total + 1) / (good + 1)).mean()), 2)}


def _attributes_right(asked: list[dict], answers: list[dict], similarity: Tensor) -> dict[str, dict[str, float]]:
    """For each attribute, the share of rows whose most similar column agrees in it, and of all pairs that do."""
    first, right, chance = similarity.argmax(1).tolist(), {}, {}
    for name in asked[0]:
        found, truth = (np.array([each[name] for each in side]) for side in (answers, asked))
        right[name] = round(float((found[first] == truth).mean()), 5)
        chance[name] = round(float((found[None] == truth[:, None]).mean()), 5)
    return {"attributes": right, "chance_attributes": chance}
