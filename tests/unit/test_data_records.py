"""Records: the published crop, opening images, the list of problems, and order kept by threads."""

import threading

import numpy as np
import pytest
from PIL import Image

from ratlip.data.records import Problems, Record, in_order, open_image, published_crop
from ratlip.errors import DataError


@pytest.fixture
def photograph(tmp_path):
    """A 60 x 40 image whose red channel is the column and whose green channel is the row."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(60), np.arange(40)[:, None]
    path = tmp_path / "photograph.png"
    Image.fromarray(pixels).save(path)
    return path


def test_published_crop_is_a_square_of_one_and_a_half_boxes():
    # by hand: r = int(40 * 0.75) = 30 around the centre (100 + 20, 80 + 10)
    assert published_crop((100, 80, 40, 20), 300, 300) == (90, 60, 150, 120)


def test_published_crop_ends_with_the_image():
    assert published_crop((0, 0, 40, 20), 50, 35) == (0, 0, 50, 35)


def test_published_crop_cuts_box_numbers_to_whole_pixels():
    assert published_crop((100.9, 80.9, 40.9, 20.9), 300, 300) == published_crop((100, 80, 40, 20), 300, 300)


def test_open_image_crops_image_and_mask_alike(photograph):
    mask = np.zeros((40, 60), bool)
    mask[20, 30] = True
    record = Record("a", "train", ("x",), path=photograph, box=(26, 16, 8, 8), mask=mask)
    # centre (30, 20), r = 6
    image, cropped = open_image(record)
    pixels = np.asarray(image)
    assert pixels.shape == (12, 12, 3)
    assert pixels[0, 0].tolist() == [24, 14, 0]
    assert np.argwhere(np.asarray(cropped)).tolist() == [[6, 6]]


def test_open_image_makes_grey_and_transparent_images_rgb(tmp_path):
    for mode in ("L", "RGBA", "P"):
        Image.new(mode, (8, 8)).save(tmp_path / "image.png")
        image, _ = open_image(Record("a", "train", ("x",), path=tmp_path / "image.png"))
        assert image.mode == "RGB"


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    levels = np.array([[0, 128, 129, 257, 25700, 32768, 65407, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    image, _ = open_image(Record("a", "train", ("x",), path=tmp_path / "deep.png"))
    assert np.asarray(image)[0].tolist() == [[n] * 3 for n in (0, 0, 1, 1, 100, 128, 255, 255)]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_levels_without_a_known_range_are_refused(tmp_path, dtype):
    Image.fromarray(np.full((4, 4), 700, dtype)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match="cannot be decoded .mode [IF], whose range nobody knows; save it with 8"):
        open_image(Record("a", "train", ("x",), path=tmp_path / "deep.tif"))


def test_open_image_sees_truncation_only_a_full_decode_can_see(tmp_path):
    path = tmp_path / "image.jpg"
    Image.effect_noise((64, 64), 80).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    assert Image.open(path).size == (64, 64)  # the header is fine
    with pytest.raises(ValueError, match="cannot be decoded"):
        open_image(Record("a", "train", ("x",), path=path))


@pytest.mark.parametrize(
    "box",
    [
        (500, 500, 20, 20),
        (-30, 0, 40, 30),
        (10, 10, 90, 20),
        (10, 10, 0, 5),
        (float("nan"), 0, 10, 10),
        (0, 0, float("nan"), 10),
    ],
)
def test_box_outside_the_image_is_refused(photograph, box):
    with pytest.raises(ValueError, match="box"):
        open_image(Record("a", "train", ("x",), path=photograph, box=box))


def test_box_may_overshoot_a_little_as_the_official_ones_do(photograph):
    open_image(Record("a", "train", ("x",), path=photograph, box=(20, 5, 43, 30)))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pixels": np.zeros((4, 4, 3), np.float32)},
        {"pixels": np.zeros((4, 4), np.uint8)},
        {"pixels": np.zeros((4, 4, 3), np.uint8), "mask": np.ones((5, 4), bool)},
    ],
)
def test_open_image_refuses_impossible_records(fields):
    with pytest.raises(ValueError):
        open_image(Record("a", "train", ("x",), **fields))


def test_problems_are_listed_all_at_once_and_capped():
    problems = Problems("the birds")
    problems.raise_if_any()
    for number in range(60):
        problems.add(f"folder/{number}.jpg", "is broken")
    with pytest.raises(DataError) as caught:
        problems.raise_if_any()
    message = str(caught.value)
    assert "60 problems in the birds" in message
    assert "folder/0.jpg: is broken" in message and "folder/49.jpg" in message
    assert "folder/50.jpg" not in message and "10 more" in message


def test_in_order_keeps_the_order_and_reads_only_a_little_ahead():
    taken, lock = [], threading.Lock()

    def items():
        for number in range(200):
            with lock:
                taken.append(number)
            yield number

    for expected, got in enumerate(in_order(lambda number: number * 2, items(), workers=2)):
        assert got == expected * 2
        assert len(taken) <= expected + 10
