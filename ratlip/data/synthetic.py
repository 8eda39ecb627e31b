"""A generated, captioned set whose truth is known: one object, with kind, colour, size, place and background.

On photographs nobody can say which share of a caption a generated image shows. Here a classifier can check every
attribute (`ratlip.scores.judge`), and the object's mask is known, so "where does the network look" has a right answer.

An image is one of 960 combinations of attributes with position, scale, rotation, shade and a faint background gradient
drawn at random. One combination in `HELD_OUT`, drawn by the seed, belongs to the test split: its captions are never
seen in training, although each of its attributes is. So does another one to the validation split, if that is asked for.

With `named` "subset", a caption names a random part of the attributes: one to all of them, each number as often as the
others, in one of the wordings of `PARTIAL`. What it leaves open is left to the latent z.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from ratlip.data.records import Record
from ratlip.errors import SettingsError

OBJECTS = ("ring", "cross", "triangle", "square")
COLOURS = {"red": (214, 39, 40), "orange": (250, 140, 20), "yellow": (245, 220, 40), "green": (40, 160, 60)}
COLOURS |= {"cyan": (60, 205, 215), "blue": (40, 80, 220), "purple": (130, 50, 170), "pink": (245, 130, 190)}
SIZES = {"small": 0.5, "large": 0.76}  # width of the object / width of the image
PLACES = {"left": 0.37, "centre": 0.5, "right": 0.63}  # centre of the object / width of the image
BACKGROUNDS = {"white": (245, 245, 245), "black": (15, 15, 15), "grey": (125, 125, 125)}
BACKGROUNDS |= {"brown": (110, 72, 40), "navy": (18, 26, 84)}
VALUES = (OBJECTS, tuple(COLOURS), tuple(SIZES), tuple(PLACES), tuple(BACKGROUNDS))
ATTRIBUTES = dict(zip(("object", "colour", "size", "place", "background"), VALUES, strict=True))
W = 0.32  # half the width of a bar of the cross
OUTLINES = {  # x and y of the corners, in radii; a ring is drawn from circles instead
    "square": ((-0.88, 0.88, 0.88, -0.88), (-0.88, -0.88, 0.88, 0.88)),
    "triangle": ((0.0, 1.05, -1.05), (-1.0, 0.85, 0.85)),
    "cross": ((-W, W, W, 1, 1, W, W, -W, -W, -1, -1, -W), (-1, -1, -W, -W, W, W, 1, 1, W, W, -W, -W)),
}
HELD_OUT = 8
OVERSAMPLING = 4
FAINT = 25  # of 255: farther from its named colour than any drawn background gets (shade 8, gradient 10)

TEMPLATES = (
    "a {size} {colour} {object} {place} on a {background} background",
    "a {colour} {object} that is {size} , {place} , on {background}",
    "this {size} {object} is {colour} and sits {place} on a {background} background",
    "{place} there is a {size} {colour} {object} , the background is {background}",
    "a {background} picture with a {size} {colour} {object} {place}",
    "the {object} is {colour} and {size} , it is {place} , behind it all is {background}",
    "on {background} , {place} , a {size} {object} in {colour}",
    "a picture of a {size} {colour} {object} {place} against {background}",
    "one {size} {object} , {colour} , {place} , {background} background",
    "{size} {colour} {object} , {place} , on a {background} ground",
)
PARTIAL = (  # what stands in brackets goes where something in it is not named; see `fill`
    "a {size} {colour} {object} {place} [on a {background} background]",
    "one {colour} {object} [that is {size}] , {place} , [{background} background]",
    "{place} there is a {size} {colour} {object} , [the background is {background}]",
    "a {background} picture with a {size} {colour} {object} {place}",
    "the {object} [is {colour}] , [it is {size}] , {place} , [behind it all is {background}]",
    "[on {background}] , {place} , a {size} {object} [in {colour}]",
    "a picture of a {size} {colour} {object} {place} [against {background}]",
    "this is a {size} {colour} {object} , {place} , [on a {background} ground]",
)
PLACE_WORDS = {"left": "on the left", "centre": "in the centre", "right": "on the right"}


def caption(attributes: dict[str, str], template: int = 0) -> str:
    """The caption of an image with these attributes, in the wording number `template` (0 to 9)."""
    return TEMPLATES[template].format(**{**attributes, "place": PLACE_WORDS[attributes["place"]]})


def fill(wording: str, words: Mapping[str, str]) -> str:
    """A wording with these words put in: without a word for it, "{size}" goes, and "[in {colour}]" as a whole."""

    def whole(part: re.Match) -> str:
        return part[1] if set(re.findall(r"{(\w+)}", part[1])) <= set(words) else ""

    kept = re.sub(r"\[([^]]*)\]", whole, wording)
    text = re.sub(r"{(\w+)}", lambda field: words.get(field[1], ""), kept)
    text = re.sub(r"( *,)+", " ,", " ".join(text.split())).strip(" ,")
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def some_of(names: Sequence[str], rng: np.random.Generator) -> tuple[str, ...]:
    """A random part of these names, in their order: one to all of them, each number with the same chance."""
    chosen = rng.choice(len(names), rng.integers(1, len(names) + 1), replace=False)
    return tuple(names[i] for i in sorted(chosen))


def say(attributes: Mapping[str, str], named: Collection[str], rng: np.random.Generator) -> str:
    """A caption that names these attributes alone, in a wording drawn by `rng`."""
    words = {name: PLACE_WORDS[attributes[name]] if name == "place" else attributes[name] for name in named}
    return fill(PARTIAL[rng.integers(len(PARTIAL))], {"object": "shape", **words})


def attributes_of_set() -> dict[str, tuple[str, ...]]:
    """Names and values of the attributes."""
    return ATTRIBUTES


def complete(known: Mapping[str, str], rng: np.random.Generator) -> dict[str, str]:
    """All attributes of an image that a caption of these is true of; the others are drawn, each value alike."""
    return {name: known.get(name) or str(rng.choice(values)) for name, values in ATTRIBUTES.items()}


def combinations(seed: int = 0, validation: bool = False) -> dict[str, list[dict[str, str]]]:
    """All attribute combinations as `train` and `test` (one in `HELD_OUT`), in an order given by `seed`.

    `validation`: another one in `HELD_OUT` is taken from the training split for a split of that name.
    """
    every = [dict(zip(ATTRIBUTES, values, strict=True)) for values in itertools.product(*ATTRIBUTES.values())]
    shuffled = [every[i] for i in np.random.default_rng([seed, 1]).permutation(len(every))]
    cut = len(shuffled) // HELD_OUT
    more = {"validation": shuffled[cut : 2 * cut]} if validation else {}
    return {"test": shuffled[:cut], "train": shuffled[(1 + validation) * cut :], **more}


def render(attributes: dict[str, str], image_size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image: uint8 (S, S, 3), and the object's mask: bool (S, S)."""
    big = image_size * OVERSAMPLING
    radius = big * SIZES[attributes["size"]] / 2 * rng.uniform(0.94, 1.06)
    cx, cy = (big * (middle + rng.uniform(-0.03, 0.03)) for middle in (PLACES[attributes["place"]], 0.5))
    mask = Image.new("L", (big, big), 0)
    draw = ImageDraw.Draw(mask)
    if attributes["object"] == "ring":
        for r, value in ((radius, 255), (0.5 * radius, 0)):
            draw.ellipse([cx - r, cy - r, cx + r, cy + r], fill=value)
    else:
        angle = rng.uniform(-0.06, 0.06)  # in radians
        cos, sin = math.cos(angle), math.sin(angle)
        corners = zip(*OUTLINES[attributes["object"]], strict=True)
        draw.polygon([(cx + radius * (x * cos - y * sin), cy + radius * (x * sin + y * cos)) for x, y in corners], 255)
    mask = mask.resize((image_size, image_size), Image.Resampling.BOX)
    cover = np.asarray(mask, dtype=np.float64)[..., None] / 255

    colour = shade(attributes["colour"], rng)
    pixels = np.rint(cover * colour + (1 - cover) * backdrop(attributes["background"], image_size, rng))
    return np.clip(pixels, 0, 255).astype(np.uint8), cover[..., 0] > 0.5


