"""The whole way on real photographs: a few classes of the shared birds, in the official layout."""

import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ratlip.data.layout import load_names
from ratlip.data.prepared import load_prepared
from ratlip.settings import load_settings
from ratlip.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.shared]

CLASSES = {"train": 3, "test": 2}
IMAGES = 20  # of each class
OVERRIDES = {
    "clip.steps": 20,
    "clip.warmup": 5,
    "clip.batch_size": 16,
    "training.steps": 4,
    "training.batch_size": 8,
    "independent.steps": 20,
    "independent.warmup": 5,
    "independent.batch_size": 16,
    "training.log_every": 2,
    "training.sample_every": 4,
    "training.checkpoint_every": 4,
    "evaluation.images": 50,
    "evaluation.grid_captions": 3,
    "evaluation.grid_images": 2,
}


@pytest.fixture(scope="module")
def birds(shared, tmp_path_factory) -> Path:
    """A dataset root with a few classes of the shared tar: its lists cut to the rows of the images taken."""
    root = tmp_path_factory.mktemp("birds")
    with tarfile.open(shared / "data" / "birds.tar") as tar:
        lists = [m for m in tar if m.name.endswith((".pickle", ".txt")) and "/text/" not in m.name]
        tar.extractall(root, filter="data", members=lists)
        cub = root / "birds" / "CUB_200_2011"
        rows = [line.split() for line in (cub / "images.txt").read_text().splitlines()]
        taken = {}
        for split, count in CLASSES.items():
            path = root / "birds" / split / "filenames.pickle"
            names = load_names(path)
            wanted = sorted({name.split("/")[0] for name in names})[:count]
            kept = [n for kind in wanted for n in [n for n in names if n.startswith(f"{kind}/")][:IMAGES]]
            path.write_bytes(pickle.dumps(kept, protocol=0))
            taken |= {image: number for number, image in rows if image.removesuffix(".jpg") in kept}
        files = {f"birds/CUB_200_2011/images/{name}" for name in taken} | {
            f"birds/text/{name.removesuffix('.jpg')}.txt" for name in taken
        }
        tar.extractall(root, filter="data", members=[m for m in tar if m.name in files])
    for table in ("images", "bounding_boxes", "image_class_labels"):
        path = cub / f"{table}.txt"
        path.write_text(
            "".join(f"{line}\n" for line in path.read_text().splitlines() if line.split()[0] in set(taken.values()))
        )
    assert len(taken) == IMAGES * sum(CLASSES.values())
    return root / "birds"


def test_birds_from_the_tar_to_pictures(ratlip, birds, tmp_path):
    settings = load_settings("birds-small", OVERRIDES)
    out = tmp_path / "out"
    common = [
        "-p",
        "birds-small",
        "--out",
        out,
        "-q",
        *[part for key, value in OVERRIDES.items() for part in ("-s", f"{key}={value}")],
    ]
    status, said, err = ratlip("prepare", *common, "--data", birds)
    assert status == 0, err
    assert said.endswith("60 training and 40 test images\n")
    prepared = load_prepared(out / f"prepared-{settings.data_hash}")
    for split in (prepared.train, prepared.test):
        assert all(min(split.image(i).shape[:2]) == 76 for i in range(len(split)))
        assert all(len(captions) == 10 for captions in split.captions)
    assert not set(prepared.train.labels) & set(prepared.test.labels)  # no class in both

    status, said, err = ratlip("clip", *common)
    assert status == 0 and "on 40 test images" in said, err
    assert Workspace.of(settings, out, progress=False).sentences().shape == (600, 96)
    assert np.load(next(out.glob("clip-*/captions-*/train-*/embedding.npy"))).shape[1] == 96

    status, said, err = ratlip("train", *common, "--accelerator", "cpu")
    assert status == 0, err
    run = Path(said.strip())
    assert run == out / "runs" / settings.run_name
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4] and all(np.isfinite(list(row.values())).all() for row in rows)
    assert (run / "samples" / "step-000004.png").stat().st_size > 5000

    status, said, err = ratlip("evaluate", *common)
    assert status == 0, err
    scores = json.loads((run / "scores.json").read_text())
    assert scores["images"] == 50 and "judge" not in scores  # no truth is known of photographs
    for part in (scores, scores["real"]):
        assert np.isfinite([part["clip_similarity"], part["frechet_distance"]]).all()
    assert scores["real"]["frechet_distance"] < scores["frechet_distance"]

    caption = "a small bird with a black head"
    status, _, err = ratlip("generate", caption, "--run", run, "-n", "2", "-o", tmp_path / "single", "--device", "cpu")
    assert status == 0, err
    pictures = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "single").iterdir())]
    assert [picture.shape for picture in pictures] == [(64, 64, 3)] * 2
    assert not np.array_equal(*pictures) and all(picture.std() > 0 for picture in pictures)


def test_a_missing_photograph_is_named_and_nothing_is_written(ratlip, birds, tmp_path):
    victim = next((birds / "CUB_200_2011" / "images").rglob("*.jpg"))
    hidden = victim.rename(victim.with_suffix(".hidden"))
    try:
        status, _, err = ratlip("prepare", "-p", "birds-small", "--out", tmp_path / "out", "--data", birds, "-q")
    finally:
        hidden.rename(victim)
    assert status == 2 and str(victim) in err and "missing" in err
    assert not list((tmp_path / "out").rglob("*.json"))
