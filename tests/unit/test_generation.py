"""Your own captions: seeds, independence of batch mates, unknown words, runs that were moved."""

import shutil

import pytest
import torch

import ratlip
from ratlip.errors import RunError, SettingsError, WeightsError
from ratlip.settings import load_settings
from ratlip.training import generation, session, step

RED = "a large red ring on the left on a white background"
BLUE = "a small blue square on the right on a black background"


@pytest.fixture(scope="module")
def opened(smoke):
    return ratlip.load(smoke.run, device="cpu")


def test_one_line_draws_a_caption(smoke):
    images = ratlip.load(smoke.run).generate(RED, n=3)
    assert images.shape == (1, 3, 3, 16, 16) and images.abs().max() <= 1


def test_the_seed_decides_the_images(opened):
    first = opened.generate([RED, BLUE], n=3, seed=5)
    assert torch.equal(first, opened.generate([RED, BLUE], n=3, seed=5))
    assert not torch.allclose(first, opened.generate([RED, BLUE], n=3, seed=6), atol=1e-3)
    assert first.flatten(2).std(dim=1).mean() > 1e-3, "n images of one caption are one image"


def test_image_i_of_a_seed_is_the_same_however_many_are_drawn(opened):
    few, many = opened.generate(RED, n=2, seed=3), opened.generate([BLUE, RED], n=9, seed=3)
    torch.testing.assert_close(many[1, :2], few[0], rtol=0, atol=1e-5)


def test_the_batch_size_does_not_matter(opened):
    torch.testing.assert_close(
        opened.generate([RED, BLUE], n=4, batch_size=3), opened.generate([RED, BLUE], n=4), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("conditioning, depends", [("cat", False), ("rat", False), ("rat-official", True)])
def test_an_image_depends_on_its_batch_mates_in_the_published_code_only(smoke, conditioning, depends):
    """Differences 1 and 2. With weights off their start, where affines are blind to their condition."""
    scope = "mapper" if conditioning == "rat-official" else "generator"
    settings = load_settings("smoke", {"model.conditioning": conditioning, "model.rat_scope": scope})
    generator = session.build_networks(settings, smoke.workspace.clip)[0].to(smoke.workspace.clip.mean.device).eval()
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    latent, sentence = step.sample_latents(0, 0, 8, 8), smoke.workspace.sentences("test")[::60]
    mates = torch.cat([latent[:1], step.sample_latents(1, 0, 7, 8)]), torch.cat([sentence[:1], sentence[1:].flip(0)])
    alone, one, other = (
        generation.generate(generator, *pair)[0] for pair in ((latent[:1], sentence[:1]), (latent, sentence), mates)
    )
    change = max((one - other).abs().max().item(), (one - alone).abs().max().item())
    assert change > 1e-3 if depends else change < 1e-5


def test_words_that_the_clip_never_read_are_named(opened):
    with pytest.warns(UserWarning, match=r"small CLIP \w+ has never read 'zebra'.*have no effect"):
        opened.generate(f"{RED} zebra")


def test_known_words_warn_of_nothing(opened, recwarn):
    opened.generate(RED)
    assert not [w for w in recwarn if "no effect" in str(w.message)]


@pytest.mark.parametrize("captions", ["", "  ", [], [RED, ""]])
def test_an_empty_caption_is_an_error_of_the_user(opened, captions):
    with pytest.raises(SettingsError, match="give one at least, and no empty one"):
        opened.generate(captions)


def test_a_run_moved_without_its_clip_says_what_is_missing(smoke, tmp_path):
    moved = shutil.copytree(smoke.run, tmp_path / "elsewhere" / "run")
    with pytest.raises(RunError) as caught:
        ratlip.load(moved)
    assert str(moved) in str(caught.value) and "--clip-folder" in str(caught.value)
    assert smoke.workspace.clip_folder.name in str(caught.value)


def test_a_moved_run_draws_the_same_with_its_clip_named(smoke, opened, tmp_path):
    from ratlip.training.generation import Run

    moved = shutil.copytree(smoke.run, tmp_path / "elsewhere" / "run")
    images = Run(moved, device="cpu", clip_folder=smoke.workspace.clip_folder).generate(RED, n=2)
    assert torch.equal(images, opened.generate(RED, n=2))


def test_a_clip_of_other_weights_is_refused(smoke, tmp_path):
    from ratlip.training.generation import Run
    from ratlip.workspace import Workspace

    other = Workspace.of(load_settings("smoke", {"data.seed": 1, "clip.steps": 1}), tmp_path, progress=False)
    other.clip  # noqa: B018  (trains it)
    with pytest.raises((RunError, WeightsError)):
        Run(smoke.run, clip_folder=other.clip_folder)


@pytest.mark.parametrize("missing", ["config.yaml", "checkpoint.pt"])
def test_a_folder_that_is_no_run_says_what_it_lacks(smoke, tmp_path, missing):
    folder = shutil.copytree(smoke.run, tmp_path / "run")
    (folder / missing).unlink()
    with pytest.raises(RunError, match=f"has no {missing}.*`ratlip train`"):
        ratlip.load(folder)


@pytest.mark.parametrize(
    "device",
    ["abacus", pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"))],
)
def test_a_device_that_is_not_here_is_an_error_of_the_user(smoke, device):
    with pytest.raises(SettingsError, match=f"device={device}"):
        ratlip.load(smoke.run, device=device)


def test_a_grid_is_a_figure_with_a_row_for_each_caption(opened, tmp_path):
    figure = opened.grid([RED, BLUE], n=3, path=tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 1000
    assert len(figure.axes) == 2 * (3 + 1)
