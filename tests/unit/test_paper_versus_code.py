"""What notebook 07 measures: each measure finds the difference where it is, and nothing where it is not."""

import re

import numpy as np
import pytest
import torch

from ratlip import published
from ratlip.data.batches import to_network
from ratlip.errors import RunError, SettingsError
from ratlip.scores.extractors import published_range
from ratlip.settings import load_settings
from ratlip.studies import paper_versus_code
from ratlip.studies import paper_versus_code_protocol as protocol
from ratlip.studies.grid import overridden
from ratlip.training import session
from ratlip.training.generation import Run, file_names
from ratlip.training.step import sample_latents

VARIANTS = {
    "published": {"model.conditioning": "rat-official", "model.rat_scope": "mapper"},
    "rat": {},
    "cat": {"model.conditioning": "cat"},
}


@pytest.fixture(scope="module")
def variants(smoke):
    """A generator of each conditioning whose affines do something."""
    made = {}
    for name, overrides in VARIANTS.items():
        settings = overridden(smoke.settings, {**overrides, "model.mapper_blocks": 2})
        generator = session.build_networks(settings, smoke.workspace.clip)[0].eval()
        made[name] = paper_versus_code.with_random_affines(generator, seed=1)
    return made


@pytest.fixture(scope="module")
def pairs(smoke):
    """Latents (6,Z) and sentences (6,E) of six test captions."""
    captions = [each[0] for each in smoke.workspace.prepared.test.captions[:6]]
    return sample_latents(5, 0, 6, smoke.settings.model.latent_size), smoke.workspace.clip.embed_text(captions).cpu()


# ------------------------------------------------------------------------------------------ rows 1 to 3


def test_only_the_published_rat_draws_another_image_among_other_mates(variants, pairs):
    found = {
        name: paper_versus_code.batch_effect(each, *pairs, batch_size=4, draws=3) for name, each in variants.items()
    }
    assert found["published"].change.min() > 1e-3
    for name in ("rat", "cat"):
        assert found[name].change.max() < 1e-4 and found[name].other_caption > 0.01
    assert found["rat"].images.shape[:2] == (6, 3)


def test_the_last_mate_moves_image_0_most(variants, pairs):
    rows = paper_versus_code.position_effect(variants["published"], *pairs, batch_size=8)
    changes = [row["change"] for row in rows]
    assert [row["position"] for row in rows] == list(range(2, 9))
    assert max(changes[-2:]) == max(changes) and changes[-1] > 2 * changes[0]
    assert max(row["change"] for row in paper_versus_code.position_effect(variants["rat"], *pairs, batch_size=4)) < 1e-4


def test_the_order_of_drawing_moves_no_image_to_another_position(smoke):
    run, order = Run(smoke.run, clip_folder=smoke.workspace.clip_folder), torch.randperm(10)
    straight = paper_versus_code.test_images(run, smoke.workspace.prepared, 10)
    mixed = paper_versus_code.test_images(run, smoke.workspace.prepared, 10, batch_size=3, order=order)
    assert torch.allclose(straight, mixed, atol=1e-5) and straight[0].sub(straight[1]).abs().max() > 1e-3


def test_compositions_are_scored_alike_for_the_paper_s_rat(smoke):
    run = Run(smoke.run, clip_folder=smoke.workspace.clip_folder)
    frame = paper_versus_code.composition_scores(smoke.workspace, run, 12, (1, 5))
    assert list(frame.index) == ["batches of 1", "batches of 5", "batches of 5, shuffled"]
    assert frame["CLIP similarity"].std() < 1e-5 and set(frame) == {"CLIP similarity", "all right"}


def test_a_change_reaches_later_layers_of_the_paper_s_rat_alone(variants, pairs):
    rat, official = (paper_versus_code.reach(variants[name], *pairs) for name in ("rat", "published"))
    later = torch.ones_like(rat).triu(1).bool()
    assert (rat[later] > 0).all() and (rat[~later] == 0).all()
    assert len(official) == 8 and (official == 0).all()
    assert len(paper_versus_code.reach(variants["cat"], *pairs)) == 0


def test_states_of_the_published_rat_are_one_for_the_batch(variants, pairs):
    assert {each.shape[0] for each in paper_versus_code.states(variants["published"], *pairs)} == {1}
    assert {each.shape[0] for each in paper_versus_code.states(variants["rat"], *pairs)} == {6}


@pytest.mark.parametrize(
    "moves, layer", [([0.5, 0.2, 0.01, 0.001], 4), ([0.01, 0.01], 2), ([0.5, 0.01, 0.2, 0.01], 5), ([0.5, 0.3], None)]
)
def test_the_layer_at_which_states_settle(moves, layer):
    assert paper_versus_code.settled_layer(torch.tensor(moves)[:, None].expand(-1, 3)) == layer


