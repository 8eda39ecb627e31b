"""One training step in the plain order of work: the oracle that tests and the benchmark hold the real one against."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ratlip.data.batches import to_network
from ratlip.networks.losses import DiscriminatorLoss, GeneratorLoss, clip_similarity, hinge, ma_gp
from ratlip.training.session import Session
from ratlip.training.step import mismatch, sample_latents


class PlainStep:
    """What `training.step.training_step` does, in the plain order of work.

    The text encoder is called, all of CLIP's blocks for real and generated images, gradients flow down to the real
    image, D works through real, mismatched and generated pairs in three passes, its weights stay in the graph of G's
    step, and Adam takes one operation after the other (`foreach`). `captions`: all training captions.
    """

    def __init__(self, run: Session, captions: Sequence[str]):
        t, networks = run.settings.training, run.networks
        self.run, self.captions = run, captions
        self.optimisers = {
            name: torch.optim.Adam(networks[name].parameters(), lr, betas=t.betas, foreach=True)
            for name, lr in (("generator", t.lr_g), ("discriminator", t.lr_d))
        }

    def __call__(self, batch: dict[str, Tensor]) -> tuple[DiscriminatorLoss, GeneratorLoss]:
        run, clip, seed = self.run, self.run.clip, self.run.settings.seed
        t, m = run.settings.training, run.settings.model
        generator, discriminator = run.networks["generator"], run.networks["discriminator"]
        real = to_network(batch["images"].to(run.device), m.image_size, t.real_resize).requires_grad_()
        sentence = clip.embed_text([self.captions[i] for i in batch["caption"].tolist()])
        latent = sample_latents(seed, run.draw, len(real), m.latent_size).to(run.device)
        numbers = batch["caption"].to(run.device)
        mismatched = mismatch(numbers, run.sentences, run.facts, t.mismatch, seed, run.draw)

        with run.fabric.autocast():
            real_features, _ = run.tower.features(real, m.feature_blocks)
            fake = generator(latent, sentence)
            fake_features, fake_embedding = run.tower.features(fake, m.feature_blocks)
            if run.tower is not clip:
                fake_embedding = clip.embed_images(fake)
        real_features, sentence = real_features.float(), sentence.requires_grad_()
        real_logits = discriminator(real_features, sentence)
        loss_real = hinge(real_logits, real=True)
        loss_mismatch = hinge(discriminator(real_features, mismatched), real=False)
        loss_fake = hinge(discriminator(fake_features.detach().float(), sentence), real=False)
        penalty = ma_gp(real_logits, real_features, sentence, t.penalty_weight, t.penalty_power)
        total = loss_real + (loss_fake + loss_mismatch) / 2 + penalty
        self.optimisers["discriminator"].zero_grad()
        total.backward()
        self.optimisers["discriminator"].step()

        with run.fabric.autocast():
            logit = discriminator(fake_features, sentence).mean()
            similarity = clip_similarity(fake_embedding, sentence).mean()
        loss = -logit - t.similarity_weight * similarity
        self.optimisers["generator"].zero_grad()
        loss.backward()
        self.optimisers["generator"].step()
        if "average" in run.networks:
            run.networks["average"].update_parameters(generator)
        run.step += 1
        losses = DiscriminatorLoss(loss_real, loss_mismatch, loss_fake, penalty, total)
        return losses, GeneratorLoss(logit, similarity, loss)
