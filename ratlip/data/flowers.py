"""Oxford-102 flowers with the captions of Reed et al. (2016), complete or partial, in the official layout.

Split: `train/filenames.pickle` and `test/filenames.pickle` where they are, else `trainvalclasses.txt` and
`testclasses.txt` (Reed et al.: 82 classes to train, 20 to test), else our own rule of the same proportion, which is not
the published list: the 20 of the 102 classes whose sha256 of "class_00001" ... "class_00102" is smallest are test.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path

from scipy.io import loadmat

from ratlip.data.layout import (
    Remote,
    Source,
    find_root,
    finish,
    published_split,
    read_captions,
    read_rows,
    read_text,
    root_problems,
)
from ratlip.data.records import Problems, Record, Records

OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
SOURCE = Source(
    name="flowers (Oxford-102)",
    parts=("jpg", "text_c10", "train", "test"),
    layout="""\
  flowers/
    jpg/image_00001.jpg ...
    text_c10/class_00077/image_00001.txt ...   captions, one a line
    trainvalclasses.txt, testclasses.txt       optional, from Reed et al.
    (or train/filenames.pickle, test/filenames.pickle)""",
    by_hand="""\
By hand, into the same folder:
  1. The captions of Reed et al. (2016): follow "Download the birds and flowers data" (flowers) in the README
     of https://github.com/reedscot/cvpr2016 (Google Drive). It gives text_c10/; put trainvalclasses.txt and
     testclasses.txt beside it if they come with it, for the published split.""",
    needed=(("text_c10",),),
    licence="Photographs found on the web, each its owner's; given away for research, and no licence that covers them "
    "is stated.",
    fetched=(  # both md5 are those of torchvision.datasets.Flowers102 (a test compares them)
        Remote(OXFORD + "102flowers.tgz", "md5:52808999861908f626f3c1f4e79d11fa", "jpg", 344_862_509),
        Remote(OXFORD + "imagelabels.mat", "md5:e0620be6f572b9609742df49c70aed4d", "imagelabels.mat", 502),
    ),
)
COMPLETE = {"images": 8189, "classes": 102}
CLASSES, TEST_CLASSES = 102, 20


def own_split() -> dict[str, str]:
    """{class folder: "train" or "test"} by our own rule."""
    folders = [f"class_{number:05d}" for number in range(1, CLASSES + 1)]
    test = sorted(folders, key=lambda folder: hashlib.sha256(folder.encode()).hexdigest())[:TEST_CLASSES]
    return dict.fromkeys(folders, "train") | dict.fromkeys(test, "test")


def read(root: str | Path, human_captions_only: bool = False) -> Records:
    """All flowers, sorted by name, as records with captions and the official class number (from 1) as label.

    human_captions_only leaves out the images that a `manifest.tsv` in the root marks as having template captions;
    without that file all captions count as human, as they are in the official set. An `imagelabels.mat` in the root is
    only compared with the class folders. Raises DataError that lists every problem with its path.
    """
    root = find_root(root, SOURCE)
    problems = root_problems(root, "the flowers")
    kinds = _caption_kinds(root / "manifest.tsv", problems)
    images = {path.stem: path for path in sorted((root / "jpg").glob("*.jpg"))}
    texts = _caption_files(root / "text_c10", problems)
    _check_labels(root / "imagelabels.mat", texts, problems)
    own = own_split(), "own class-disjoint rule: test = the 20 of 102 classes with the smallest sha256 of their folder"
    published = published_split(root, images, "has no image in jpg/", problems, key=lambda name: Path(name).stem)
    splits, rule = published or own

    records, unlisted, used = [], 0, Counter[str]()
    for key in sorted(images.keys() | texts.keys()):
        kind = kinds.get(key, "not in manifest.tsv" if kinds else "human")
        label, file = texts.get(key, (-1, root / "text_c10" / "class_?????" / f"{key}.txt"))
        if human_captions_only and kind != "human":
            continue
        if key not in images:
            problems.add(root / "jpg" / f"{key}.jpg", f"the image of {file.relative_to(root)} is missing")
            continue
        captions = read_captions(file, problems) if (root / "text_c10").is_dir() else ()
        if split := splits.get(key, splits.get(f"class_{label:05d}")):
            used[kind] += 1
            records.append(Record(key, split, captions, label, images[key]))
        else:
            unlisted += 1
    about = {"split": rule, "human_captions_only": human_captions_only, "caption_kinds": dict(used)}
    return finish(records, problems, {**about, "complete_set": COMPLETE, "images_in_no_split": unlisted})


def _caption_files(folder: Path, problems: Problems) -> dict[str, tuple[int, Path]]:
    """{image: (class number, caption file)} of text_c10; other files (Reed et al. ship features) are left."""
    found: dict[str, tuple[int, Path]] = {}
    if not folder.is_dir():
        problems.add(folder, "the folder of the captions is missing; see `ratlip download flowers`")
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
        labels = dict(enumerate(loadmat(path)["labels"].ravel(), start=1))
    except Exception as error:  # scipy raises many classes for damaged files
        problems.add(path, f"cannot be read ({error})")
        return
    for key, (label, file) in texts.items():
        number = re.fullmatch(r"image_(\d+)", key)
        if number and labels.get(int(number[1]), label) != label:
            problems.add(file, f"lies in class {label}, imagelabels.mat says {labels[int(number[1])]}")


def _caption_kinds(path: Path, problems: Problems) -> dict[str, str]:
    """{image: "human" or "template"} of manifest.tsv, empty if there is none."""
    if not path.is_file():
        return {}
    header = read_text(path).split("\n")[0]
    columns = header.split("\t")

    def parse(line: str) -> tuple[str, str]:
        row = dict(zip(columns, line.split("\t"), strict=True))
        return Path(row["name"]).stem, row["caption_kind"]

    if {"name", "caption_kind"} <= set(columns):
        return read_rows(path, parse, f"{len(columns)} columns", problems, header=1) or {}
    problems.add(f"{path}:1", f"expected columns 'name' and 'caption_kind', found {header!r}")
    return {}