def test_settling_is_the_relative_move(variants, pairs):
    h = torch.stack(paper_versus_code.states(variants["rat"], *pairs)).detach()
    moves = paper_versus_code.settling(variants["rat"], *pairs)
    assert moves.shape == (len(h) - 1, 6)
    assert torch.allclose(moves[2, 1], (h[3, 1] - h[2, 1]).norm() / h[3, 1].norm())


def test_affines_of_the_published_size_are_counted():
    kinds = paper_versus_code.affine_kinds
    published = {"one LSTM over the layers": 0, "an LSTM of its own": 16, "CAT": 24}
    assert kinds(paper_versus_code.full_size()[0]) == published
    assert kinds(paper_versus_code.full_size("cub")[0])["one LSTM over the layers"] == 40
    assert kinds(paper_versus_code.full_size("cub", rat_scope="mapper")[0])["one LSTM over the layers"] == 16
    assert kinds(paper_versus_code.full_size("cub", conditioning="cat")[0])["CAT"] == 40
    assert next(paper_versus_code.full_size()[0].parameters()).is_meta


# ------------------------------------------------------------------------------------------ rows 4 to 6


def test_what_clip_sees(smoke):
    clip = smoke.workspace.clip
    images = torch.rand(2, 3, clip.image_size, clip.image_size) * 2 - 1
    twice = paper_versus_code.with_normalisation(clip, "published")
    assert torch.allclose(paper_versus_code.as_clip_sees(clip, images), images, atol=1e-5)
    assert torch.allclose(paper_versus_code.as_clip_sees(twice, images), (images + 1) / 2, atol=1e-5)
    assert clip.normalisation == "standard"


def test_pictures_of_any_size_keep_their_attributes():
    large, small, other = protocol.drawn(64, 3), protocol.drawn(32, 3), protocol.drawn(32, 3, variant=1)
    assert large.shape == (3, 3, 64, 64) and torch.equal(small, protocol.drawn(32, 3))
    assert not torch.equal(small, other)
    corner = slice(0, 2)  # the background, whose shade alone differs
    for one, two in ((large, small), (small, other)):
        assert (
            one[..., corner, corner].float().mean((2, 3)) - two[..., corner, corner].float().mean((2, 3))
        ).abs().max() < 40


def test_the_spectrum_finds_a_wave():
    wave = torch.cos(2 * torch.pi * 9 * torch.arange(64) / 64).expand(1, 3, 64, 64)
    assert int(protocol.radial_spectrum(wave)[0].argmax()) == 9
    assert protocol.radial_spectrum(wave).shape == (1, 32)


def test_the_comb_shows_what_nearest_leaves_out():
    ramp = torch.arange(256).to(torch.uint8).expand(1, 3, 256, 256)
    combed, clean = (protocol.comb(to_network(ramp, 224, how))[0] for how in ("nearest", "antialias"))
    assert int(combed.argmax()) == 6  # one double step of seven
    assert combed[6] == pytest.approx(4 / 10, abs=0.02)
    assert clean.max() < 0.17 and float(combed.sum()) == pytest.approx(1)


def test_a_classifier_tells_apart_what_differs_and_nothing_else():
    draw = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 200, 5, generator=draw)
    assert protocol.told_apart(one, other + 4) == 1
    assert 0.35 < protocol.told_apart(one, other) < 0.65


def test_torchvision_s_transform_gives_the_published_range():
    images = torch.rand(2, 3, 5, 5) * 2 - 1
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected = published_range(images, *(torch.tensor(each).view(1, 3, 1, 1) for each in imagenet))
    assert torch.allclose(protocol.through_transform_input(images), expected, atol=1e-6)
    ends = protocol.through_transform_input(torch.tensor([-1.0, 1.0])[:, None, None, None].expand(2, 3, 1, 1))
    assert float(ends.min()) == pytest.approx(-0.188, abs=1e-3)
    assert float(ends.max()) == pytest.approx(0.428, abs=1e-3)


def test_a_distance_shrinks_with_the_range(smoke):
    prepared, clip = smoke.workspace.prepared, smoke.workspace.clip
    reference = protocol.real_in_both_ranges(clip, prepared, smoke.settings, 40)
    images = torch.rand(20, 3, 16, 16) * 2 - 1
    found = protocol.distances(protocol.in_both_ranges(clip, images), reference)
    assert 0 < found["published"] < found["standard"]
    assert protocol.distances(reference, reference)["published"] == pytest.approx(0, abs=1e-3)


# ----------------------------------------------------------------------------------------- rows 7 to 11


