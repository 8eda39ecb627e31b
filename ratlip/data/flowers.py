"""Oxford-102 flowers with the captions of Reed et al. (2016), complete or partial, in the official layout.

Split: `train/filenames.pickle` and `test/filenames.pickle` where they are, else `trainvalclasses.txt` and
`testclasses.txt` (Reed et al.: 82 classes to train, 20 to test), else our own rule of the same proportion:
the 20 of the 102 classes whose sha256 of "class_00001" ... "class_00102" is smallest are test. The rule looks
at the class number alone, so a class is in the same split however many images there are. It is not the
published list of classes.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path

from scipy.io import loadmat

from ratlip.data.layout import class_split, find_root, finish, pickled_split, read_captions, read_text
from ratlip.data.records import Problems, Record, Records

PARTS = ("jpg", "text_c10", "train", "test")
LAYOUT = """\
  flowers/
    jpg/image_00001.jpg ...
    text_c10/class_00077/image_00001.txt ...   captions, one a line
    trainvalclasses.txt, testclasses.txt       optional, from Reed et al.
    (or train/filenames.pickle, test/filenames.pickle)"""
COMPLETE = {"images": 8189, "classes": 102}
CLASSES, TEST_CLASSES = 102, 20


def own_test_classes() -> frozenset[int]:
    """The class numbers that our own rule puts into the test split."""

    def digest(number: int) -> str:
        return hashlib.sha256(f"class_{number:05d}".encode()).hexdigest()

    return frozenset(sorted(range(1, CLASSES + 1), key=digest)[:TEST_CLASSES])


def read(root: str | Path, human_captions_only: bool = False) -> Records:
    """All flowers, sorted by name, as records with captions and the official class number (from 1) as label.

    human_captions_only leaves out the images that a `manifest.tsv` in the root marks as having template
    captions; without that file all captions count as human, as they are in the official set. An
    `imagelabels.mat` in the root is only compared with the class folders. Raises DataError that lists every
    problem with its path.
    """
    root = find_root(root, "flowers (Oxford-102)", PARTS, LAYOUT)
    problems = Problems(f"the flowers in {root}")
    kinds = _caption_kinds(root / "manifest.tsv", problems)
    images = {path.stem: path for path in sorted((root / "jpg").glob("*.jpg"))}
    texts = _caption_files(root / "text_c10", problems)
    _check_labels(root / "imagelabels.mat", texts, problems)
    split_of, rule = _split_rule(root, set(images), problems)

    records, used, unlisted = [], Counter(), 0
    for key in sorted(images.keys() | texts.keys()):
        kind = kinds.get(key, "not in manifest.tsv" if kinds else "human")
        if human_captions_only and kind != "human":
            continue
        if key not in images:
            problems.add(root / "jpg" / f"{key}.jpg", f"the image of {texts[key][1].relative_to(root)} is missing")
            continue
        if key not in texts:
            if (root / "text_c10").is_dir():
                problems.add(root / "text_c10" / "class_?????" / f"{key}.txt", "the caption file is missing")
            label, captions = -1, ()
        else:
            label, file = texts[key]
            captions = read_captions(file, problems)
        split = split_of(key, label)
        if split is None:
            unlisted += 1
            continue
        used[kind] += 1
        records.append(Record(key, split, captions, label, images[key]))
    about = {
        "split": rule,
        "human_captions_only": human_captions_only,
        "caption_kinds": dict(used),
        "complete_set": COMPLETE,
        "images_in_no_split": unlisted,
    }
    return finish(records, problems, about)


def _caption_files(folder: Path, problems: Problems) -> dict[str, tuple[int, Path]]:
    """{image: (class number, caption file)} of text_c10; other files (Reed et al. ship features) are left."""
    if not folder.is_dir():
        problems.add(folder, "the folder of the captions is missing; see `ratlip download flowers`")
        return {}
    found: dict[str, tuple[int, Path]] = {}
    for path in sorted(folder.glob("class_*/image_*.txt")):
        number = re.fullmatch(r"class_(\d+)", path.parent.name)
        if not number:
            problems.add(path.parent, "expected a folder name like class_00001")
        elif path.stem in found:
            problems.add(path, f"{path.stem} has captions in {found[path.stem][1].parent.name} too")
        else:
            found[path.stem] = int(number[1]), path
    return found


def _check_labels(path: Path, texts: dict[str, tuple[int, Path]], problems: Problems) -> None:
    """Compare the class folders with the official labels (the first is that of image_00001), if any."""
    if not path.is_file():
        return
    try:
        labels = loadmat(path)["labels"].ravel()
    except Exception as error:  # scipy raises many classes for damaged files
        problems.add(path, f"cannot be read ({error})")
        return
    for key, (label, file) in texts.items():
        position = int(key.split("_")[1]) - 1 if re.fullmatch(r"image_\d+", key) else -1
        if 0 <= position < len(labels) and labels[position] != label:
            problems.add(file, f"lies in class {label}, imagelabels.mat says {labels[position]}")


def _split_rule(root: Path, images: set[str], problems: Problems):
    """A function (image, class number) -> "train", "test" or None (in no split), and the rule in words."""
    named = pickled_split(root, problems)
    if named is not None:
        by_image = {Path(name).stem: split for name, split in named.items()}  # some lists say jpg/image_00001
        for name in by_image.keys() - images:
            problems.add(root / by_image[name] / "filenames.pickle", f"{name} has no image in jpg/")
        return lambda key, label: by_image.get(key), "train/, test/filenames.pickle"
    by_class = class_split(root, problems)
    if by_class is not None:
        return (
            lambda key, label: by_class.get(f"class_{label:05d}"),
            "published class-disjoint split (trainvalclasses.txt, testclasses.txt)",
        )
    test = own_test_classes()
    return (
        lambda key, label: "test" if label in test else "train",
        "own class-disjoint rule: test = the 20 of 102 classes with the smallest sha256 of their folder",
    )


def _caption_kinds(path: Path, problems: Problems) -> dict[str, str]:
    """{image: "human" or "template"} of manifest.tsv, empty if there is none."""
    if not path.is_file():
        return {}
    header, *lines = read_text(path).split("\n")
    columns = header.split("\t")
    if not {"name", "caption_kind"} <= set(columns):
        problems.add(f"{path}:1", f"expected columns 'name' and 'caption_kind', found {header!r}")
        return {}
    kinds = {}
    for number, line in enumerate(lines, start=2):
        fields = line.strip().split("\t")
        if len(fields) == len(columns):
            row = dict(zip(columns, fields, strict=True))
            kinds[Path(row["name"]).stem] = row["caption_kind"]
        elif line.strip():
            problems.add(f"{path}:{number}", f"expected {len(columns)} columns, found {line.strip()!r}")
    return kinds
