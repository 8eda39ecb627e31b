"""The losses against their formulas; against the published numbers: tests/parity."""

import pytest
import torch

from ratlip.networks import Discriminator
from ratlip.networks.losses import clip_similarity, discriminator_loss, generator_loss, hinge, ma_gp


@pytest.fixture
def discriminator():
    torch.manual_seed(0)
    network = Discriminator(grid=4, clip_width=6, sentence_size=5, d_channels=4, logit_channels=3)
    with torch.no_grad():
        for block in (*network.blocks, network.main):
            block.gamma.fill_(0.5)
    return network


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return dict(
        real_features=torch.randn(3, 3, 6, 4, 4), fake_features=torch.randn(3, 3, 6, 4, 4), sentence=torch.randn(3, 5)
    )


def test_hinge_counts_only_what_lies_within_the_margin():
    logits = torch.tensor([-2.0, 0.0, 3.0])
    assert hinge(logits, real=True) == pytest.approx((3 + 1 + 0) / 3)
    assert hinge(logits, real=False) == pytest.approx((0 + 1 + 4) / 3)


def test_ma_gp_of_a_linear_critic_is_the_power_of_its_weights_norm():
    features = torch.randn(3, 2, 4, requires_grad=True)
    sentence = torch.randn(3, 5, requires_grad=True)
    logits = (0.3 * features).sum(dim=(1, 2)) + (0.4 * sentence).sum(dim=1)
    norm = (8 * 0.3**2 + 5 * 0.4**2) ** 0.5
    assert ma_gp(logits, features, sentence).item() == pytest.approx(2 * norm**6, rel=1e-5)
    other = ma_gp(logits, features, sentence, weight=3.0, power=2.0)
    assert other.item() == pytest.approx(3 * norm**2, rel=1e-5)


def test_ma_gp_of_a_flat_critic_has_a_gradient():
    scale = torch.zeros(1, requires_grad=True)
    features, sentence = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    ma_gp((scale * (features + sentence)).sum(dim=1), features, sentence).backward()
    assert scale.grad.item() == 0


def test_similarity_is_the_cosine_of_raw_embeddings():
    a, b = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[5.0, 0.0], [-2.0, -2.0]])
    torch.testing.assert_close(clip_similarity(a, b), torch.tensor([1.0, -1.0]))


def test_discriminator_loss_is_the_sum_of_its_parts(discriminator, batch):
    mismatched = batch["sentence"].roll(-1, 0)
    loss = discriminator_loss(discriminator, **batch, mismatched=mismatched)
    torch.testing.assert_close(loss.total, loss.real + (loss.fake + loss.mismatch) / 2 + loss.penalty)
    real = batch["real_features"]
    torch.testing.assert_close(loss.real, hinge(discriminator(real, batch["sentence"]), real=True))
    torch.testing.assert_close(loss.mismatch, hinge(discriminator(real, mismatched), real=False))
    assert loss.penalty > 0


def test_discriminator_loss_trains_only_the_discriminator(discriminator, batch):
    batch = {name: tensor.requires_grad_() for name, tensor in batch.items()}
    discriminator_loss(discriminator, **batch, mismatched=batch["sentence"].roll(-1, 0)).total.backward()
    assert all(tensor.grad is None for tensor in batch.values())
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_generator_loss_reaches_the_fakes(discriminator, batch):
    features, sentence = batch["fake_features"].requires_grad_(), batch["sentence"]
    embedding = torch.randn(3, 5, requires_grad=True)
    loss = generator_loss(discriminator, features, embedding, sentence)
    torch.testing.assert_close(loss.total, -loss.logit - 4 * loss.similarity)
    loss.total.backward()
    assert features.grad.abs().sum() > 0 and embedding.grad.abs().sum() > 0
