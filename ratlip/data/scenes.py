"""The harder generated set: two objects, each with shape, colour, texture and size, and a relation between them.

On one object of five attributes (`data.synthetic`) every variant of the generator ends near 100 %. Here a caption's
words belong to an object ("a striped red disc left of a blue star" is not "a striped blue star left of a red disc"),
and captions name a random part of what an image shows, so that the rest is left to the latent z.

An image has a `first` and a `second` object, of different colours: the first is left of the second, above it, or in
front of it. A caption may begin with either, and then says right of, below, behind. How it is drawn, in image widths:

* radius 0.145 (small) or 0.215 (large), times 0.94 to 1.06; turned by up to 0.15 (in radians); shade and background
  vary as in `data.synthetic`.
* left of, above: middles 0.44 to 0.48 apart on that axis, each moved by up to 0.07 across it, both by 0.02 along it.
* in front of: on one of the four diagonals, as far apart as still hides 15 % of the smaller one (`OVERLAPS`).
* textures: plain; striped (diagonal), checkered, dotted: in a darker tone, period 0.125 of the width, phase at random.

A kind is a shape in a colour. Of each shape, one colour (drawn by the seed) is for the test split and another one for
validation: each test image shows a kind that no training image does. Two training images in a row are a pair, and that
is their label: the second has one attribute changed, or words exchanged between its objects, so that a CLIP which only
counts words cannot tell them.

Difficulty: `shapes`, `colours`, `textures`, `backgrounds`, `relations`: how many of each are used, the first ones. With
one alone, that attribute is neither named nor asked for.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ratlip.data import synthetic
from ratlip.data.facts import FIRST, INVERSE, RELATION, SECOND
from ratlip.data.records import Record
from ratlip.data.synthetic import BACKGROUNDS, COLOURS, fill, some_of
from ratlip.errors import SettingsError

Attributes = dict[str, str]
SHAPES = ("disc", "square", "triangle", "cross", "star", "heart", "ring", "diamond")
TEXTURES = ("plain", "striped", "checkered", "dotted")
RADII = {"small": 0.145, "large": 0.215}
RELATIONS = ("left of", "above", "in front of")
EVERY = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "size": tuple(RADII),
    "background": tuple(BACKGROUNDS),
    RELATION: RELATIONS,
}
OVERLAPS, HIDDEN = (0.72, 0.64, 0.56, 0.48, 0.4), 0.15  # distance of the middles in sums of radii, tried in this order
DARK, PERIOD, OVERSAMPLING, CAPTIONS = 0.4, 0.125, 4, 10
HELD_OUT = ("test", "validation")  # a colour of each shape for each


def _circle(radius: float = 1.0, corners: int = 48) -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / corners for i in range(corners)]
    return [(radius * math.sin(a), -radius * math.cos(a)) for a in angles]


def _heart() -> list[tuple[float, float]]:
    outline = []
    for i in range(48):
        t = 2 * math.pi * i / 48
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        outline.append((1.05 * math.sin(t) ** 3, -(y + 2.5) / 15))
    return outline


OUTLINES = {
    **{name: list(zip(*synthetic.OUTLINES[name], strict=True)) for name in ("square", "triangle", "cross")},
    **{"disc": _circle(), "ring": _circle(), "heart": _heart()},
    "star": [(x * r, y * r) for (x, y), r in zip(_circle(1.15, 10), (1, 0.5) * 5, strict=True)],
    "diamond": [(0.0, -1.15), (0.75, 0.0), (0.0, 1.15), (-0.75, 0.0)],
}

WITH_RELATION = (
    "{a} {relation} {b} [on a {background} background]",
    "{a} is {relation} {b} , [the background is {background}]",
    "{relation} {b} there is {a} , [all on {background}]",
    "[on a {background} background] , {a} {relation} {b}",
    "a picture of {a} {relation} {b} [against {background}]",
)
WITHOUT = (
    "{a} [and {b}] [on a {background} background]",
    "there is {a} [and {b}] , [the background is {background}]",
    "[on {background}] , {a} [with {b}]",
    "a {background} picture of {a} [and {b}]",
)
BARE = ("a {background} picture", "a picture on a {background} background", "the background is {background}")
PHRASES = (
    "a {size} {texture} {colour} {shape}",
    "a {size} {colour} {shape} [that is {texture}]",
    "a {texture} {size} {shape} [in {colour}]",
)


def attributes_of_set(**used: int) -> dict[str, tuple[str, ...]]:
    """Names and values of the attributes, with so many `shapes`, `colours`, ... (default: all); one value is none."""
    values = {name: each[: used.get(f"{name}s", len(each))] for name, each in EVERY.items()}
    own = {role + name: values[name] for role in (FIRST, SECOND) for name in ("shape", "colour", "texture", "size")}
    found = {**own, RELATION: values[RELATION], "background": values["background"]}
    return {name: each for name, each in found.items() if len(each) > 1}


def kind_split(shape: str, colour: str, seed: int = 0, colours: int = len(COLOURS)) -> str:
    """The split whose images alone show this shape in this colour, or "train": the kinds that all may show."""
    order = np.random.default_rng([seed, 6]).permutation(colours)
    place = int(order[EVERY["colour"].index(colour)] - SHAPES.index(shape)) % colours
    return HELD_OUT[place] if place < len(HELD_OUT) else "train"


def splits_of(attributes: Mapping[str, str], seed: int = 0, colours: int = len(COLOURS)) -> set[str]:
    """The splits of both objects' kinds: an image belongs to "train" where that is all, to "test" with that one, ..."""
    kinds = ((attributes[role + "shape"], attributes[role + "colour"]) for role in (FIRST, SECOND))
    return {kind_split(shape, colour, seed, colours) for shape, colour in kinds}


