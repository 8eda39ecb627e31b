"""Figures show the pixels they were given, in the places they belong."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
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
    for image, path in zip(images, paths):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), pictures.as_pixels(image))
    with pytest.raises(ValueError):
        pictures.save_images(images, tmp_path, ["too", "few"])


def test_a_mosaic_puts_each_image_in_its_place():
    sheet = pictures.mosaic(flat(-1.0, -0.5, 0.0, 0.5, 0.9), columns=3)
    assert sheet.shape == (2 * 5 - 1, 3 * 5 - 1, 3)
    corners = [sheet[row * 5, column * 5, 0] for row in range(2) for column in range(3)]
    assert corners == [0, 64, 128, 191, 242, 255]
    assert (sheet[4] == 255).all() and (sheet[:, 4] == 255).all()


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


def test_a_sheet_shows_all_images():
    figure = pictures.picture_sheet(flat(*[0.0] * 13), columns=6)
    assert shown(figure.axes[0]).shape[:2] == (3 * 5 - 1, 6 * 5 - 1)


def test_curves_draw_every_column_of_every_panel():
    rows = [{"step": step, **{name: step * i for i, name in enumerate("abcdef")}} for step in (1, 2, 4)]
    figure = pictures.curves(rows, {"five": {name: name.upper() for name in "abcde"}, "one": {"f": "F"}})
    five, one = figure.axes
    assert [line.get_label() for line in five.lines] == list("ABCDE")
    assert five.lines[4].get_xdata().tolist() == [1, 2, 4]
    assert five.lines[4].get_ydata().tolist() == [4, 8, 16]
    assert len(one.lines) == 1 and one.get_legend() is None and five.get_legend() is not None


def test_bars_show_shares_and_chance_in_the_order_given(tmp_path):
    figure = pictures.bars({"colour": 0.5, "size": 0.75}, {"colour": 0.125, "size": 0.5}, "shares", tmp_path / "b.png")
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["size", "colour"]  # drawn from below
    assert [patch.get_width() for patch in ax.patches] == [0.75, 0.5]
    assert sorted(line.get_xdata()[0] for line in ax.lines) == [0.125, 0.5]
    assert [text.get_text() for text in ax.texts] == ["75%", "50%"]
    assert pictures.bars({"colour": 0.5}).axes[0].get_legend() is None


def test_saving_leaves_no_half_file(tmp_path):
    figure = Figure()
    assert pictures.save(figure, None) is figure
    with pytest.raises(ValueError):
        pictures.save(figure, tmp_path / "x.nonsense")
    assert not list(tmp_path.iterdir())
