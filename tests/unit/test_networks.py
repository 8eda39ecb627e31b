"""The networks: sizes, parameter counts, what depends on what. Parity with the published: tests/parity."""

import copy

import pytest
import torch
from torch.nn import functional as F

from ratlip.networks import (
    ConditionalAffine,
    ConvShuffle,
    Discriminator,
    Generator,
    OfficialRecurrentAffine,
    Recurrence,
    ShuffleAttention,
)
from ratlip.networks.generator import synthesis_channels, synthesis_sizes
from ratlip.settings.sections import ModelSettings


class StandIn(torch.nn.Module):
    """A frozen CLIP as the generator sees it: sizes and a bridge that needs every patch and every prompt."""

    def __init__(self, grid=4, width=16, embed_dim=12, image_size=16):
        super().__init__()
        self.grid, self.width, self.embed_dim, self.image_size = grid, width, embed_dim, image_size
        self.weight = torch.nn.Parameter(torch.eye(width), requires_grad=False)

    def bridge(self, patches, prompts, prompt_blocks):
        assert patches.shape[1:] == (self.width, self.grid, self.grid)
        assert prompts.shape == (len(patches), len(prompt_blocks), self.width)
        mixed = torch.einsum("bchw,cd->bdhw", patches, self.weight)
        return mixed + prompts.sum(dim=1)[:, :, None, None]


SMALL = dict(
    latent_size=10,
    base_channels=8,
    code_channels=16,
    mapper_blocks=2,
    prompt_blocks=[1, 2],
    hidden_size=6,
    attention_groups=2,
)
PUBLISHED_CLIP = StandIn(grid=7, width=768, embed_dim=512, image_size=224)


def inputs(batch=3, latent=10, sentence=12):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(batch, latent, generator=generator), torch.randn(batch, sentence, generator=generator))