def complete(known: Mapping[str, str], rng: np.random.Generator, **used: int) -> Attributes:
    """All attributes of an image that a caption of these is true of; the others are drawn, each value alike.

    `known` may be said of the first or the second object where no relation is named: which, is drawn too.
    """
    if RELATION not in known and rng.random() < 0.5:
        known = exchanged(known)
    values = attributes_of_set(**used)
    while True:
        drawn = {name: known.get(name) or str(rng.choice(each)) for name, each in values.items()}
        if drawn[FIRST + "colour"] != drawn[SECOND + "colour"]:
            return drawn


def exchanged(attributes: Mapping[str, str], names: Collection[str] = tuple(EVERY)) -> Attributes:
    """The same words with those of the first object given to the second, and the reverse (of attributes `names`)."""
    other = {FIRST: SECOND, SECOND: FIRST}
    found = {}
    for name, value in attributes.items():
        role, _, own = name.partition(" ")
        found[other[f"{role} "] + own if own in names and own else name] = value
    return {name: found[name] for name in attributes if name in found} | found


def sibling(attributes: Attributes, rng: np.random.Generator, **used: int) -> Attributes:
    """The same scene with one attribute changed, or, half of the time, with words exchanged between its objects."""
    values = attributes_of_set(**used)
    if rng.random() < 0.5:
        name = str(rng.choice(list(values)))
        return {**attributes, name: str(rng.choice([value for value in values[name] if value != attributes[name]]))}
    own = [name.removeprefix(FIRST) for name in values if name.startswith(FIRST)]
    return exchanged(attributes, own if rng.random() < 0.3 else [str(rng.choice(own))])


def drawn(split: str, number: int, seed: int = 0, **used: int) -> Attributes:
    """The attributes of image `number` of a split."""
    stream, colours = ("train", "test", "validation").index(split) + 2, used.get("colours", len(COLOURS))
    pair, odd = divmod(number, 2) if split == "train" else (number, 0)
    rng = np.random.default_rng([seed, stream, pair, 7])

    def fits(each: Attributes) -> bool:
        found = splits_of(each, seed, colours)
        own = found <= {"train"} if split == "train" else split in found <= {"train", split}
        return own and each[FIRST + "colour"] != each[SECOND + "colour"]

    while not fits(scene := complete({}, rng, **used)):
        pass
    while odd:
        other = sibling(scene, rng, **used)
        if fits(other) and other != scene:
            return other
    return scene


