"""CelebA faces, complete, partial or our CelebA-tiny, with captions made from the 40 attributes.

CelebA-tiny. The paper does not say how large it is or how it was chosen. Ours: by file name, the first two images of
each identity (so that few people are not most of the set), and of those the first 6,000, or as many as are there.

Split. By identity, so nobody is in both: an identity is test if the first 8 hex digits of the sha256 of "identity N",
read as a number, are divisible by 5 (about 20 %). With tiny=False and a list_eval_partition.txt, the official partition
instead: 0 and 1 (training and validation) are train, 2 is test.

Captions. The attributes become phrases; a caption draws some of them and one of four sentences, by a generator seeded
with the file name alone, so it depends neither on the order nor on the other files. "Attractive" (an opinion), "Blurry"
(about the photograph) and both of two attributes that exclude each other (wavy and straight, bald and bangs) are left
out. The sex is the attribute "Male" as the set's annotators ticked it; "older" is its "not Young".
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd

from ratlip.data.layout import Source, fields, find_root, finish, read_rows, read_text, root_problems
from ratlip.data.records import Problems, Record, Records

SOURCE = Source(
    name="faces (CelebA)",
    parts=("img_align_celeba",),
    layout="""\
  faces/
    img_align_celeba/000001.jpg ...
    list_attr_celeba.txt         40 attributes of each image
    identity_CelebA.txt          who is on each image
    list_eval_partition.txt      optional: the official partition
  or as it comes: faces/Img/img_align_celeba/, faces/Anno/ and faces/Eval/ with these lists""",
    by_hand="""\
