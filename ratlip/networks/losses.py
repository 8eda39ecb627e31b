"""The losses of both networks (official.md, "Discriminator and losses"), one equation a function."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ratlip.networks import Discriminator


def hinge(logits: Tensor, real: bool) -> Tensor:
    """mean(max(0, 1 - logit)) for real pairs, mean(max(0, 1 + logit)) for others; logits (B,) -> scalar."""
    return F.relu(1 - logits if real else 1 + logits).mean()


def ma_gp(logits: Tensor, features: Tensor, sentence: Tensor, weight: float = 2.0, power: float = 6.0) -> Tensor:
    """Matching-aware gradient penalty at real, matching pairs.

    weight * mean(|| d logit / d (features, sentence) ||^power), the norm taken per sample over both inputs
    together. logits (B,) must depend on `features` (B,...) and `sentence` (B,E), which require grad.
    Returns a scalar that can be differentiated.
    """
    gradients = torch.autograd.grad(logits.sum(), (features, sentence), create_graph=True)
    of_features, of_sentence = (gradient.flatten(1).square().sum(dim=1) for gradient in gradients)
    # (norm^2)^(p/2): a square root would make the gradient of a vanishing norm NaN.
    return weight * (of_features + of_sentence).pow(power / 2).mean()


def clip_similarity(image_embedding: Tensor, sentence: Tensor) -> Tensor:
    """Cosine of image and text embedding, both raw (B,E) -> (B,) in [-1,1]."""
    return F.cosine_similarity(image_embedding, sentence, dim=1)


@dataclass(frozen=True)
class DiscriminatorLoss:
    """Scalars: the three hinge terms, the penalty, and total = real + (fake + mismatch) / 2 + penalty."""

    real: Tensor
    mismatch: Tensor
    fake: Tensor
    penalty: Tensor
    total: Tensor


@dataclass(frozen=True)
class GeneratorLoss:
    """Scalars: mean logit and mean cosine of the fakes, and total = -logit - weight * similarity."""

    logit: Tensor
    similarity: Tensor
    total: Tensor


def discriminator_loss(
    discriminator: Discriminator,
    real_features: Tensor,
    fake_features: Tensor,
    sentence: Tensor,
    mismatched: Tensor,
    penalty_weight: float = 2.0,
    penalty_power: float = 6.0,
) -> DiscriminatorLoss:
    """hinge(real) + (hinge(fake) + hinge(real, mismatched)) / 2 + MA-GP.

    real_features, fake_features: CLIP features (B,K,C,g,g) of real and generated images; sentence (B,E)
    the matching raw text embeddings; mismatched (B,E) those of other images (as published: the batch rolled
    by one, `sentence.roll(-1, 0)`). No gradient reaches the arguments, only the discriminator.
    """
    real_features = real_features.detach().requires_grad_()
    sentence = sentence.detach().requires_grad_()
    real_logits, mismatched_logits = discriminator(real_features, sentence, mismatched.detach())
    real = hinge(real_logits, real=True)
    mismatch = hinge(mismatched_logits, real=False)
    penalty = ma_gp(real_logits, real_features, sentence, penalty_weight, penalty_power)
    fake = hinge(discriminator(fake_features.detach(), sentence.detach()), real=False)
    return DiscriminatorLoss(real, mismatch, fake, penalty, real + (fake + mismatch) / 2 + penalty)


def generator_loss(
    discriminator: Discriminator,
    fake_features: Tensor,
    fake_embedding: Tensor,
    sentence: Tensor,
    similarity_weight: float = 4.0,
) -> GeneratorLoss:
    """-mean logit - similarity_weight * mean cos(CLIP(fake), sentence).

    fake_features (B,K,C,g,g) and fake_embedding (B,E) of the generated images, with their graph; sentence
    (B,E) raw. The caller keeps the discriminator's parameters out of the graph (requires_grad_(False)) if
    their gradients are not wanted.
    """
    logit = discriminator(fake_features, sentence).mean()
    similarity = clip_similarity(fake_embedding, sentence).mean()
    return GeneratorLoss(logit, similarity, -logit - similarity_weight * similarity)
