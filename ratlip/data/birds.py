"""CUB-200-2011 birds with the captions of Reed et al. (2016), complete or partial, in the official layout.

The split is the class-disjoint one of the text-to-image line (150 classes to train, 50 to test), from
`train/filenames.pickle` and `test/filenames.pickle`; `train_test_split.txt`, made for classification, is not
used.
Each image is cropped to about 1.5 bounding boxes (`ratlip.data.records.published_crop`).
"""

from __future__ import annotations

from pathlib import Path

from ratlip.data.layout import class_split, find_root, finish, pickled_split, read_captions, read_table
from ratlip.data.records import Problems, Record, Records

PARTS = ("CUB_200_2011", "text", "train", "test")
LAYOUT = """\
  birds/
    CUB_200_2011/images/<class>/<image>.jpg
    CUB_200_2011/{images,bounding_boxes,image_class_labels,classes}.txt
    text/<class>/<image>.txt         captions, one a line
    train/filenames.pickle           names of the images of each split
    test/filenames.pickle"""
COMPLETE = {"images": 11788, "train": 8855, "test": 2933}


def read(root: str | Path) -> Records:
    """All images of `images.txt` that the split names, in its order, as records with box, captions and label.

    Labels are the official class numbers (from 1). `root` may also be a folder that holds the root, or the
    folder CUB_200_2011 in it. Raises DataError that lists every problem with its path.
    """
    root = find_root(root, "birds (CUB-200-2011)", PARTS, LAYOUT)
    cub, problems = root / "CUB_200_2011", Problems(f"the birds in {root}")
    names = read_table(cub / "images.txt", (int, str), "image_id image_name", problems)
    labels = read_table(cub / "image_class_labels.txt", (int, int), "image_id class_id", problems)
    classes = read_table(cub / "classes.txt", (int, str), "class_id class_name", problems)
    boxes = read_table(
        cub / "bounding_boxes.txt", (int, float, float, float, float), "image_id x y width height", problems
    )
    splits, rule = _splits(root, names or {}, problems)
    if not (root / "text").is_dir():
        problems.add(root / "text", "the folder of the captions is missing; see `ratlip download birds`")

    records, unlisted, seen = [], 0, set()
    for number, name in (names or {}).items():
        path, key = cub / "images" / name, name.rsplit(".", 1)[0]
        if key in seen:
            problems.add(cub / "images.txt", f"the image {name} occurs twice")
        seen.add(key)
        if not path.is_file():
            problems.add(path, "the image file is missing")
        if boxes is not None and number not in boxes:
            problems.add(cub / "bounding_boxes.txt", f"there is no box for image {number} ({name})")
        if labels is not None and number not in labels:
            problems.add(cub / "image_class_labels.txt", f"there is no class for image {number} ({name})")
        label = (labels or {}).get(number, -1)
        if classes and label in classes and classes[label] != name.split("/")[0]:
            problems.add(cub / "image_class_labels.txt", f"image {number} ({name}) is said to be {classes[label]}")
        captions = read_captions(root / "text" / f"{key}.txt", problems) if (root / "text").is_dir() else ()
        if splits is not None and key not in splits:
            unlisted += 1
            continue
        split = (splits or {}).get(key, "train")
        records.append(Record(key, split, captions, label, path, box=(boxes or {}).get(number)))
    about = {
        "split": rule,
        "crop": "square of 1.5 bounding boxes, clipped to the image",
        "complete_set": COMPLETE,
        "images_in_no_split": unlisted,
    }
    return finish(records, problems, about)


def _splits(root: Path, names: dict[int, str], problems: Problems) -> tuple[dict[str, str] | None, str]:
    """{key: split} and the rule in words; names that have no image are problems."""
    keys = [name.rsplit(".", 1)[0] for name in names.values()]
    splits = pickled_split(root, problems)
    if splits is not None:
        known = set(keys)
        for name in splits:
            if names and name not in known:
                problems.add(root / splits[name] / "filenames.pickle", f"{name} is no image of images.txt")
        return splits, "published class-disjoint text-to-image split (train/, test/filenames.pickle)"
    by_class = class_split(root, problems)
    if by_class is not None:
        return (
            {key: by_class[key.split("/")[0]] for key in keys if key.split("/")[0] in by_class},
            "published class-disjoint split (trainvalclasses.txt, testclasses.txt)",
        )
    problems.add(
        root / "train" / "filenames.pickle",
        "the list of the split is missing, and so is that of test/; see `ratlip download birds`",
    )
    return None, ""
