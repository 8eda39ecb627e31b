"""A frozen CLIP on a prepared data set: embeddings of the captions, and how well it finds the right one."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ratlip.clip.frozen import FrozenClip
from ratlip.clip.pairs import group_names
from ratlip.data.batches import centre_crop, to_network
from ratlip.files import atomic_path, read_json, write_json
from ratlip.progress import bar as progress_bar


def embed_captions(clip: FrozenClip, prepared, folder: Path | str, progress: bool = True) -> dict[str, np.ndarray]:
    """Raw text embeddings, by split: float32 (captions, E), row i for caption i of `split.all_captions`.

    Computed once into `folder`/captions-<data>-<clip>/{train,test}.npy, and opened from there (memory-mapped,
    read-only) whenever data and CLIP weights are the same. Equal captions are embedded once.
    """
    data = prepared.manifest["content_sha256"]
    home = Path(folder) / f"captions-{data[:8]}-{clip.fingerprint}"
    splits = {"train": prepared.train, "test": prepared.test}
    key = {
        "data": data,
        "clip": clip.fingerprint,
        "shapes": {name: [len(split.all_captions), clip.embed_dim] for name, split in splits.items()},
    }
    ready = _open_embeddings(home, key)
    if ready is None:
        with atomic_path(home) as draft:
            draft.mkdir()
            for name, split in splits.items():
                bar = progress_bar(
                    total=len(set(split.all_captions)), desc=f"embed {name} captions", unit="caption", enabled=progress
                )
                _write_embeddings(clip, split.all_captions, draft / f"{name}.npy", bar)
            write_json(draft / "manifest.json", key)
        ready = _open_embeddings(home, key)
    return ready


def _open_embeddings(home: Path, key: dict) -> dict[str, np.ndarray] | None:
    """The cached arrays, or None where there are none, or not those of `key`."""
    try:
        if read_json(home / "manifest.json") != key:
            return None
        arrays = {name: np.load(home / f"{name}.npy", mmap_mode="r") for name in key["shapes"]}
    except (OSError, ValueError):
        return None
    shapes = {name: list(array.shape) for name, array in arrays.items() if array.dtype == np.float32}
    return arrays if shapes == key["shapes"] else None


def _write_embeddings(clip: FrozenClip, texts: list[str], path: Path, bar: tqdm, batch_size: int = 256) -> None:
    """Straight to disk in batches: the captions of a large set need not fit into memory as embeddings."""
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(texts), clip.embed_dim))
    first: dict[str, int] = {}
    source = np.array([first.setdefault(text, i) for i, text in enumerate(texts)], dtype=np.int64)
    own = np.flatnonzero(source == np.arange(len(texts)))
    for batch in np.split(own, range(batch_size, len(own), batch_size)):
        rows[batch] = clip.embed_text([texts[i] for i in batch]).cpu().numpy()
        bar.update(len(batch))
    repeated = np.flatnonzero(source != np.arange(len(texts)))
    for batch in np.split(repeated, range(65536, len(repeated), 65536)):
        rows[batch] = rows[source[batch]]
    rows.flush()
    bar.close()


def retrieval(clip: FrozenClip, split, distractors=None, batch_size: int = 128, progress: bool = False) -> dict:
    """How well CLIP finds the caption of an image among others, and the image of a caption.

    Candidates are one caption of each image of `split` (image i gives its caption number i modulo their
    count, so that all wordings occur), equal strings counted once. `distractors`, another split, adds its
    captions as wrong candidates: among a few held-out captions, three right attributes may single out the
    right one. Right are the captions that the image itself has, and those of images of its group
    (`group_names`).

    Returns the number of `images`, `captions` (distinct candidates) and `distractors`, and for
    "image_to_text" and "text_to_image" each `R@1` and `R@10` (share of queries, 0 to 1, with a right answer
    among the first 1 or 10), `median_rank` (of the best right answer, from 1), what chance gives
    (`chance_R@1`, `chance_R@10`, `chance_rank`), and, where attributes are known, `attributes` (the share of
    queries whose first answer has it right) and `chance_attributes`. Ties count as wrong. Holds all
    similarities, images x candidates, in memory.
    """
    captions, owners = _candidates(split)
    own = len(captions)
    sources = [(split, i) for i in owners]
    if distractors is not None:
        known = set(captions)
        added = [(text, i) for text, i in zip(*_candidates(distractors)) if text not in known]
        captions += [text for text, _ in added]
        sources += [(distractors, i) for _, i in added]
    right = _right_answers(split, captions, sources)
    texts = F.normalize(clip.embed_text(captions), dim=1)
    similarity = torch.cat(
        [F.normalize(images, dim=1) @ texts.T for images in _image_embeddings(clip, split, batch_size, progress)]
    ).cpu()
    answer = {
        "images": len(split),
        "captions": own,
        "distractors": len(captions) - own,
        "image_to_text": _ranking(similarity, right),
        "text_to_image": _ranking(similarity[:, :own].T, right[:, :own].T),
    }
    if split.attributes is not None:
        said = [source.attributes[i] for source, i in sources]
        answer["image_to_text"].update(_attributes_right(split.attributes, said, similarity))
        answer["text_to_image"].update(_attributes_right(said[:own], split.attributes, similarity[:, :own].T))
    return answer


def _candidates(split) -> tuple[list[str], list[int]]:
    """Distinct captions, one from each image, and the image that each came from."""
    first: dict[str, int] = {}
    for i, held in enumerate(split.captions):
        first.setdefault(held[i % len(held)], i)
    return list(first), list(first.values())


def _right_answers(split, captions: list[str], sources: list[tuple]) -> Tensor:
    """bool (images, captions): whether the caption is true of the image, as far as is known."""
    names = {id(source): group_names(source) for source in {id(s): s for s, _ in sources}.values()}
    numbers: dict[str, int] = {}
    of_image = [numbers.setdefault(name, len(numbers)) for name in group_names(split)]
    of_caption = [numbers.setdefault(names[id(source)][i], len(numbers)) for source, i in sources]
    right = torch.tensor(of_image)[:, None] == torch.tensor(of_caption)
    place = {text: j for j, text in enumerate(captions)}
    for i, held in enumerate(split.captions):
        right[i, [place[text] for text in held if text in place]] = True
    return right


@torch.no_grad()
def _image_embeddings(clip: FrozenClip, split, batch_size: int, progress: bool) -> Iterator[Tensor]:
    """Embeddings (B,E) of the centre squares of the stored images, resized to CLIP's size, batch after batch."""
    for start in progress_bar(range(0, len(split), batch_size), desc="embed images", enabled=progress):
        batch = range(start, min(start + batch_size, len(split)))
        images = torch.cat([centre_square(split.image(i), clip.image_size) for i in batch])
        yield clip.embed_images(images.to(clip.mean.device))


