"""With other weights than the fixtures': our modules against plain formulas, so that no constant is fitted.

The formulas are written from official.md over the published keys, independent of ratlip.networks on purpose:
no module, no fast path, every affine and gate spelt out. CLIP's bridge is passed in as a function.
"""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ratlip.networks.losses import discriminator_loss
from ratlip.networks.official import load_checkpoint

PROMPT_BLOCKS = range(1, 9)
SIZES = (8, 16, 32, 64, 128, 224)


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def conv(w, name, x, padding):
    return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), padding=padding)


def last_lstm_state(w, name, sequence):
    """The last hidden state (1,H) of an LSTM that reads the rows of `sequence` (T,D) one after the other."""
    size = w[f"{name}.weight_hh_l0"].shape[1]
    h = c = torch.zeros(1, size)
    for row in sequence:
        gates = row[None] @ w[f"{name}.weight_ih_l0"].T + w[f"{name}.bias_ih_l0"]
        gates = gates + h @ w[f"{name}.weight_hh_l0"].T + w[f"{name}.bias_hh_l0"]
        i, f, g, o = gates.split(size, dim=1)
        c = 1 / (1 + torch.exp(-f)) * c + 1 / (1 + torch.exp(-i)) * torch.tanh(g)
        h = 1 / (1 + torch.exp(-o)) * torch.tanh(c)
    return h


def affine(w, name, x, condition):
    first, second = "linear1", "linear2"
    if f"{name}.rnn.weight_ih_l0" in w:  # RAT as published: the batch is the time axis
        condition = last_lstm_state(w, f"{name}.rnn", condition)
        first, second = "0", "2"
    gamma, beta = (
        linear(w, f"{name}.{mlp}.{second}", linear(w, f"{name}.{mlp}.{first}", condition).clamp(min=0))
        for mlp in ("fc_gamma", "fc_beta")
    )
    return gamma[:, :, None, None] * x + beta[:, :, None, None]


def fuse(w, name, x, condition):
    for i in (0, 1):
        x = affine(w, f"{name}.affine{i}", x, condition)
        x = torch.where(x > 0, x, 0.2 * x)
    return x


def shuffle_attention(w, name, x, groups=8):
    """Group by group, channel by channel."""
    channels = x.shape[1]
    size = channels // groups
    half = size // 2
    out = torch.empty_like(x)
    for group in range(groups):
        for j in range(half):
            by_channel, by_place = x[:, group * size + j], x[:, group * size + half + j]
            cw, cb, sw, sb = (w[f"{name}.{key}"][0, j, 0, 0] for key in ("cweight", "cbias", "sweight", "sbias"))
            mean = by_channel.mean((1, 2), keepdim=True)
            centred = by_place - by_place.mean((1, 2), keepdim=True)
            normed = centred / (centred.square().mean((1, 2), keepdim=True) + 1e-5).sqrt()
            normed = w[f"{name}.gn.weight"][j] * normed + w[f"{name}.gn.bias"][j]
            out[:, group * size + j] = by_channel * torch.sigmoid(cw * mean + cb)
            out[:, group * size + half + j] = by_place * torch.sigmoid(sw * normed + sb)
    # Shuffle in two groups: first of each half, second of each half, ...
    order = np.arange(channels).reshape(2, -1).T.ravel()
    return out[:, order]


