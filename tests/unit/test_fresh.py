"""`ratlip profile new`: a profile that fits the folder, loads, trains, and says why."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from ratlip.clip.loading import build_small_clip
from ratlip.report import fresh
from ratlip.settings import load_settings
from ratlip.training import choice


@pytest.fixture
def pictures(tmp_path):
    """A folder of 40 pictures, 36 of them to train with."""
    root, rng = tmp_path / "own", np.random.default_rng(0)
    for number in range(40):
        path = root / ("train" if number < 36 else "test") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"a thing of kind {number % 5}\n")
    return root


def settings(tmp_path, train=3000, test=300, captions=("a red flower",), gpu=False):
    path = tmp_path / f"{train}-{gpu}.yaml"
    path.write_text(fresh.profile("own", train, test, list(captions), gpu))
    return load_settings(path), path.read_text()


@pytest.mark.parametrize("train", [2, 30, 700, 3000, 100_000])
@pytest.mark.parametrize("gpu", [False, True])
def test_sizes_follow_the_pictures_and_the_machine(tmp_path, train, gpu):
    s, text = settings(tmp_path, train, max(1, train // 9), gpu=gpu)
    t, m = s.training, s.model
    assert s.data.dataset == "folder" and m.image_size == (64 if gpu else 32) <= s.data.crop <= s.data.resize
    assert 2 <= t.batch_size <= max(2, train // 2) and 2 <= s.clip.batch_size <= max(2, train // 2)
    passes = t.steps * t.batch_size / train
    assert t.steps == 500 or passes <= fresh.PASSES
    assert t.steps <= (20_000 if gpu else fresh.MINUTES * 60 / fresh.SECONDS_A_STEP)
    assert s.clip.width >= 3 * s.clip.patch_size**2  # no squares
    assert f"show each one {passes:.0f} times" in text and ("by heart" in text) == (train < 1000)
    assert len(text.splitlines()) < 60 and max(map(len, text.splitlines())) < 150
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert len(comments) >= 9
    build_small_clip(m.image_size, **{n: getattr(s.clip, n) for n in ARCHITECTURE}, vocab_size=9)


ARCHITECTURE = "patch_size width layers heads text_width text_layers text_heads embed_dim context_length".split()


def test_captions_with_sides_forbid_the_mirror(tmp_path):
    s, text = settings(tmp_path)
    assert s.data.flip and "as no caption says left or right" in text
    s, text = settings(tmp_path, captions=["a Left shoe", "bright", "upright", "to the right"])
    assert not s.data.flip and "2 captions say left or right" in text


def test_the_context_holds_nearly_all_captions(tmp_path):
    captions = [" ".join(["word"] * count) for count in [3] * 80 + [20] * 16 + [200] * 4]
    assert settings(tmp_path, captions=captions)[0].clip.context_length == 22


def test_the_command_looks_writes_and_says_what_is_next(ratlip, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "my.yaml"
    status, out, err = ratlip("profile", "new", "--data", pictures, "-o", path)
    assert status == 0 and f"make reproduce PROFILE={path} DATA={pictures}" in out, err
    text = path.read_text()
    assert "36 training and 4 test pictures of own," in text and re.search(r"\d+ CPU cores", text)
    status, _, err = ratlip("profile", "new", "--data", pictures, "-o", path)
    assert status == 2 and "is there already" in err
    status, _, err = ratlip("profile", "new", "--data", pictures, "-o", tmp_path / "my.txt")
    assert status == 2 and "should end in .yaml" in err
    (pictures / "train" / "0.txt").unlink()
    status, _, err = ratlip("profile", "new", "--data", pictures, "-o", tmp_path / "other.yaml")
    assert status == 2 and "0.txt: the caption file is missing" in err and not (tmp_path / "other.yaml").exists()


@pytest.mark.slow
def test_from_a_folder_to_pictures_by_what_the_command_says(ratlip, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RATLIP_OUTPUTS", raising=False)
    ratlip("profile", "new", "--data", "own")
    few = ["-s", "clip.steps=4", "-s", "training.steps=3", "-q"]
    assert ratlip("prepare", "-p", "my.yaml", "--data", "own", *few)[1].endswith("36 training and 4 test images\n")
    status, run, err = ratlip("train", "-p", "my.yaml", "--accelerator", "cpu", *few)
    assert status == 0, err
    assert choice.main_runs()[-1] == tmp_path / run.strip()
    status, out, err = ratlip("export", run.strip(), "--to", "mine")
    assert status == 0 and "WRITE HERE" in (tmp_path / "mine" / "README.md").read_text(), err
    status, out, err = ratlip(
        "generate", "a thing of kind 3", "--run", "mine", "-n", "2", "-o", "all", "--device", "cpu"
    )
    assert status == 0 and len(list((tmp_path / "all").iterdir())) == 2, err