def centre_square(image: np.ndarray, image_size: int) -> Tensor:
    """uint8 (H,W,3) -> the largest centred square, antialiased to (1,3,S,S) float32 in [-1,1]."""
    square = torch.tensor(centre_crop(image, min(image.shape[:2])))
    return to_network(square.permute(2, 0, 1)[None], image_size)


def _ranking(similarity: Tensor, right: Tensor) -> dict[str, float]:
    """Rank of the best right answer of each row among the wrong ones, and what a random order would give."""
    best = similarity.masked_fill(~right, -torch.inf).max(1, keepdim=True).values
    rank = 1 + ((similarity >= best) & ~right).sum(1)
    total, good = right.shape[1], right.sum(1).double()

    def chance(k: int) -> float:  # 1 - the chance that k draws without replacement are all wrong
        missed = torch.ones_like(good)
        for j in range(min(k, total)):
            missed *= ((total - good - j) / (total - j)).clamp(min=0)
        return round(float((1 - missed).mean()), 5)

    def found(k: int) -> float:
        return round(float((rank <= k).double().mean()), 5)

    return {
        "R@1": found(1),
        "R@10": found(10),
        "median_rank": float(np.median(rank.numpy())),
        "chance_R@1": chance(1),
        "chance_R@10": chance(10),
        "chance_rank": round(float(((total + 1) / (good + 1)).mean()), 2),
    }


def _attributes_right(asked: list[dict], answers: list[dict], similarity: Tensor) -> dict[str, dict[str, float]]:
    """For each attribute, the share of rows whose most similar column agrees in it, and of all pairs that do."""
    first = similarity.argmax(1).tolist()
    result: dict[str, dict[str, float]] = {"attributes": {}, "chance_attributes": {}}
    for name in asked[0]:
        found = np.array([answer[name] for answer in answers])
        truth = np.array([query[name] for query in asked])
        result["attributes"][name] = round(float((found[first] == truth).mean()), 5)
        result["chance_attributes"][name] = round(float((found[None] == truth[:, None]).mean()), 5)
    return result
