"""What notebooks read off CLIP and networks (`ratlip.studies.inspection`)."""

import pytest
import torch
from torch import nn

from ratlip.data.generated import generated_set
from ratlip.settings import load_settings
from ratlip.studies import inspection
from ratlip.training import generation, session
from ratlip.training.step import sample_latents
from ratlip.workspace import Workspace


@pytest.fixture(scope="module")
def run(smoke):
    return generation.Run(smoke.run)


def test_paths_begin_and_end_at_their_captions_and_latents(run):
    first, last = "a large red ring on a black background", "a small blue square on a white background"
    size = run.settings.model.latent_size
    words = inspection.between_captions(run, first, last, steps=5)
    latents = inspection.between_latents(run, first, steps=5)
    ends = run.clip.embed_text([first, last]).cpu()
    one = sample_latents(1, 0, 1, size).expand(2, -1)
    assert torch.allclose(words[[0, -1]], generation.generate(run.generator, one, ends), atol=1e-5)
    two = generation.generate(run.generator, sample_latents(1, 0, 2, size), ends[:1].expand(2, -1))
    assert torch.allclose(latents[[0, -1]], two, atol=1e-5)
    assert words.shape == latents.shape == (5, 3, 16, 16)


def test_step_sizes():
    path = torch.zeros(1, 3, 3, 4, 4)
    path[0, -1] = 0.5
    assert inspection.step_sizes(path) == [0.5]


def test_outputs_of_modules_are_in_the_order_of_use_and_leave_no_hook():
    first, last = nn.Linear(2, 3), nn.Linear(3, 1)
    network, x = nn.Sequential(first, nn.ReLU(), last), torch.ones(4, 2)
    seen = inspection.outputs(network, [last, first], x)
    assert list(seen) == [first, last] and torch.equal(seen[last], network(x))
    assert not any(module._forward_hooks for module in network.modules())


def test_fresh_affines_are_the_identity_whatever_words_and_latent_say(run):
    generator, _ = session.build_networks(run.settings, run.clip)
    latent = sample_latents(0, 0, 3, run.settings.model.latent_size)
    sentences = run.clip.embed_text(["a red ring", "a blue square", "a star"]).cpu()
    layers = inspection.steering(generator.eval(), sentences, latent)
    assert [row["layer"] for row in layers] == list(range(1, len(layers) + 1)) and len(layers) > 4
    assert all(row[name] == 0 for row in layers for name in ("words", "noise", "size", "shift"))


class Oracle:
    """A CLIP that sees all but one attribute: an embedding is one hot a value, nothing for what is not said."""

    def __init__(self, made, part, blind):
        self.table, self.blind, self.mean = made.table, blind, torch.zeros(1)
        self.words = {value: name for name, values in made.table.items() for value in values}
        self.images = self.rows(part.attributes)

    def rows(self, known):
        kept = [name for name in self.table if name != self.blind]
        return torch.tensor([[float(each.get(n) == v) for n in kept for v in self.table[n]] for each in known])

    def embed_images(self, images):
        return self.images[: len(images)]

    def embed_text(self, texts):
        return self.rows([{self.words[w]: w for w in text.split() if w in self.words} for text in texts]) + 1e-4


def test_a_word_that_clip_does_not_see_is_at_chance_and_all_others_are_told_apart(tmp_path):
    given = {"data.named": "subset", "data.test_images": 200}
    prepared = Workspace.of(load_settings("smoke", given), tmp_path, progress=False).prepared
    made = generated_set(prepared)
    oracle = Oracle(made, prepared.test, blind="object")
    found = inspection.told_apart(oracle, prepared, 16, 16)
    assert list(found) == list(made.values)
    assert found.pop("object") == 0  # equal similarities are not "closer"
    assert set(found.values()) == {1.0}