def moved(network):
    """The network with every parameter moved off its start, where many layers are the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def trainable(network):
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("settings", "millions"),
    [
        (dict(conditioning="rat-official", rat_scope="mapper", attention="shuffle"), 53.77),
        (dict(conditioning="cat", attention="none"), 51.83),
    ],
)
def test_generator_has_the_published_number_of_parameters(settings, millions):
    with torch.device("meta"):
        generator = Generator(PUBLISHED_CLIP, **settings)
    assert round(trainable(generator) / 1e6, 2) == millions


def test_discriminator_has_the_published_number_of_parameters():
    sizes = dict(grid=7, clip_width=768, sentence_size=512)
    with torch.device("meta"):
        published = Discriminator(**sizes, unused_shortcuts=True)
        used = Discriminator(**sizes)
    head = trainable(published.logit)
    assert round(head / 1e6, 2) == 2.10
    assert round((trainable(published) - head) / 1e6, 2) == 28.71  # official.md counts D without its head
    assert round((trainable(published) - trainable(used)) / 1e6, 2) == 1.18


@pytest.mark.parametrize(
    ("grid", "image", "sizes"),
    [
        (7, 224, [8, 16, 32, 64, 128, 224]),
        (8, 32, [8, 16, 32]),
        (8, 64, [8, 16, 32, 64]),
        (1, 4, [1, 2, 4]),
        (7, 7, [7]),
    ],
)
def test_synthesis_sizes_follow_from_grid_and_image(grid, image, sizes):
    assert synthesis_sizes(grid, image) == sizes


def test_synthesis_sizes_refuse_an_image_smaller_than_the_grid():
    with pytest.raises(ValueError, match="at least 8"):
        synthesis_sizes(8, 4)


def test_synthesis_channels_double_from_the_end_up_to_eight_times():
    assert synthesis_channels(64, 6) == [512, 512, 512, 512, 256, 128, 64]
    assert synthesis_channels(16, 2) == [64, 32, 16]


@pytest.mark.parametrize("attention", ["shuffle", "norm", "none"])
@pytest.mark.parametrize(
    ("conditioning", "scope"), [("cat", "mapper"), ("rat", "mapper"), ("rat", "generator"), ("rat-official", "mapper")]
)
def test_every_generator_draws_images_and_trains_every_parameter(conditioning, scope, attention):
    generator = Generator(StandIn(), conditioning=conditioning, rat_scope=scope, attention=attention, **SMALL)
    images = moved(generator).train()(*inputs())
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.float32
    images.square().mean().backward()
    without = [name for name, p in generator.named_parameters() if p.grad is None]
    assert not without


def test_image_size_may_differ_from_clip():
    latent, sentence = inputs()
    assert Generator(StandIn(), image_size=24, **SMALL)(latent, sentence).shape == (3, 3, 24, 24)


@pytest.mark.parametrize(("conditioning", "alone"), [("cat", True), ("rat", True), ("rat-official", False)])
def test_only_the_published_rat_lets_batch_mates_change_an_image(conditioning, alone):
    generator = moved(Generator(StandIn(), conditioning=conditioning, **SMALL))
    latent, sentence = inputs()
    with torch.no_grad():
        change = (generator(latent, sentence)[:1] - generator(latent[:1], sentence[:1])).abs().max()
    assert (change < 1e-5) == alone


@pytest.mark.parametrize("conditioning", ["cat", "rat"])
def test_image_depends_on_noise_and_on_sentence(conditioning):
    generator = moved(Generator(StandIn(), conditioning=conditioning, **SMALL))
    latent, sentence = inputs()
    with torch.no_grad():
        images = generator(latent, sentence)
        assert (generator(latent, sentence.flip(0)) - images).abs().max() > 1e-3
        assert (generator(latent.flip(0), sentence) - images).abs().max() > 1e-3


def test_recurrent_steps_follow_the_scope_and_hidden_size_0_is_cat():
    steps = {
        scope: Generator(StandIn(), rat_scope=scope, **SMALL).recurrence.steps for scope in ("mapper", "generator")
    }
    assert steps == {"mapper": 4 * 2, "generator": 4 * (2 + 3)}
    for conditioning in ("rat", "rat-official"):
        none = ModelSettings(conditioning=conditioning, rat_scope="mapper", hidden_size=0)
        assert none.effective_conditioning == "cat" and none.variant == "cat-shuffle"


def test_clip_is_shared_and_no_part_of_the_generator():
    clip = StandIn()
    generator = Generator(clip, **SMALL)
    assert not any(module is clip for module in generator.modules())
    assert all(parameter is not clip.weight for parameter in generator.parameters())
    assert copy.deepcopy(generator).mapper._clip.value is clip


@pytest.mark.parametrize(
    ("setting", "choice"),
    [("conditioning", "rat-official"), ("rat_scope", "mapper"), ("rat_input", "scaled"), ("attention", "shuffle")],
)
def test_generator_refuses_unknown_choices_and_names_the_known(setting, choice):
    with pytest.raises(ValueError, match=f"{setting} is 'other': choose .*'{choice}'"):
        Generator(StandIn(), **{setting: "other"})


def test_recurrence_is_an_lstm_over_the_layers_fed_with_the_sentence():
    recurrence = moved(Recurrence(sentence_size=12, latent_size=10, hidden_size=6, steps=5))
    lstm = torch.nn.LSTM(12, 6)
    for name, parameter in recurrence.cell.named_parameters():
        getattr(lstm, f"{name}_l0").data.copy_(parameter)
    latent, sentence = inputs()
    h, c = recurrence.initial(latent).chunk(2, dim=1)
    expected, _ = lstm(sentence.expand(5, -1, -1), (h[None].contiguous(), c[None].contiguous()))
    torch.testing.assert_close(torch.stack(recurrence(latent, sentence)), expected)


def test_affines_start_as_the_identity():
    x = torch.randn(3, 4, 5, 5)
    _, condition = inputs()
    torch.testing.assert_close(ConditionalAffine(12, 4)(x, condition), x)
    torch.testing.assert_close(OfficialRecurrentAffine(12, 6, 4)(x, condition), x)


def test_shuffle_attention_starts_as_a_scaling_by_0731_that_shuffles_channels():
    x = torch.randn(2, 16, 3, 3)
    expected = torch.sigmoid(torch.tensor(1.0)) * x.view(2, 2, 8, 3, 3).transpose(1, 2).reshape_as(x)
    torch.testing.assert_close(ShuffleAttention(16, groups=4)(x), expected)


def test_shuffle_attention_refuses_channels_that_the_groups_do_not_divide():
    with pytest.raises(ValueError, match="attention_groups"):
        ShuffleAttention(24, groups=8)


def test_conv_shuffle_without_groups_keeps_convolution_and_norm():
    block = ConvShuffle(4, 8, groups=0).train()
    x = torch.randn(2, 4, 5, 5)
    expected = F.leaky_relu(F.batch_norm(block.conv(x), None, None, training=True), 0.01)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("grid", [2, 3, 4, 7, 8])
def test_discriminator_gives_one_logit_a_pair_at_every_grid(grid):
    discriminator = Discriminator(grid=grid, clip_width=6, sentence_size=5, d_channels=4, logit_channels=3)
    assert discriminator(torch.randn(2, 3, 6, grid, grid), torch.randn(2, 5)).shape == (2,)


def test_discriminator_judges_several_sentences_as_it_judges_each():
    discriminator = Discriminator(grid=4, clip_width=6, sentence_size=5, d_channels=4, logit_channels=3)
    moved(discriminator)
    features, first, second = torch.randn(2, 3, 6, 4, 4), torch.randn(2, 5), torch.randn(2, 5)
    both = discriminator(features, first, second)
    assert len(both) == 2
    for logits, sentence in zip(both, (first, second), strict=True):
        torch.testing.assert_close(logits, discriminator(features, sentence))


def test_discriminator_needs_the_number_of_features_it_was_built_for():
    discriminator = Discriminator(grid=4, clip_width=6, sentence_size=5, feature_blocks=[0, 1])
    with pytest.raises(ValueError, match="3 CLIP blocks.*built for 2"):
        discriminator(torch.randn(2, 3, 6, 4, 4), torch.randn(2, 5))


def test_unused_shortcuts_change_no_logit():
    sizes = dict(grid=4, clip_width=6, sentence_size=5, d_channels=6, logit_channels=3)
    lean = moved(Discriminator(**sizes))
    published = Discriminator(**sizes, unused_shortcuts=True)
    missing, unexpected = published.load_state_dict(lean.state_dict(), strict=False)
    assert missing and all("shortcut" in key for key in missing) and not unexpected
    features, sentence = torch.randn(2, 3, 6, 4, 4), torch.randn(2, 5)
    torch.testing.assert_close(published(features, sentence), lean(features, sentence))
