"""The discriminator's loss with the penalty's inner gradient written out.

D is piecewise linear: between its kinks, the gradient of a logit for D's inputs is a linear network of its own, the
transposed layers in reverse order with the slopes of the LeakyReLUs as they stand. Written out it is a second forward
pass, and the whole loss is differentiated once. Autograd, asked for the gradient of a gradient, also walks through
the slopes (whose derivative is zero) and down to the real features (which want none), and makes weight gradients as
convolutions with kernels as large as the map. Real and generated images go through D in one batch: it has no norm.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ratlip.fast.maps import usable
from ratlip.fast.networks import FastDiscriminator, sloped
from ratlip.networks import Discriminator
from ratlip.networks.losses import DiscriminatorLoss, discriminator_loss, hinge


def fast_discriminator_loss(
    discriminator: Discriminator,
    real_features: Tensor,
    fake_features: Tensor,
    sentence: Tensor,
    mismatched: Tensor,
    penalty_weight: float = 2.0,
    penalty_power: float = 6.0,
) -> DiscriminatorLoss:
    """`losses.discriminator_loss` up to rounding; that itself under autocast, while traced, and for a plain D."""
    d, count, inputs = discriminator, len(real_features), (real_features, fake_features, sentence, mismatched)
    if type(d) is not FastDiscriminator or not usable(real_features) or len(d.blocks) + 1 != real_features.shape[1]:
        return discriminator_loss(d, *inputs, penalty_weight, penalty_power)
    real_features, fake_features, sentence, mismatched = (each.detach() for each in inputs)
    x, *others = (torch.cat(pair) for pair in zip(real_features.unbind(1), fake_features.unbind(1), strict=True))
    blocks: list[Any] = [*d.blocks, d.main]
    walked = []
    for block, feature in zip(blocks, (*others, None), strict=True):
        x, *maps = block.traced(x, feature)
        walked.append((block, *(each[:count] for each in maps)))
    of_map, of_sentence = d.kernels()
    seen, read = F.conv2d(x, of_map), F.linear(torch.cat((sentence, mismatched)), of_sentence)
    logits, hidden = d.judged(torch.cat((seen[:count], seen)), torch.cat((read, read[:count])))
    matching, mismatching, fake = logits.chunk(3)

    grad = sloped(d.logit.get_parameter("2.weight").expand_as(hidden[:count]), hidden[:count])
    squares = [_square(F.linear(grad.sum(dim=(2, 3)), of_sentence.t()))]
    grad = F.conv_transpose2d(grad, of_map)
    for block, first, second in reversed(walked):
        if block.beta is not None:
            squares.append(block.beta.square() * _square(grad))
        grad = block.transposed(grad, first, second)
    norm = torch.stack([*squares, _square(grad)]).sum(dim=0)
    penalty = penalty_weight * norm.pow(penalty_power / 2).mean()
    real, mismatch, fake = hinge(matching, real=True), hinge(mismatching, real=False), hinge(fake, real=False)
    return DiscriminatorLoss(real, mismatch, fake, penalty, real + (fake + mismatch) / 2 + penalty)


def _square(x: Tensor) -> Tensor:
    """Sum of squares of each sample (B,...) -> (B,)."""
    return x.square().flatten(1).sum(dim=1)
