"""The plain form of a training step and of generation: everything the published step computes, as it is written down.

It works on the same networks as `ratlip.training.loop`, so both forms give the same losses and gradients up to rounding
(tests/unit/test_bench.py), which proves that nothing was left out of ours. Plain means: maps are resized before
the first fuse and the shortcut, each affine and activation makes a new map, attention is composed of PyTorch's
operations, CLIP is open_clip's own code with all its blocks for real and generated images, the text encoder is
called, gradients flow down to the real image, D works through real, mismatched and generated pairs in three
passes, its weights stay in the graph of G's step, and Adam takes one operation after the other (`foreach`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ratlip.data.batches import to_network
from ratlip.networks import ConvShuffle, Generator, OfficialRecurrentAffine
from ratlip.networks.generator import AFFINES
from ratlip.networks.losses import DiscriminatorLoss, GeneratorLoss, clip_similarity, hinge, ma_gp
from ratlip.training.session import Session
from ratlip.training.step import mismatch, sample_latents


class Towers:
    """CLIP's image tower as open_clip computes it and as `ratlip.fast.tower` does, on the same tensors.

    Made from the open_clip model before `FrozenClip` takes it; `use` chooses the one that works.
    """

    def __init__(self, model: nn.Module):
        blocks = model.visual.transformer.resblocks
        self.places = [
            place
            for block in blocks
            for place in ((block, "attn"), *((block.mlp, name) for name, _ in block.mlp.named_children()))
        ]
        self.blocks, self.plain = list(blocks), self._modules()
        self.compiled: list | None = None
        self.ours: list[nn.Module] | None = None

    def _modules(self) -> list[nn.Module]:
        return [getattr(parent, name) for parent, name in self.places]

    def use(self, plain: bool) -> None:
        """Put the modules of one form in their places."""
        if self.ours is None:
            self.ours, self.compiled = self._modules(), [block._compiled_call_impl for block in self.blocks]
        for block, compiled in zip(self.blocks, self.compiled, strict=True):  # `training.compile`: ours alone
            block._compiled_call_impl = None if plain else compiled
        for (parent, name), module in zip(self.places, self.plain if plain else self.ours, strict=True):
            setattr(parent, name, module)


def plain_generate(generator: Generator, latent: Tensor, sentence: Tensor) -> Tensor:
    """What `generator(latent, sentence)` gives, (B,3,S,S), computed plainly."""
    condition = torch.cat((latent, sentence), dim=1)
    conditions = _states(generator, latent, sentence)
    blocks = [*generator.mapper.fusion_blocks, *generator.synthesis_blocks]
    conditions += [condition] * (AFFINES * len(blocks) - len(conditions))
    mapper, of = generator.mapper, [conditions[AFFINES * i : AFFINES * (i + 1)] for i in range(len(blocks))]
    x = generator.code(latent).unflatten(1, generator.code_shape)
    for block in mapper.fusion_blocks:
        four = of.pop(0)
        h = _fuse(block.fuse1, block.conv1(x), four[:2])
        x = x + _fuse(block.fuse2, _conv(block.conv2, h), four[2:])
    x = mapper.to_clip(x)
    prompts = mapper.prompts(condition).view(len(x), len(mapper.prompt_blocks), x.shape[1])
    x = mapper.from_clip(x + mapper.scale * mapper._clip.value.bridge(x, prompts, mapper.prompt_blocks))
    for block in generator.synthesis_blocks:
        four = of.pop(0)
        x = F.interpolate(x, size=(block.size, block.size)) if x.shape[-1] != block.size else x
        h = _conv(block.conv1, _fuse(block.fuse1, x, four[:2]))
        x = block.shortcut(x) + _conv(block.conv2, _fuse(block.fuse2, h, four[2:]))
    return generator.to_rgb(F.leaky_relu(x, 0.2))


def _states(generator: Generator, latent: Tensor, sentence: Tensor) -> list[Tensor]:
    if generator.recurrence is None:
        return []
    state = generator.recurrence.initial(latent).chunk(2, dim=1)
    states = []
    for _ in range(generator.recurrence.steps):
        state = generator.recurrence.cell(sentence, state)
        states.append(state[0])
    return states


def _fuse(fuse: nn.Module, x: Tensor, conditions: Sequence[Tensor]) -> Tensor:
    for affine, condition in zip((fuse.affine0, fuse.affine1), conditions, strict=True):
        if isinstance(affine, OfficialRecurrentAffine):
            _, (state, _) = affine.lstm(condition[None])
            condition = state[0]
        gamma, beta = (mlp(condition)[:, :, None, None].expand_as(x) for mlp in (affine.gamma, affine.beta))
        x = F.leaky_relu(gamma * x + beta, 0.2)
    return x


def _conv(conv: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(conv, ConvShuffle):
        return F.conv2d(x, conv.weight, conv.bias, padding=1)
    x = F.leaky_relu(conv.norm(F.conv2d(x, conv.conv.weight, padding=1)), 0.01)
    a = conv.attention
    if isinstance(a, nn.Identity):
        return x
    channel, place = x.unflatten(1, (a.groups, -1)).flatten(0, 1).chunk(2, dim=1)
    mean = channel.mean(dim=(2, 3), keepdim=True)
    channel = channel * torch.sigmoid(a.channel_weight * mean + a.channel_bias)
    place = place * torch.sigmoid(a.spatial_weight * a.norm(place) + a.spatial_bias)
    return F.channel_shuffle(torch.cat((channel, place), dim=1).view_as(x), 2)


def plain_optimisers(run: Session) -> dict[str, torch.optim.Adam]:
    """Adam for both networks of the run, one operation after the other for all tensors."""
    t = run.settings.training
    return {
        name: torch.optim.Adam(run.networks[name].parameters(), lr, betas=t.betas, foreach=True)
        for name, lr in (("generator", t.lr_g), ("discriminator", t.lr_d))
    }


def plain_step(
    run: Session, batch: dict[str, Tensor], optimisers: dict[str, torch.optim.Optimizer], captions: Sequence[str]
) -> tuple[DiscriminatorLoss, GeneratorLoss]:
    """What `training.training_step(run, batch)` does, computed plainly; `captions`: all training captions."""
    t, m, clip = run.settings.training, run.settings.model, run.clip
    generator, discriminator = run.networks["generator"], run.networks["discriminator"]
    real = to_network(batch["images"].to(run.device), m.image_size, t.real_resize).requires_grad_()
    numbers = batch["caption"].to(run.device)
    sentence = clip.embed_text([captions[i] for i in batch["caption"].tolist()])
    latent = sample_latents(run.settings.seed, run.draw, len(real), m.latent_size, run.rank).to(run.device)
    mismatched = mismatch(numbers, run.sentences, run.groups, t.mismatch, run.settings.seed, run.draw, run.rank)

    with run.fabric.autocast():
        real_features, _ = clip.features(real, m.feature_blocks)
        fake = plain_generate(generator, latent, sentence)
        fake_features, fake_embedding = clip.features(fake, m.feature_blocks)
    real_features, sentence = real_features.float(), sentence.requires_grad_()
    real_logits = discriminator(real_features, sentence)
    loss_real = hinge(real_logits, real=True)
    loss_mismatch = hinge(discriminator(real_features, mismatched), real=False)
    loss_fake = hinge(discriminator(fake_features.detach().float(), sentence), real=False)
    penalty = ma_gp(real_logits, real_features, sentence, t.penalty_weight, t.penalty_power)
    total = loss_real + (loss_fake + loss_mismatch) / 2 + penalty
    optimisers["discriminator"].zero_grad()
    total.backward()
    optimisers["discriminator"].step()

    with run.fabric.autocast():
        logit = discriminator(fake_features, sentence).mean()
        similarity = clip_similarity(fake_embedding, sentence).mean()
    loss = -logit - t.similarity_weight * similarity
    optimisers["generator"].zero_grad()
    loss.backward()
    optimisers["generator"].step()
    if "average" in run.networks:
        run.networks["average"].update_parameters(generator)
    run.step += 1
    return (
        DiscriminatorLoss(loss_real, loss_mismatch, loss_fake, penalty, total),
        GeneratorLoss(logit, similarity, loss),
    )
