"""Batches as a function of (seed, step), and the way from pixels to a network's input."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ratlip.data.batches import Batches, centre_crop, cut, real_images, to_network
from ratlip.errors import DataError


class Pictures:
    """`n` images of 12x20 px whose pixels say where they are: red row, green column, blue image."""

    def __init__(self, n=10, captions=3):
        self.n = n
        self.caption_offsets = np.cumsum([0, *[captions + i % 2 for i in range(n)]])

    def __len__(self):
        return self.n

    def image(self, i):
        rows, columns = np.mgrid[0:12, 0:20]
        pixels = np.stack([rows, columns, np.full_like(rows, i)], axis=-1).astype(np.uint8)
        pixels.flags.writeable = False  # as the memory-mapped ones
        return pixels


def batches(split=None, **options):
    return Batches(split or Pictures(), **{"crop": 8, "flip": False, "batch_size": 4, "seed": 0, **options})


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in ("images", "caption", "image"))


def test_a_batch_is_a_function_of_seed_and_step():
    forwards = [batches()[step] for step in range(12)]
    shuffled = batches()
    for step in (7, 0, 11, 3, 7):
        assert same(shuffled[step], forwards[step])
    assert not same(batches(seed=1)[0], forwards[0])
    assert not same(forwards[0], forwards[1])


def test_shapes_and_types():
    batch = batches()[0]
    assert batch["images"].shape == (4, 3, 8, 8) and batch["images"].dtype == torch.uint8
    assert batch["caption"].shape == batch["image"].shape == (4,)
    assert batch["caption"].dtype == batch["image"].dtype == torch.int64


def test_every_image_is_seen_once_an_epoch_and_none_is_dropped():
    data = batches()  # 10 images, batches of 4: one of three batches straddles two epochs
    seen = torch.cat([data[step]["image"] for step in range(10)]).reshape(4, 10)
    for epoch in seen:
        assert sorted(epoch.tolist()) == list(range(10))
    assert len({tuple(epoch.tolist()) for epoch in seen}) == 4  # each in an order of its own


def test_a_batch_larger_than_the_set_is_filled_from_the_next_epochs():
    data = batches(Pictures(3), batch_size=8)
    seen = torch.cat([data[step]["image"] for step in range(3)]).reshape(8, 3)
    assert all(sorted(epoch.tolist()) == [0, 1, 2] for epoch in seen)


def test_captions_belong_to_their_image_and_all_are_drawn_equally_often():
    data, counts = batches(), {}
    for step in range(600):
        batch = data[step]
        for image, caption in zip(batch["image"].tolist(), batch["caption"].tolist(), strict=True):
            first, last = data.split.caption_offsets[image : image + 2]
            assert first <= caption < last
            counts[caption] = counts.get(caption, 0) + 1
    assert set(counts) == set(range(data.split.caption_offsets[-1]))
    expected = 600 * 4 / 10 / 3.5
    assert all(0.6 * expected < count < 1.6 * expected for count in counts.values())


def test_crops_lie_inside_and_reach_every_place():
    data, places = batches(), set()
    for step in range(400):
        batch = data[step]
        for image, number in zip(batch["images"], batch["image"], strict=True):
            top, left = int(image[0, 0, 0]), int(image[1, 0, 0])
            rows, columns = torch.meshgrid(torch.arange(top, top + 8), torch.arange(left, left + 8), indexing="ij")
            assert torch.equal(image[0].long(), rows) and torch.equal(image[1].long(), columns)
            assert torch.equal(image[2].long(), torch.full((8, 8), int(number)))
            places.add((top, left))
    assert places == {(top, left) for top in range(5) for left in range(13)}


def test_half_of_the_images_are_mirrored_where_that_is_wanted():
    plain, mirrored = batches(), batches(flip=True)
    hits = 0
    for step in range(100):
        for a, b in zip(plain[step]["images"], mirrored[step]["images"], strict=True):
            assert torch.equal(a, b) or torch.equal(a.flip(-1), b)
            hits += torch.equal(a.flip(-1), b)
    assert 150 < hits < 250


def test_the_parts_of_all_processes_make_the_global_batch():
    whole = batches(flip=True)
    parts = [batches(flip=True, rank=rank, world=2) for rank in range(2)]
    for step in (0, 2, 9):
        pieces = [part[step] for part in parts]
        together = {key: torch.cat([piece[key] for piece in pieces]) for key in ("images", "image")}
        together["caption"] = pieces[0]["caption"]  # of the whole batch in each: a mismatch is another image's
        assert torch.equal(pieces[0]["caption"], pieces[1]["caption"])
        assert all(len(piece["image"]) == 2 for piece in pieces)
        assert same(together, whole[step])


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(DataError, match="batch_size=4 cannot be shared by 3"):
        batches(world=3)


def test_loader_processes_change_nothing(smoke):
    data = Batches(smoke.workspace.prepared.train, crop=16, flip=False, batch_size=4, seed=0)
    loader = DataLoader(data, batch_size=None, sampler=range(3, 6), num_workers=2)
    for step, batch in zip(range(3, 6), loader, strict=True):
        assert same(batch, data[step])


# -------------------------------------------------------------------------------------- to the network


def test_black_and_white_become_minus_one_and_one():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    for size, how in ((8, "antialias"), (4, "antialias"), (4, "nearest"), (16, "antialias")):
        x = to_network(images, size, how)
        assert x.shape == (1, 3, size, size) and x.dtype == torch.float32
        torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))


def test_at_its_own_size_an_image_is_only_rescaled():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close((to_network(images, 8) + 1) * 127.5, images.float())
    assert torch.equal(to_network(images, 8, "nearest"), to_network(images, 8, "antialias"))


def test_nearest_leaves_rows_out_as_published():
    """256 -> 224 by nearest: row floor(i * 8 / 7), every eighth never looked at (difference 5)."""
    rows = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(1, 3, 256, 256)
    taken = ((to_network(rows, 224, "nearest")[0, 0, :, 0] + 1) * 127.5).round().long().tolist()
    assert taken == [i * 8 // 7 for i in range(224)]
    assert sorted(set(range(256)) - set(taken)) == list(range(7, 256, 8))


def test_antialiasing_keeps_a_fine_pattern_from_becoming_a_coarse_one():
    """Stripes finer than the small image can hold must become grey; by nearest they alias to coarse ones."""
    columns = torch.arange(64)
    stripes = (127.5 + 127.5 * torch.cos(2 * torch.pi * columns * 30 / 64)).round().to(torch.uint8)
    images = stripes.view(1, 1, 1, 64).expand(1, 3, 64, 64)
    strength = {how: to_network(images, 32, how)[0, 0].std().item() for how in ("antialias", "nearest")}
    assert strength["nearest"] > 0.5
    assert strength["antialias"] < 0.1
    spectrum = torch.fft.rfft(to_network(images, 32, "nearest")[0, 0, 0]).abs()
    assert spectrum[1:].argmax() + 1 == 2  # 30 cycles of 64 samples come back as 32 - 30 = 2 cycles


def test_a_cut_is_a_view_mirrored_or_not():
    pixels = np.arange(12 * 20 * 3, dtype=np.uint8).reshape(12, 20, 3)
    square = cut(pixels, 1, 2, 8)
    np.testing.assert_array_equal(square, pixels[1:9, 2:10])
    np.testing.assert_array_equal(cut(pixels, 1, 2, 8, mirrored=True), square[:, ::-1])
    assert np.shares_memory(square, pixels)


def test_real_images_are_centre_crops_in_the_order_asked_for():
    pixels = np.arange(12 * 20 * 3, dtype=np.uint8).reshape(12, 20, 3)
    np.testing.assert_array_equal(centre_crop(pixels, 8), pixels[2:10, 6:14])
    images = real_images(Pictures(), [4, 0, 4], crop=8, image_size=8)
    assert images.shape == (3, 3, 8, 8)
    restored = ((images + 1) * 127.5).round()
    assert restored[:, 2, 0, 0].tolist() == [4, 0, 4]
    assert (restored[0, 0, 0, 0], restored[0, 1, 0, 0]) == (2, 6)
