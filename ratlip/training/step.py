"""One training step: both losses, both updates, as the equations say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import record_function

from ratlip.data.batches import to_network
from ratlip.data.facts import true_of
from ratlip.networks.losses import DiscriminatorLoss, GeneratorLoss, generator_loss

if TYPE_CHECKING:
    from ratlip.training.session import Session

LATENT, MISMATCH = 21, 22  # streams of random numbers (see data/batches.py for the others)


def sample_latents(seed: int, step: int, count: int, size: int, rank: int = 0) -> Tensor:
    """Standard normal latent (count, size), a function of its arguments on every device."""
    rng = np.random.default_rng([seed, LATENT, step, rank])  # torch's first rows depend on `count`
    return torch.from_numpy(rng.standard_normal((count, size), dtype=np.float32))


def training_step(run: Session, batch: dict[str, Tensor]) -> tuple[DiscriminatorLoss, GeneratorLoss]:
    """One update of both networks (official.md, "Discriminator and losses"; the same fakes serve both).

    `batch`: an item of `data.batches.Batches`; `run.part` of it is this process's. Counts `run.step` up and returns the
    losses before the update, means over that part.
    """
    t, m, seed = run.settings.training, run.settings.model, run.settings.seed
    with record_function("data: to the device, latents"):
        real = to_network(batch["images"].to(run.device, non_blocking=True), m.image_size, t.real_resize)
        captions = batch["caption"].to(run.device)
        sentence = run.sentences[captions[run.part]]
        latent = sample_latents(seed, run.draw, len(captions), m.latent_size)[run.part].to(run.device)
    with record_function("generator, forward"):
        fake = run.generator(latent, sentence)
    with run.fabric.autocast():
        with record_function("CLIP on generated images, forward"):
            fake_features, fake_embedding = run.tower.features(fake, m.feature_blocks, embedding=run.tower is run.clip)
            if fake_embedding is None:  # the features are those of another tower
                fake_embedding = run.clip.embed_images(fake)
        with record_function("CLIP on real images, forward"), torch.no_grad():
            if run.real_features is not None:
                real_features = run.real_features(real, batch["image"])
            else:
                real_features, _ = run.tower.features(real, m.feature_blocks, embedding=False)

    mismatched = mismatch(captions, run.sentences, run.facts, t.mismatch, seed, run.draw)[run.part]
    with record_function("D and penalty, forward"):
        loss_d = DiscriminatorLoss(*run.critic(real_features, fake_features.detach(), sentence, mismatched))
    run.optimiser_d.zero_grad()
    with record_function("D and penalty, backward"):
        run.fabric.backward(loss_d.total)
    with record_function("optimiser of D"):
        run.optimiser_d.step()
    run.optimiser_d.zero_grad()  # used up: memory for G's backward pass, which takes the most

    # The generator is judged by the updated discriminator, whose own weights want no gradient now.
    plain = run.networks["discriminator"].requires_grad_(False)
    with record_function("D for G's step, forward"), run.fabric.autocast():
        loss_g = generator_loss(plain, fake_features, fake_embedding, sentence, t.similarity_weight)
    run.optimiser_g.zero_grad()
    with record_function("D, CLIP and generator, backward"):
        run.fabric.backward(loss_g.total)
    with record_function("optimiser of G, average"):
        run.optimiser_g.step()
        run.optimiser_g.zero_grad()
        plain.requires_grad_(True)
        if "average" in run.networks:
            run.networks["average"].update_parameters(run.networks["generator"])
    run.step += 1
    return loss_d, loss_g


def mismatch(
    captions: Tensor, sentences: Tensor, facts: Tensor, mode: str, seed: int, step: int, rank: int = 0
) -> Tensor:
    """Sentences (B,E) that are not true of the images of the batch, one for each of `captions` (B,).

    `captions` number the rows of `sentences` (N,E) and of `facts` (N,1+R,K), which say what each caption says and what
    its image shows (`clip.pairs.caption_facts`; K is 1 where captions name all).

    "roll" (as published): the next image's sentence; where captions name a part of what their images show, the next one
    that is not true of this image. Colour and background alone tell most of these from the true one, so a discriminator
    trained on them learns little else. "similar": half of them are instead drawn from the 4 most similar of 256 random
    captions that are not true of the image. "published": the next image's sentence, whatever it says, even for a batch
    of one, where it is the true one (difference 7); any other mode raises ValueError there.
    """
    if len(captions) == 1 and mode != "published":
        raise ValueError("a batch of one holds no other sentence to mismatch with: use a batch size of at least 2")
    sentence, device = sentences[captions], sentences.device
    if mode == "published" or mode == "roll" and facts.shape[2] == 1:
        return sentence.roll(-1, dims=0)
    rng = np.random.default_rng([seed, MISMATCH, step, rank])
    pool = torch.from_numpy(rng.integers(0, len(sentences), 256)).to(device)
    shows = facts[captions, 1:][:, None]
    rolled = sentence.roll(-1, dims=0) if facts.shape[2] == 1 else sentences[_next_false(captions, pool, facts)]
    if mode != "similar":
        return rolled
    choice = torch.from_numpy(rng.integers(0, 4, (len(captions), 1))).to(device)
    cosine = F.normalize(sentence, dim=1) @ F.normalize(sentences[pool], dim=1).T
    cosine = cosine.masked_fill(true_of(facts[pool, 0], shows), -2)
    similarity, nearest = cosine.topk(4, dim=1)
    near, found = pool[nearest.gather(1, choice)].squeeze(1), similarity.gather(1, choice) > -2
    even = torch.arange(len(captions), device=device)[:, None] % 2 == 0
    return torch.where(even & found, sentences[near], rolled)


def _next_false(captions: Tensor, pool: Tensor, facts: Tensor) -> Tensor:
    """For each of `captions` (B,), the next one of the batch, else of the `pool`, that is not true of its image: (B,).

    Where all are true of it, its own: no sentence is a mismatch for it.
    """
    size, device = len(captions), captions.device
    after = (torch.arange(size, device=device)[:, None] + torch.arange(1, size, device=device)) % size
    candidates = torch.cat([captions[after], pool.expand(size, -1), captions[:, None]], dim=1)
    false = ~true_of(facts[candidates, 0], facts[captions, 1:][:, None])
    false[:, -1] = True
    return candidates.gather(1, false.int().argmax(1, keepdim=True)).squeeze(1)