By hand (CelebA is for non-commercial research, and asks for agreement to its terms), from
https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html:
  1. img_align_celeba.zip ("Align&Cropped Images", 1.4 GB), unpacked.
  2. list_attr_celeba.txt ("Attributes Annotations") and, if wanted, list_eval_partition.txt.
  3. identity_CelebA.txt ("Identities Annotations"); the identities may have to be asked for.""",
    needed=(
        ("img_align_celeba", "Img/img_align_celeba"),
        ("list_attr_celeba.txt", "Anno/list_attr_celeba.txt"),
        ("identity_CelebA.txt", "Anno/identity_CelebA.txt"),
    ),
    licence="Photographs of people found on the web; CelebA's agreement allows non-commercial research alone, and no "
    "copying on of pictures.",
)
COMPLETE = {"images": 202599, "identities": 10177}
TINY_SIZE, TINY_PER_IDENTITY, TEST_SHARE = 6000, 2, 5
OFFICIAL_SPLITS = {"0": "train", "1": "train", "2": "test"}
ATTRIBUTES = frozenset(
    """5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair
    Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male
    Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks
    Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace
    Wearing_Necktie Young""".split()
)
PHRASES = {  # what attributes are called, by their part in a sentence
    part: dict(pair.split(": ") for pair in pairs.split("; "))
    for part, pairs in {
        "texture": "Wavy_Hair: wavy; Straight_Hair: straight",
        "colour": "Black_Hair: black; Blond_Hair: blond; Brown_Hair: brown; Gray_Hair: gray",
        "beside": "Bangs: bangs; Receding_Hairline: a receding hairline; Sideburns: sideburns",
        "eyebrows": "Bushy_Eyebrows: bushy; Arched_Eyebrows: arched",
        "nose": "Big_Nose: big; Pointy_Nose: pointy",
        "face": "Bags_Under_Eyes: bags under the eyes; Narrow_Eyes: narrow eyes; Big_Lips: full lips; "
        "High_Cheekbones: high cheekbones; Rosy_Cheeks: rosy cheeks; Oval_Face: an oval face; "
        "Double_Chin: a double chin; Pale_Skin: pale skin",
        "beard": "Goatee: a goatee; Mustache: a mustache; 5_o_Clock_Shadow: a five o'clock shadow",
        "worn": "Eyeglasses: eyeglasses; Wearing_Hat: a hat; Wearing_Earrings: earrings; Wearing_Necklace: a necklace; "
        "Wearing_Necktie: a necktie; Wearing_Lipstick: lipstick; Heavy_Makeup: heavy makeup",
        "smiling": "Smiling: smiling",
    }.items()
}


def read(root: str | Path, tiny: bool = True, size: int = TINY_SIZE, captions_per_image: int = 10) -> Records:
    """Faces by file name as records with made captions and the identity as label.

    tiny takes CelebA-tiny (`size` images) instead of all. Raises DataError that lists every problem with its path.
    """
    root = find_root(root, SOURCE)
    folder, home = root / "img_align_celeba", root.parent if root.name == "Img" else root
    problems = root_problems(home, "the faces")

    def table(name: str) -> Path:
        places = [home / inside / name for inside in ("", "Anno", "Eval")]  # the last two: as CelebA's own folders are
        return next((path for path in places if path.is_file()), root / name)

    positives = _read_attributes(table("list_attr_celeba.txt"), problems)
    identities = read_rows(table("identity_CelebA.txt"), fields(str, int), "'image identity'", problems)
    on_disk = {path.name for path in folder.iterdir()}
    who = {name: (identities or {}).get(name, -1) for name in sorted(positives)}
    for name in who:
        if name not in on_disk:
            problems.add(folder / name, "the image is missing, list_attr_celeba.txt names it")
        if identities is not None and name not in identities:
            problems.add(table("identity_CelebA.txt"), f"there is no identity for {name}")
    partition, official, records = table("list_eval_partition.txt"), None, []
    if not tiny and partition.is_file():
        official = read_rows(partition, fields(str, OFFICIAL_SPLITS.get), "'image partition'", problems)
    for name in tiny_subset(who, size) if tiny else who:
        split = split_of_identity(who[name]) if official is None else official.get(name)
        if split is None:
            problems.add(partition, f"there is no partition (0, 1 or 2) for {name}")
        captions = caption_image(name, positives[name], captions_per_image)
        records.append(Record(Path(name).stem, split or "train", captions, who[name], folder / name))
    by_identity = f"identity-disjoint: test if {TEST_SHARE} divides the first 8 hex digits of sha256('identity N')"
    by_name = f"by file name, the first {TINY_PER_IDENTITY} images of each identity, then the first {size}"
    rule = by_identity if official is None else "official list_eval_partition.txt: 0 and 1 are train, 2 is test"
    about = {"tiny": tiny, "split": rule, "rule": by_name if tiny else "all images of list_attr_celeba.txt"}
    about |= {"expected_images": size if tiny else COMPLETE["images"], "found_images": len(records)}
    about |= {"captions": f"up to {captions_per_image} an image, made from the attributes: see ratlip.data.faces"}
    about |= {"complete_set": COMPLETE, "images_without_attributes": len(on_disk - positives.keys())}
    return finish(records, problems, about)


def tiny_subset(identities: dict[str, int], size: int = TINY_SIZE) -> list[str]:
    """The file names of CelebA-tiny among {file name: identity}: see the module's text for the rule."""
    people = pd.Series(identities, dtype=object).sort_index()
    return people.groupby(people).head(TINY_PER_IDENTITY).index[:size].tolist()


def split_of_identity(identity: int) -> str:
    """ "train" or "test", by the hash of the identity's number."""
    digest = hashlib.sha256(f"identity {identity}".encode()).hexdigest()
    return "test" if int(digest[:8], 16) % TEST_SHARE == 0 else "train"


def _read_attributes(path: Path, problems: Problems) -> dict[str, frozenset[str]]:
    """{file name: names of the attributes that are 1} of list_attr_celeba.txt."""
    count, header, *rows = [*(read_text(path) if path.is_file() else "").split("\n"), ""]
    names, listed = header.split(), len(list(filter(str.strip, rows)))

    def parse(line: str) -> tuple[str, frozenset[str]]:
        image, *values = line.split()
        if not {"1", "-1"}.issuperset(values):
            raise ValueError(line)
        return image, frozenset(name for name, value in zip(names, values, strict=True) if value == "1")

    if path.is_file() and not ATTRIBUTES <= set(names):
        missing = ", ".join(sorted(ATTRIBUTES - set(names))[:5])
        problems.add(f"{path}:2", f"expected the names of the 40 attributes; {missing} ... are not there")
        return {}
    found = read_rows(path, parse, f"a file name and {len(names)} values 1 or -1", problems, header=2)
    if found and count.strip() != str(listed):
        problems.add(f"{path}:1", f"says that there are {count.strip()!r} images, there are {listed} rows")
    return found or {}