def shade(colour: str, rng: np.random.Generator) -> np.ndarray:
    """A shade of a named colour: (3,), 0 to 255."""
    return np.clip(np.array(COLOURS[colour]) + rng.uniform(-12, 12, 3), 0, 255)


def backdrop(background: str, image_size: int, rng: np.random.Generator) -> np.ndarray:
    """A named background with a faint gradient: (S,S,3), about 0 to 255."""
    ground = np.array(BACKGROUNDS[background]) + rng.uniform(-8, 8)
    slope = rng.uniform(-10, 10, 2)
    yy, xx = np.mgrid[0:image_size, 0:image_size] / image_size - 0.5
    return ground + (slope[0] * xx + slope[1] * yy)[..., None]


def object_mask(pixels: np.ndarray, backgrounds: Sequence[str]) -> np.ndarray:
    """Where the object is on images whose background's name is known, by colour alone: bool (N,S,S).

    pixels uint8 (N,S,S,3), generated ones too; `backgrounds`: N names. A pixel belongs to the object where its distance
    d to the background's colour (the largest of the channels) exceeds half of that of the object (the 95th percentile
    of d: the smallest object fills more than 5 %), and `FAINT` at least. The set's own masks are exact (`Split.mask`).
    """
    if len(pixels) != len(backgrounds):
        raise ValueError(f"{len(pixels)} images and {len(backgrounds)} backgrounds: one each is needed")
    colours = np.array([BACKGROUNDS[name] for name in backgrounds], dtype=float).reshape(-1, 1, 1, 3)
    distance = np.abs(pixels - colours).max(axis=-1)
    high = np.quantile(distance, 0.95, axis=(1, 2), keepdims=True) if len(pixels) else 0
    return distance > np.maximum(high / 2, FAINT)


def records(
    image_size: int = 32,
    train_images: int = 4096,
    test_images: int = 512,
    seed: int = 0,
    named: str = "all",
    validation_images: int = 0,
) -> Iterator[Record]:
    """Yield the set, image after image, each from a seed of its own: a longer set begins like a shorter one.

    `named`: "all", or "subset" (see `say`). Raises SettingsError for images under 16 px.
    """
    if image_size < 16:
        raise SettingsError(f"data.resize={image_size}: the generated set needs at least 16 px to show an object")
    split, counts = combinations(seed, validation_images > 0), (train_images, test_images, validation_images)
    for name, count, stream in zip(("train", "test", "validation"), counts, (2, 3, 4), strict=True):
        if not count:
            continue
        for i, attributes in zip(range(count), itertools.cycle(split[name])):
            pixels, mask = render(attributes, image_size, np.random.default_rng([seed, stream, i]))
            captions, says = tuple(caption(attributes, template) for template in range(len(TEMPLATES))), None
            if named == "subset":
                words = np.random.default_rng([seed, stream, i, 5])
                says = tuple(some_of(list(ATTRIBUTES), words) for _ in TEMPLATES)
                captions = tuple(say(attributes, each, words) for each in says)
            key, label, about = f"{name}/{i:06d}", OBJECTS.index(attributes["object"]), dict(attributes)
            yield Record(key, name, captions, label, pixels=pixels, attributes=about, mask=mask, named=says)