def second_conv(w, name, x):
    """conv-shuffle (RATLIP) or a plain conv3x3 (GALIP)."""
    if f"{name}.conv.weight" not in w:
        return conv(w, name, x, 1)
    x = conv(w, f"{name}.conv", x, 1)
    mean, var, scale, shift = (
        w[f"{name}.bn.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
    )
    x = (x - mean) / (var + 1e-5).sqrt() * scale + shift
    return shuffle_attention(w, f"{name}.se", torch.where(x > 0, x, 0.01 * x))


def formula_generator(w, latent, sentence, bridge):
    """Images in eval mode; `w`: netG by published keys."""
    condition = torch.cat((latent, sentence), 1)
    x = linear(w, "fc_code", latent).view(-1, 64, 7, 7)
    for i in range(4):
        name = f"mapping.FBlocks.{i}"
        h = fuse(w, f"{name}.fuse1", conv(w, f"{name}.conv1", x, 1), condition)
        x = x + fuse(w, f"{name}.fuse2", second_conv(w, f"{name}.conv2", h), condition)
    x = conv(w, "mapping.conv_fuse", x, 2)
    prompts = linear(w, "mapping.fc_prompt", condition).view(-1, 8, 768)
    x = conv(w, "mapping.conv", x + 0.1 * bridge(x, prompts), 2)
    for i, size in enumerate(SIZES):
        name = f"GBlocks.{i}"
        source = torch.arange(size) * x.shape[-1] // size  # nearest
        x = x[:, :, source][:, :, :, source]
        h = second_conv(w, f"{name}.c1", fuse(w, f"{name}.fuse1", x, condition))
        h = second_conv(w, f"{name}.c2", fuse(w, f"{name}.fuse2", h, condition))
        x = h + (conv(w, f"{name}.c_sc", x, 0) if f"{name}.c_sc.weight" in w else x)
    return conv(w, "to_rgb.1", torch.where(x > 0, x, 0.2 * x), 1)


def formula_discriminator(d, c, features, sentence):
    """Logits (B,); `d`, `c`: netD and netC by published keys."""

    def residual(name, x):
        for i in (0, 2):
            x = F.leaky_relu(conv(d, f"{name}.conv_r.{i}", x, 1), 0.2)
        return x

    x = features[:, 0]
    for i in (0, 1):
        name = f"DBlocks.{i}"
        x = x + d[f"{name}.gamma"] * residual(name, x) + d[f"{name}.beta"] * features[:, i + 1]
    x = conv(d, "main.conv_s", x, 0) + d["main.gamma"] * residual("main", x)
    x = torch.cat((x, sentence[:, :, None, None].repeat(1, 1, 7, 7)), 1)
    x = F.leaky_relu(conv(c, "joint_conv.0", x, 0), 0.2)
    return conv(c, "joint_conv.2", x, 0).view(-1)


def formula_bridge(visual):
    """The frozen CLIP tower as a function of patches (B,768,7,7) and prompts (B,8,768)."""

    def through(patches, prompts):
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat((visual.class_embedding.repeat(len(tokens), 1, 1), tokens), 1)
        tokens = visual.ln_pre(tokens + visual.positional_embedding)
        for number, block in enumerate(visual.transformer.resblocks):
            if number in PROMPT_BLOCKS:
                tokens = block(torch.cat((tokens, prompts[:, number - 1, None]), 1))[:, :50]
            else:
                tokens = block(tokens)
        return tokens[:, 1:].transpose(1, 2).reshape(-1, 768, 7, 7)

    return through


@pytest.fixture(scope="module")
def other(published, clip, in_form):
    model = published.model(salt="other")
    return in_form(load_checkpoint({"model": model}, clip)), model


@pytest.fixture(scope="module")
def pairs():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 100, generator=generator), torch.randn(2, 512, generator=generator)


def close(ours, theirs):
    return (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@torch.no_grad()
def test_generator(other, pairs):
    networks, model = other
    theirs = formula_generator(model["netG"], *pairs, formula_bridge(networks.clip.model.visual))
    assert close(networks.generator(*pairs), theirs)


@torch.no_grad()
def test_discriminator(other, pairs):
    networks, model = other
    features = torch.randn(2, 3, 768, 7, 7, generator=torch.Generator().manual_seed(6))
    theirs = formula_discriminator(model["netD"], model["netC"], features, pairs[1])
    assert close(networks.discriminator(features, pairs[1]), theirs)


@torch.no_grad()
def test_features_see_pixels_normalised_twice_and_resized_by_nearest(other):
    networks, _ = other
    images = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(7)) * 2 - 1
    nearest = torch.arange(224) * 256 // 224
    pixels = (((images[:, :, nearest][:, :, :, nearest] + 1) / 2) + 1) / 2
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    features, embedding = networks.features(images)
    assert features.shape == (1, 3, 768, 7, 7)
    assert close(embedding, networks.clip.model.encode_image((pixels - mean) / std))


def test_ma_gp_against_finite_differences(other, pairs):
    """The gradient's norm is the slope of the logit along the gradient: from differences, in float64."""
    networks, model = other
    d, c = ({key: tensor.double() for key, tensor in model[part].items()} for part in ("netD", "netC"))
    sentence = pairs[1]
    features = 0.3 * torch.randn(2, 3, 768, 7, 7, generator=torch.Generator().manual_seed(8))
    loss = discriminator_loss(networks.discriminator, features, features, sentence, sentence.roll(-1, 0))

    x, s = features.double().requires_grad_(), sentence.double().requires_grad_()
    gx, gs = torch.autograd.grad(formula_discriminator(d, c, x, s).sum(), (x, s))
    norm = (gx.flatten(1).square().sum(1) + gs.square().sum(1)).sqrt()
    step = 1e-6
    along = [g / norm.view(-1, *[1] * (g.dim() - 1)) for g in (gx, gs)]
    with torch.no_grad():
        ahead = formula_discriminator(d, c, x + step * along[0], s + step * along[1])
        behind = formula_discriminator(d, c, x - step * along[0], s - step * along[1])
    slope = (ahead - behind) / (2 * step)
    assert loss.penalty.item() == pytest.approx(2 * slope.pow(6).mean().item(), rel=1e-3)
