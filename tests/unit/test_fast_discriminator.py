"""The discriminator's loss with its inner gradient written out is the plain loss: every value, every gradient."""

import copy
from dataclasses import fields

import pytest
import torch
from torch.autograd import grad

from ratlip.fast import accelerate, critic
from ratlip.fast.critic import fast_discriminator_loss
from ratlip.networks import Discriminator
from ratlip.networks.losses import DiscriminatorLoss, discriminator_loss
from ratlip.studies.bench import count_operations

TERMS = [field.name for field in fields(DiscriminatorLoss)]


def networks(grid=4, width=6, d_channels=4, **how):
    """A plain discriminator off its start, and the same in its fast form."""
    torch.manual_seed(0)
    plain = Discriminator(grid=grid, clip_width=width, sentence_size=5, d_channels=d_channels, logit_channels=3, **how)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    fast = copy.deepcopy(plain.double())
    accelerate(fast)
    return plain, fast


def inputs(grid=4, width=6, blocks=3, batch=3):
    """Features of real and generated images, sentences, and mismatched ones."""
    torch.manual_seed(1)
    real, fake = torch.randn(2, batch, blocks, width, grid, grid, dtype=torch.float64)
    sentence = torch.randn(batch, 5, dtype=torch.float64)
    return real, fake, sentence, sentence.roll(-1, 0)


def gradients(value, network):
    return {n: grad(value, p, retain_graph=True, allow_unused=True)[0] for n, p in network.named_parameters()}


@pytest.mark.parametrize("penalty", [(2.0, 6.0), (1.0, 2.0)])
@pytest.mark.parametrize("how", [{}, {"unused_shortcuts": True}, {"d_channels": 6}, {"feature_blocks": (1,)}])
@pytest.mark.parametrize("grid", [4, 7, 8])
def test_every_term_and_its_gradients_are_those_of_the_plain_loss(grid, how, penalty):
    plain, fast = networks(grid, **how)
    batch = inputs(grid, blocks=len(plain.blocks) + 1)
    theirs, mine = discriminator_loss(plain, *batch, *penalty), fast_discriminator_loss(fast, *batch, *penalty)
    for term in TERMS:
        one, other = getattr(mine, term), getattr(theirs, term)
        torch.testing.assert_close(one, other, rtol=1e-11, atol=0, msg=term)
        found, expected = gradients(one, fast), gradients(other, plain)
        for name, gradient in expected.items():
            # a term that does not reach a weight: autograd may say None or zero
            if gradient is None or found[name] is None:
                assert all(g is None or not g.any() for g in (gradient, found[name])), (term, name)
            else:
                scale = gradient.abs().max().item()
                torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12 * scale, msg=f"{term} {name}")
    assert mine.penalty > 0 and any(g is not None and g.any() for g in gradients(mine.penalty, fast).values())


def test_nothing_else_is_trained():
    _, fast = networks()
    batch = [each.requires_grad_() for each in inputs()]
    fast_discriminator_loss(fast, *batch).total.backward()
    assert all(each.grad is None for each in batch[:3])
    assert all(parameter.grad is not None for parameter in fast.parameters())


def test_it_takes_fewer_operations_than_autograd():
    _, fast = networks(grid=8)
    batch = inputs(grid=8)
    counts = [
        count_operations(lambda loss=loss: loss(fast, *batch).total.backward())[""]
        for loss in (discriminator_loss, fast_discriminator_loss)
    ]
    assert counts[1] < counts[0]


def test_the_sentence_is_read_once_for_all_positions():
    plain, fast = networks(grid=8)
    real, _, *sentences = inputs(grid=8)
    for one, other in zip(fast(real, *sentences), plain(real, *sentences), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(fast(real, sentences[0]), plain(real, sentences[0]), rtol=1e-11, atol=1e-12)
    counts = [count_operations(lambda d=d: d(real, *sentences))[""] for d in (plain, fast)]
    assert counts[1] < counts[0] / 2


@pytest.mark.parametrize("case", ["plain", "autocast", "traced"])
def test_where_the_form_does_not_apply_it_is_the_plain_loss(case, monkeypatch):
    plain, fast = networks()
    network, batch = (plain if case == "plain" else fast.float()), inputs()
    batch = batch if case == "plain" else [each.float() for each in batch]
    called = []
    monkeypatch.setattr(critic, "discriminator_loss", lambda *a: called.append(1) or discriminator_loss(*a))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: case == "traced")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
        loss = fast_discriminator_loss(network, *batch)
    loss.total.backward()
    assert called and loss.penalty.isfinite() and loss.penalty.dtype == batch[0].dtype
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_features_of_another_number_of_blocks_are_refused():
    _, fast = networks()
    with pytest.raises(ValueError, match="tap as many as its feature_blocks"):
        fast_discriminator_loss(fast, *inputs(blocks=2))