def test_the_command_line_s_default_wins():
    assert protocol.merged_as_published([], {"batch_size": 16, "seed": 1}) == {"batch_size": 1, "seed": 1}
    assert protocol.merged_as_published(["--batch_size", "8"], {"batch_size": 16})["batch_size"] == 8


@pytest.mark.slow
def test_a_batch_of_one_teaches_nothing_about_matching(smoke):
    one, many = (
        [protocol.matching_learned(smoke.workspace, size, images=2400, seed=seed) for seed in (1, 2, 3, 4)]
        for size in (1, 8)
    )
    assert {each["same"] for each in one} == {1} and {each["same"] for each in many} == {0}
    assert np.mean([each["right"] for each in many]) > 0.08 + np.mean([each["right"] for each in one])
    assert protocol.lowest_hinge(same=True) == pytest.approx(1) and protocol.lowest_hinge(same=False) == 0


def test_outcomes_of_calls():
    def old():
        import warnings

        warnings.warn("soon", DeprecationWarning, stacklevel=1)

    outcomes = [protocol._outcome(call) for call in (lambda: None, old, lambda: 1 / 0)]
    assert outcomes == ["works", "works, to go", "fails"]
    today = protocol.calls_today()
    assert len(today) == 4 and today["torch.distributed.get_world_size() in a single process"] == "fails"
    assert today["tensor.cuda() without a GPU"] == "fails"


@pytest.mark.parametrize("names, left", [("caption", 8), ("published", 2)])
def test_files_that_survive(names, left):
    assert protocol.surviving_files(torch.zeros(8, 3, 4, 4), names, batch_size=4) == left


def test_file_names():
    assert file_names(2, 2) == ["00-000", "00-001", "01-000", "01-001"]
    assert file_names(2, 2, "published", 3) == ["step-0000"] * 3 + ["step-0001"]
    with pytest.raises(SettingsError, match="names=step: choose caption or published"):
        file_names(1, 1, "step")


def test_names_as_published_on_the_command_line(ratlip, smoke, tmp_path):
    arguments = ["generate", "a red ring", "--run", smoke.run, "-n", 8, "--batch-size", 4, "-o"]
    assert ratlip(*arguments, tmp_path / "ours")[0] == 0
    assert ratlip(*arguments, tmp_path / "theirs", "--names", "published")[0] == 0
    assert len(list((tmp_path / "ours").iterdir())) == 8
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == ["step-0000.png", "step-0001.png"]
    status, _, said = ratlip(*arguments, tmp_path / "other", "--names", "mine")
    assert status == 2 and "names=mine" in said


def test_parameters_that_get_no_gradient_are_the_dead_ones(smoke):
    clip = smoke.workspace.clip
    with_dead = session.build_networks(overridden(smoke.settings, {"model.unused_shortcuts": True}), clip)[1]
    idle = protocol.without_gradient(with_dead, clip)
    assert idle and all("shortcut" in name for name in idle)
    assert sum(idle.values()) == protocol.dead_parameters(with_dead)
    assert protocol.without_gradient(session.build_networks(smoke.settings, clip)[1], clip) == {}
    assert protocol.dead_parameters(paper_versus_code.full_size()[1]) == 2 * (768 * 768 + 768)  # 1.18 million
    assert protocol.dead_parameters(paper_versus_code.full_size("cub")[1]) == 0


# --------------------------------------------------------------------------------------------- the table


def test_the_table_wants_every_row_measured():
    frame = paper_versus_code.differences_table({row: f"effect {row}" for row in range(1, 13)})
    assert list(frame.index) == list(range(1, 13)) and frame.loc[7, "measured effect"] == "effect 7"
    with pytest.raises(RunError, match="rows 3, 12 of the table"):
        paper_versus_code.differences_table({row: "" if row == 3 else "x" for row in range(1, 12)})


def named(column: str) -> list[tuple[str, str]]:
    """Settings named in a column of the table, as (section.name, value)."""
    return [pair for row in published.rows() for pair in re.findall(r"(\w+\.\w+): ([\w-]+)", row[column])]


def test_the_table_s_settings_are_those_of_the_published_profiles():
    for column, profiles in (
        ("our default", ("cub",)),
        ("setting to switch it back", ("cub-published", "demo-published")),
    ):
        assert len(named(column)) >= 9
        for profile in profiles:
            content = load_settings(profile).model_dump(mode="json")
            for key, value in named(column):
                section, name = key.split(".")
                if key != "training.batch_size":  # said in the profile, and left to whoever wants it
                    assert str(content[section][name]).lower() == value, (profile, key)
    assert load_settings("cub-published", {"training.batch_size": 1}).training.batch_size == 1
