"""The small CLIP is open_clip's: same names, same first weights, same numbers and gradients, bit for bit."""

import open_clip
import pytest
import torch

from ratlip.clip.loading import build_small_clip
from ratlip.fast.tower import FrozenAttention, accelerate_tower

SIZES = dict(image_size=32, patch_size=4, width=64, layers=3, heads=4, embed_dim=24)
TEXT = dict(context_length=12, vocab_size=30)


def drawn(build):
    """A CLIP, and the number that the random generator gives after it."""
    torch.manual_seed(0)
    return build(), torch.rand(1).item()


def theirs() -> open_clip.CLIP:
    vision = dict(image_size=32, patch_size=4, width=64, layers=3, head_width=16)
    vision |= dict(pos_embed_type="sin_cos_2d", pool_type="avg")
    return open_clip.CLIP(24, vision, dict(TEXT, width=48, layers=2, heads=2))


@pytest.fixture
def both():
    mine = drawn(lambda: build_small_clip(**SIZES, **TEXT, text_width=48, text_layers=2, text_heads=2))
    return mine, drawn(theirs)


@pytest.fixture
def inputs():
    draw = torch.Generator().manual_seed(1)
    return torch.randn(5, 3, 32, 32, generator=draw), torch.randint(1, 30, (5, 12), generator=draw)


def same(mine, theirs):
    assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def test_names_and_first_weights(both):
    (mine, next_of_mine), (theirs, next_of_theirs) = both
    assert [*mine.state_dict()] == [*theirs.state_dict()] and next_of_mine == next_of_theirs
    for (name, a), (other, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other and a.requires_grad == b.requires_grad and torch.equal(a, b), name


@pytest.mark.parametrize("training", [True, False])
def test_embeddings_and_gradients(both, inputs, training):
    (mine, _), (theirs, _) = both
    for model in (mine, theirs):
        image, text, scale = model.train(training)(*inputs)
        ((image @ text.T) * scale).tril().sum().backward()
    for (name, a), (_, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), name
    with torch.no_grad():
        for a, b in zip(mine(*inputs), theirs(*inputs), strict=True):
            same(a, b)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_what_a_frozen_clip_reads(both, inputs, low, again, early):
    """`low`: 16 bits; `again`: blocks are computed again in the backward pass; `early`: maps alone."""
    found, images = [], inputs[0].requires_grad_()
    for model, _ in both:
        model.visual.transformer.grad_checkpointing = again
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            output = model.visual.forward_intermediates(images, [0, 1], stop_early=early, intermediates_only=early)
            texts = model.encode_text(inputs[1])
        (gradient,) = torch.autograd.grad(output["image_intermediates"][1].float().sin().sum(), images)
        found.append([*output["image_intermediates"], *([] if early else [output["image_features"]]), texts, gradient])
    for a, b in zip(*found, strict=True):
        same(a, b)


def test_the_fast_form_takes_both(both, inputs):
    found = []
    for model, _ in both:
        accelerate_tower(model.requires_grad_(False).visual)
        assert sum(type(module) is FrozenAttention for module in model.modules()) == SIZES["layers"]
        found.append(model.encode_image(inputs[0]))
    same(*found)