def render(attributes: Mapping[str, str], image_size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image: uint8 (S,S,3), and where the first and the second object are seen: bool (2,S,S)."""
    about = {name: attributes.get(name, EVERY[name.rpartition(" ")[2]][0]) for name in attributes_of_set()}
    big = image_size * OVERSAMPLING
    radii = [RADII[about[role + "size"]] * rng.uniform(0.94, 1.06) for role in (FIRST, SECOND)]
    turns, way = rng.uniform(-0.15, 0.15, 2), rng.integers(4) * math.pi / 2 + math.pi / 4 + rng.uniform(-0.2, 0.2)
    along, shift, across = rng.uniform(0.44, 0.48), rng.uniform(-0.02, 0.02), rng.uniform(-0.07, 0.07, 2)
    textures = [_texture(about[role + "texture"], big, rng) for role in (FIRST, SECOND)]
    shapes = [about[role + "shape"] for role in (FIRST, SECOND)]

    def outlines(middles: list[tuple[float, float]]) -> list[np.ndarray]:
        return [_filled(*each, big) for each in zip(shapes, middles, radii, turns, strict=True)]

    if about[RELATION] == "in front of":
        for factor in OVERLAPS:
            x, y = (factor * sum(radii) / 2 * each for each in (math.cos(way), math.sin(way)))
            first, second = outlines([(0.5 + x + shift, 0.5 + y), (0.5 - x + shift, 0.5 - y)])
            if (first & second).sum() >= HIDDEN * min(first.sum(), second.sum()):
                break
    else:
        ends = [(0.5 - along / 2 + shift, 0.5 + across[0]), (0.5 + along / 2 + shift, 0.5 + across[1])]
        first, second = outlines([end[::-1] if about[RELATION] == "above" else end for end in ends])
    ground, seen = synthetic.backdrop(about["background"], image_size, rng), []
    pixels = (1 - _shrunk(first | second)) * ground
    for mask, role, dark in zip((first, second & ~first), (FIRST, SECOND), textures, strict=True):
        colour, cover, tone = synthetic.shade(about[role + "colour"], rng), _shrunk(mask), _shrunk(mask & dark)
        pixels = pixels + (cover - (1 - DARK) * tone) * colour
        seen.append(cover[..., 0] > 0.51)  # half is 128 / 255: a pixel is seen of one object at most
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8), np.stack(seen)


def _shrunk(mask: np.ndarray) -> np.ndarray:
    """bool (big,big) -> the share of each pixel that is covered: (S,S,1), 0 to 1."""
    picture = Image.fromarray(mask.astype(np.uint8) * 255).reduce(OVERSAMPLING)
    return np.asarray(picture, dtype=np.float64)[..., None] / 255


def _filled(shape: str, middle: tuple[float, float], radius: float, turn: float, big: int) -> np.ndarray:
    """Where a shape is, on a canvas of `big` pixels: bool (big,big). Middle and radius in image widths."""
    mask, (cos, sin) = Image.new("1", (big, big), 0), (math.cos(turn), math.sin(turn))
    draw, r, (cx, cy) = ImageDraw.Draw(mask), big * radius, (big * each for each in middle)
    draw.polygon([(cx + r * (x * cos - y * sin), cy + r * (x * sin + y * cos)) for x, y in OUTLINES[shape]], 1)
    if shape == "ring":
        draw.polygon([(cx + r * x, cy + r * y) for x, y in _circle(0.5)], 0)
    return np.asarray(mask)


def _texture(name: str, big: int, rng: np.random.Generator) -> np.ndarray:
    """Where the darker tone of a texture is, on a canvas of `big` pixels: bool (big,big)."""
    u, v = (axis / (big * PERIOD) + phase for axis, phase in zip(np.ogrid[0:big, 0:big], rng.random(2), strict=True))
    if name == "striped":
        return (u + v) / math.sqrt(2) % 1 < 0.5
    if name == "checkered":
        return (u % 1 < 0.5) ^ (v % 1 < 0.5)
    if name == "dotted":
        return (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.3**2
    return np.zeros((big, big), bool)


def say(attributes: Mapping[str, str], named: Collection[str], rng: np.random.Generator) -> str:
    """A caption that names these attributes alone: wording, and which object comes first, are drawn."""
    words = {name: attributes[name] for name in named}
    roles = [role for role in (FIRST, SECOND) if RELATION in words or any(name.startswith(role) for name in words)]
    if len(roles) == 2 and rng.random() < 0.5:
        roles.reverse()
        words |= {RELATION: INVERSE[words[RELATION]]} if RELATION in words else {}
    for place, role in zip("ab", roles, strict=False):
        own = {name.removeprefix(role): value for name, value in words.items() if name.startswith(role)}
        phrase = fill(PHRASES[rng.integers(len(PHRASES))], {"shape": "shape", **own})
        words[place] = phrase if own or place == "a" else "another shape"
    wordings = WITH_RELATION if RELATION in words else WITHOUT if roles else BARE
    return fill(wordings[rng.integers(len(wordings))], words)


def records(
    image_size: int = 48,
    train_images: int = 4096,
    test_images: int = 512,
    seed: int = 0,
    validation_images: int = 0,
    **used: Any,
) -> Iterator[Record]:
    """Yield the set, image after image, each from a seed of its own: a longer set begins like a shorter one.

    A record's mask is where either object is; `render` gives each one's. Raises SettingsError for images under 24 px.
    """
    if image_size < 24:
        raise SettingsError(f"data.resize={image_size}: two objects and their textures need at least 24 px")
    counts = dict(train=train_images, test=test_images, validation=validation_images)
    for stream, (name, count) in enumerate(counts.items(), start=2):
        for i in range(count):
            attributes = drawn(name, i, seed, **used)
            pixels, masks = render(attributes, image_size, np.random.default_rng([seed, stream, i]))
            words = np.random.default_rng([seed, stream, i, 5])
            named = tuple(some_of(list(attributes), words) for _ in range(CAPTIONS))
            captions = tuple(say(attributes, each, words) for each in named)
            about: dict[str, Any] = dict(attributes=attributes, mask=masks.any(0), named=named)
            yield Record(f"{name}/{i:06d}", name, captions, i // 2 if name == "train" else -1, pixels=pixels, **about)