def caption_image(name: str, attributes: Iterable[str], number: int = 10) -> tuple[str, ...]:
    """Up to `number` different captions (at least one) of the image called `name` with these attributes.

    Few attributes give few different sentences. Seeded by `name` alone.
    """
    draw = random.Random(name).random  # the one method whose sequence Python guarantees for all versions
    phrases = _phrases(frozenset(attributes))
    captions: dict[str, None] = {}
    for _ in range(4 * number):
        if len(captions) < number:
            captions[_sentence(phrases, draw)] = None
    return tuple(captions)


def _phrases(has: frozenset[str]) -> dict[str, list[str]]:
    """The phrases that the attributes allow, by their part in a sentence; under "hair", the hair itself comes first."""

    def said(part: str) -> list[str]:
        return [phrase for attribute, phrase in PHRASES[part].items() if attribute in has]

    male, bald, beard, texture, colours = "Male" in has, "Bald" in has, said("beard"), said("texture"), said("colour")
    shaven = male and "No_Beard" in has and not beard and "Sideburns" not in has
    bearded = male and "No_Beard" not in has and not beard
    hair = ["a bald head"] if bald and not (colours or texture or "Bangs" in has) else []
    if not bald and (colours or len(texture) == 1):
        words = [*(texture if len(texture) == 1 else []), " and ".join(colours), "hair"]
        hair = [" ".join(filter(None, words))]
    eyebrows, nose = (", ".join(said(part)) for part in ("eyebrows", "nose"))
    pairs = [f"{eyebrows} eyebrows"] * bool(eyebrows) + [f"a {nose} nose"] * bool(nose)
    return {
        "noun": ["man" if male else "woman"],
        "age": ["young" if "Young" in has else "older"],
        "build": ["chubby"] * ("Chubby" in has) + ["clean-shaven"] * shaven,
        "hair": hair + [phrase for phrase in said("beside") if not bald or phrase == "sideburns"],
        "face": pairs + said("face") + beard + ["a beard"] * bearded,
        "worn": said("worn"),
        "smiling": said("smiling"),
        "mouth": [f"{'his' if male else 'her'} mouth slightly open"] * ("Mouth_Slightly_Open" in has),
    }


def _some(phrases: Sequence[str], most: int, draw: Callable[[], float]) -> list[str]:
    """None to `most` of the phrases, in random order."""
    return sorted(phrases, key=lambda phrase: draw())[: int(draw() * (most + 1))]


def _listed(items: Sequence[str]) -> str:  # "a", "a and b", "a, b and c"
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _sentence(phrases: dict[str, list[str]], draw: Callable[[], float]) -> str:
    """One caption; how often each part of it is named stands at its draw."""
    age = phrases["age"] if draw() < 0.8 else []
    subject = " ".join([*age, *(word for word in phrases["build"] if draw() < 0.5), *phrases["noun"]])
    hair, details = phrases["hair"][:1], phrases["hair"][1:]
    features = [*(hair if draw() < 0.9 else []), *_some(details, 2, draw), *_some(phrases["face"], 2, draw)]
    worn = _some(phrases["worn"], 2, draw)
    smiling = bool(phrases["smiling"]) and draw() < 0.8
    mouth = phrases["mouth"] if draw() < 0.8 else []
    form = int(draw() * 4)
    has = [f"has {_listed(features)}"] if features else []
    wears = [f"wears {_listed(worn)}"] if worn else []
    ending = ["is smiling"] if smiling else []
    if form == 1 and has + wears + ending:  # this older man has ..., wears ... and is smiling
        return f"this {subject} {_listed(has + wears + (ending or [f'has {m}' for m in mouth]))}"
    if form == 2:  # a photo of a smiling young woman who has ... and wears ...
        facts = has + wears + ([] if has else [f"has {m}" for m in mouth])
        who = f" who {' and '.join(facts)}" if facts else ""
        return f"a photo of {_a('smiling ' * smiling + subject)}{who}"
    if form == 3 and worn and has:  # a young man wearing ... has ... and is smiling
        return f"{_a(subject)} wearing {_listed(worn)} {_listed(has + ending)}"
    parts = [f"{_a(subject)} with {_listed(features)}" if features else _a(subject)]
    parts += [f"wearing {_listed(worn)}"] if worn else []
    parts += ["smiling" + (f" with {mouth[0]}" if mouth else "")] if smiling else [f"with {m}" for m in mouth]
    return ", ".join(parts)
