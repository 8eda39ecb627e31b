"""Nearest training images (`ratlip.studies.neighbours`): copies are found, new images are not called copies."""

import pytest
import torch

from ratlip.data.batches import real_images
from ratlip.studies import neighbours


@pytest.fixture(scope="module")
def scene(smoke):
    """Training and test images of the profile smoke, and `search(generated, real)` -> Neighbours by space."""
    prepared, clip, size = smoke.workspace.prepared, smoke.workspace.clip, smoke.settings.model.image_size
    train = real_images(prepared.train, torch.arange(24).numpy(), size, size)
    test = real_images(prepared.test, torch.arange(48).numpy(), size, size)

    def search(generated, real, flip=False):
        return neighbours.search(generated, real, prepared.train, clip, crop=size, image_size=size, flip=flip)

    return train, test, search


def test_copies_of_training_images_are_found_with_their_number(scene):
    train, test, search = scene
    for space, each in search(train, test).items():
        assert each.generated.max() < 1e-3 < each.real.median(), space
        assert each.generated_number.tolist() == list(range(24))
        assert each.verdict() == "copies" and each.near_copies()[0] == 1
        assert each.ratio()[0] < 0.01


def test_real_test_images_are_no_copies(scene):
    _, test, search = scene
    for space, each in search(test[:24], test[24:]).items():
        ratio, low, high = each.ratio()
        assert low < 1 < high and low <= ratio <= high, space
        assert each.verdict() == "no sign of copying"


def test_a_mirrored_copy_counts_where_training_mirrors(scene):
    train, test, search = scene
    mirrored = train.flip(-1)
    plain, both = (search(mirrored, test, flip)["pixels"] for flip in (False, True))
    assert both.generated.max() < 1e-3 < plain.generated.max()
    assert both.generated_number.tolist() == list(range(24))
    assert len(both.real) == len(test) and (both.real <= plain.real + 1e-9).all()


def test_nearest_is_what_all_pairs_say():
    generator = torch.Generator().manual_seed(0)
    queries, references = torch.randn(7, 5, generator=generator), torch.randn(11, 5, generator=generator)
    distance, number = neighbours.nearest(queries, references)
    table = ((queries[:, None].double() - references[None].double()) ** 2).sum(-1).sqrt()
    assert torch.allclose(distance, table.min(1).values, atol=1e-7) and number.tolist() == table.argmin(1).tolist()


def test_pixels_are_a_root_mean_square_whatever_the_size(smoke):
    clip, side = smoke.workspace.clip, smoke.settings.model.image_size
    black, white = -torch.ones(1, 3, side, side), torch.ones(1, 3, side, side)
    rows = neighbours.features(torch.cat([black, white]), clip)
    assert float((rows["pixels"][0] - rows["pixels"][1]).norm()) == pytest.approx(2)
    assert rows["independent CLIP"].norm(dim=1).tolist() == pytest.approx([1, 1])


def made(generated, real):
    numbers = torch.zeros(len(generated), dtype=torch.long)
    return neighbours.Neighbours(torch.as_tensor(generated).double(), torch.as_tensor(real).double(), numbers, numbers)


def test_verdicts_between_copies_and_none():
    real = torch.linspace(1, 2, 400)
    assert made(0.9 * real, real).verdict() == "nearer than real images"
    assert made(torch.full((400,), 1.2), real).verdict() == "no sign of copying"  # nearer, yet within what is usual
    assert made(1.5 * real, real).verdict() == "no sign of copying"
    assert made(0.6 * real, real).near_copies()[0] > 0.5  # most are nearer than usual, none is a copy
    assert made(0.6 * real, real).verdict() == "nearer than real images"
    some = torch.cat([torch.full((60,), 0.01), torch.linspace(1.4, 2, 340)])
    assert made(some, real).near_copies()[0] == pytest.approx(0.15)
    assert made(torch.full((400,), 0.1), real).verdict() == "copies"
