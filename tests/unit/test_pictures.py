"""Figures show the pixels they were given, in the places they belong."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ratlip.plots import pictures


def flat(*values, size=4):
    """One image (3,size,size) of one grey for each value."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, size, size)


def test_minus_one_is_black_one_is_white_and_the_rest_is_clamped():
    pixels = pictures.as_pixels(flat(-1.0, 0.0, 1.0, 7.0, -7.0))
    assert pixels.shape == (5, 4, 4, 3) and pixels.dtype == np.uint8
    assert pixels[:, 0, 0, 0].tolist() == [0, 128, 255, 255, 0]


def test_images_are_saved_one_by_one_without_loss(tmp_path):
    images = torch.rand(3, 3, 5, 7) * 2 - 1
    paths = pictures.save_images(images, tmp_path / "new", ["a", "b", "c"])
    assert [path.name for path in paths] == ["a.png", "b.png", "c.png"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.png", "b.png", "c.png"]
    for image, path in zip(images, paths, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), pictures.as_pixels(image))
    with pytest.raises(ValueError):
        pictures.save_images(images, tmp_path, ["too", "few"])


def shown(ax):
    return np.asarray(ax.images[0].get_array())


def test_a_caption_grid_has_words_first_and_the_real_image_last(tmp_path):
    images = flat(-1.0, -0.5, 0.0, 0.5).unflatten(0, (2, 2))
    figure = pictures.caption_grid(images, ["one", "two"], tmp_path / "g.png", title="T", real=flat(0.9, 1.0))
    axes = np.array(figure.axes).reshape(2, 4)
    assert [axes[row, 0].texts[0].get_text() for row in range(2)] == ["one", "two"]
    assert [[int(shown(ax)[0, 0, 0]) for ax in row[1:]] for row in axes] == [[0, 64, 242], [128, 191, 255]]
    assert axes[0, -1].get_title() == "real"
    assert Image.open(tmp_path / "g.png").size[0] > 300


def test_long_captions_are_wrapped_not_cut():
    words = "a very long caption that goes on and on about a bird with many colours"
    figure = pictures.caption_grid(flat(0.0)[None], [words])
    assert figure.axes[0].texts[0].get_text().split() == words.split()


@pytest.mark.parametrize("words", ["a $5 and a $10 bird", r"$\undefined$", "$$", "x_{$", "$a_"])
def test_a_dollar_in_a_caption_is_a_dollar(tmp_path, words):
    images = flat(0.0, 0.5)
    for suffix in ("png", "svg"):
        pictures.caption_grid(images[:, None], [words, "b"], tmp_path / f"grid.{suffix}", names=[words])
        pictures.style.write(pictures.pictures([*images], [words, "b"]), tmp_path / f"row.{suffix}")
        maps = {"a": (images, torch.zeros(2, 4, 4))}
        pictures.style.write(pictures.overlays(maps, [words, "b"]), tmp_path / f"maps.{suffix}")


def test_pictures_show_all_images_row_by_row_with_their_titles():
    figure = pictures.pictures(list(flat(-1.0, -0.5, 0.0, 0.5, 0.9)), ["a", "b"], columns=3)
    assert [int(shown(ax)[0, 0, 0]) for ax in figure.axes[:5]] == [0, 64, 128, 191, 242] and not figure.axes[5].images
    assert [ax.get_title() for ax in figure.axes] == ["a", "b", "", "", "", ""]


def test_samples_have_a_row_a_caption_and_a_column_a_model():
    figure = pictures.caption_grid(torch.zeros(2, 3, 3, 8, 8), ["a", "b"], names=["x", "y", "z"])
    assert sum(len(ax.images) for ax in figure.axes) == 6
    assert [ax.get_title() for ax in figure.axes[1:4]] == ["x", "y", "z"]


def test_overlays_have_a_pair_for_every_image(tmp_path):
    maps = torch.linspace(0, 1, 32).view(2, 4, 4)
    figure = pictures.overlays({"a": (flat(0.0, 1.0), maps), "b": (flat(-1.0, 0.5), maps)}, ["one", "two"])
    pairs = np.array(figure.axes[:8]).reshape(2, 4)  # after them the colour bar
    assert [ax.get_ylabel() for ax in pairs[:, 0]] == ["a", "b"] and figure.axes[8].get_ylabel() == "map"
    assert [int(shown(ax)[0, 0, 0]) for ax in pairs[1, ::2]] == [0, 191]
    assert np.array_equal(pairs[0, 3].images[1].get_array(), maps[1].numpy())


def test_stages_show_saved_sheets_side_by_side(tmp_path):
    paths = pictures.save_images(flat(-1.0, 1.0), tmp_path, ["a", "b"])
    assert [int(shown(ax)[0, 0, 0]) for ax in pictures.stages(paths).axes] == [0, 255]


def test_training_need_not_wait_for_the_libraries_of_the_charts():
    heavy = "{'pandas', 'scipy', 'seaborn', 'matplotlib.pyplot'}"
    code = f"import sys, ratlip.plots.pictures; print(*{heavy} & {{*sys.modules}})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
