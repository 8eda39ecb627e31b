"""CUB-200-2011 birds with the captions of Reed et al. (2016), complete or partial, in the official layout.

The split is the class-disjoint one of the text-to-image line (150 classes to train, 50 to test), from
`train/filenames.pickle` and `test/filenames.pickle`; `train_test_split.txt`, made for classification, is not used.
Each image is cropped to about 1.5 bounding boxes (`ratlip.data.records.published_crop`).
"""

from __future__ import annotations

from pathlib import Path

from ratlip.data.layout import (
    Remote,
    Source,
    fields,
    find_root,
    finish,
    published_split,
    read_captions,
    read_rows,
    root_problems,
)
from ratlip.data.records import Record, Records

# CaltechDATA record 20098. The sha256 is torchvision's (prototype/datasets/_builtin/cub200.py); the file has the md5
# 97eceeb196236b17998738112f37df78 that most other loaders state, and 1,150,585,339 bytes.
CALTECH = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
SHA256 = "sha256:0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081"
SOURCE = Source(
    name="birds (CUB-200-2011)",
    parts=("CUB_200_2011", "text", "train", "test"),
    layout="""\
  birds/
    CUB_200_2011/images/<class>/<image>.jpg
    CUB_200_2011/{images,bounding_boxes,image_class_labels,classes}.txt
    text/<class>/<image>.txt         captions, one a line
    train/filenames.pickle           names of the images of each split
    test/filenames.pickle""",
    by_hand="""\
By hand, into the same folder:
  1. The captions of Reed et al. (2016) and the class-disjoint split, as AttnGAN packs them: follow
     "preprocessed metadata for birds" in the README of https://github.com/taoxugit/AttnGAN (Google Drive),
     and unpack it (and the text.zip in it, if there is one). It gives text/, train/filenames.pickle and
     test/filenames.pickle.""",
    needed=(("text",), ("train/filenames.pickle", "trainvalclasses.txt")),
    licence="Photographs found on Flickr, each its owner's; given away for research, and no licence that covers them "
    "is stated.",
    fetched=(Remote(CALTECH, SHA256, "CUB_200_2011", 1_150_585_339),),
)
COMPLETE = {"images": 11788, "train": 8855, "test": 2933}


def read(root: str | Path) -> Records:
    """All images of `images.txt` that the split names, in its order, as records with box, captions and label.

    Labels are the official class numbers (from 1). `root` may also be a folder that holds the root, or the folder
    CUB_200_2011 in it. Raises DataError that lists every problem with its path.
    """
    root = find_root(root, SOURCE)
    cub, texts, problems = root / "CUB_200_2011", root / "text", root_problems(root, "the birds")
    names = read_rows(cub / "images.txt", fields(int, str), "'image_id image_name'", problems) or {}
    labels = read_rows(cub / "image_class_labels.txt", fields(int, int), "'image_id class_id'", problems)
    classes = read_rows(cub / "classes.txt", fields(int, str), "'class_id class_name'", problems) or {}
    numbers = fields(int, float, float, float, float)
    boxes = read_rows(cub / "bounding_boxes.txt", numbers, "'image_id x y width height'", problems)
    images = {number: name.rsplit(".", 1)[0] for number, name in names.items()}
    problems.add_repeated(cub / "images.txt", images.values())
    splits, rule = published_split(root, set(images.values()), "is no image of images.txt", problems) or (None, "")
    if splits is None:
        wanted = root / "train" / "filenames.pickle"
        problems.add(wanted, "the list of the split is missing, and so is that of test/; see `ratlip download birds`")
        splits = dict.fromkeys(images.values(), "train")
    if not texts.is_dir():
        problems.add(texts, "the folder of the captions is missing; see `ratlip download birds`")

    records = []
    for number, key in images.items():
        name, path, folder = names[number], cub / "images" / names[number], key.split("/")[0]
        if not path.is_file():
            problems.add(path, "the image file is missing")
        for file, table, what in (("bounding_boxes", boxes, "box"), ("image_class_labels", labels, "class")):
            if table is not None and number not in table:
                problems.add(cub / f"{file}.txt", f"there is no {what} for image {number} ({name})")
        label, box = (labels or {}).get(number, -1), (boxes or {}).get(number)
        if classes.get(label, folder) != folder:
            problems.add(cub / "image_class_labels.txt", f"image {number} ({name}) is said to be {classes[label]}")
        captions = read_captions(texts / f"{key}.txt", problems) if texts.is_dir() else ()
        if split := splits.get(key, splits.get(folder)):
            records.append(Record(key, split, captions, label, path, box=box))
    about = {"split": rule, "crop": "square of 1.5 bounding boxes, clipped to the image", "complete_set": COMPLETE}
    return finish(records, problems, {**about, "images_in_no_split": len(images) - len(records)})
