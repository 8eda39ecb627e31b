"""What affines read, layer by layer, and the factor between RAT's state and CAT's condition for every profile."""

import pytest
import torch

from ratlip.settings import load_settings, profile_names
from ratlip.studies import conditions
from ratlip.training import generation, session
from ratlip.training.step import sample_latents


class Told(torch.nn.Module):
    """A generator whose conditions are known: twice (latent, sentence), then the half of it, then another size."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def conditions(self, latent, sentence):
        both = torch.cat((latent, sentence), dim=1)
        return [both, both, both / 2, both[:, :3]]


def test_spreads_between_captions_and_between_latents_are_told_apart():
    torch.manual_seed(0)
    latents, sentences = torch.randn(40, 2), 3 * torch.randn(60, 6)
    frame = conditions.by_layer(Told(), latents, sentences)
    captions, between = (sentences.var(0).sum() / 8).sqrt().item(), (latents.var(0).sum() / 8).sqrt().item()
    assert list(frame["layer"]) == [1, 2, 3, 4]
    assert list(frame["captions"][:3]) == pytest.approx([captions, captions, captions / 2], rel=1e-4)
    assert list(frame["latents"][:3]) == pytest.approx([between, between, between / 2], rel=1e-4)
    assert frame["moved"].isna().tolist() == [True, False, False, True]
    assert list(frame["moved"][1:3]) == pytest.approx([0, 1])


def test_a_run_fresh_and_trained(smoke):
    run, sentences = generation.Run(smoke.run, device="cpu"), smoke.workspace.sentences()
    frame = conditions.fresh_and_trained(run, sentences, captions=20, latents=3)
    steps = run.generator.recurrence.steps
    assert list(frame["weights"]) == ["first"] * steps + ["trained"] * steps
    trained = frame[frame["weights"] == "trained"].reset_index(drop=True)
    rows = torch.linspace(0, len(sentences) - 1, 20).long()
    sample = sample_latents(1, 0, 3, 8), sentences[rows]
    expected = conditions.by_layer(run.generator, *sample)
    assert trained[expected.columns].equals(expected)
    first = frame[frame["weights"] == "first"].reset_index(drop=True)
    fresh = conditions.by_layer(session.build_networks(run.settings, run.clip)[0], *sample)
    assert first[fresh.columns].equals(fresh) and not first["captions"].equals(trained["captions"])


def test_scaled_states_are_as_wide_as_the_measured_factor_says(smoke):
    sentences, clip = smoke.workspace.sentences(), smoke.workspace.clip
    found = conditions.measured(smoke.settings, clip, sentences)
    for overrides in ({"model.conditioning": "cat"}, {"model.rat_input": "scaled"}):
        assert conditions.measured(load_settings("smoke", overrides), clip, sentences) == found
    scaled = load_settings("smoke", {"model.rat_input": "scaled"})
    assert session.build_networks(scaled, clip, sentences)[0].state_scale.item() == pytest.approx(found["factor"])


def test_every_profile_has_a_factor_and_wider_sentences_a_larger_one():
    table = conditions.factor_table(sentence_spreads=(0.3, 0.45))
    assert list(table.index) == profile_names()
    small, large = (table[f"factor, sentences {size:g}"] for size in (0.3, 0.45))
    assert (large > small).all() and (small > 0).all()
    assert dict(table.loc["cub", ["h", "sentence", "latent", "layers"]]) == {
        "h": 64,
        "sentence": 512,
        "latent": 100,
        "layers": 40,
    }
    assert table.loc["cub-published", "layers"] == 16
    assert table.equals(conditions.factor_table(sentence_spreads=(0.3, 0.45)))
