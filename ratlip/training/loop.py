"""Training, from top to bottom: one file, one loop, no hidden state.

A run folder holds `config.yaml`, `metrics.jsonl`, `tensorboard/`, `samples/`, `checkpoint.pt` and, when the
last step is done, `provenance.json`. Everything random at a step is a function of (seed, step), so
`checkpoint.pt` needs no random state, and a killed run goes on exactly as if it had never stopped (bit for
bit on a CPU), unless it is told to resume as published (`training.resume`).
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from ratlip.clip.frozen import FrozenClip
from ratlip.clip.small import caption_groups
from ratlip.data.batches import Batches, to_network
from ratlip.errors import RunError, SettingsError
from ratlip.fast import options
from ratlip.fast.memory import keep_freed_memory
from ratlip.files import atomic_path, read_json, write_json, write_text
from ratlip.networks import Discriminator, Generator
from ratlip.networks.losses import DiscriminatorLoss, GeneratorLoss, discriminator_loss, generator_loss
from ratlip.plots import pictures
from ratlip.progress import bar
from ratlip.provenance import describe
from ratlip.settings import Settings, TrainingSettings

LATENT, MISMATCH = 21, 22  # streams of random numbers (see data/batches.py for the others)


def build_networks(settings: Settings, clip: FrozenClip) -> tuple[Generator, Discriminator]:
    """Both networks, fresh weights from `settings.seed`. SettingsError where they do not fit the CLIP."""
    m = settings.model
    if m.image_size != clip.image_size or max((*m.prompt_blocks, *m.feature_blocks)) >= clip.layers:
        raise SettingsError(
            f"{clip.name} takes images of {clip.image_size} px and has the blocks 0 to {clip.layers - 1}; "
            f"set model.image_size (now {m.image_size}), model.prompt_blocks (now {list(m.prompt_blocks)}) "
            f"and model.feature_blocks (now {list(m.feature_blocks)}) accordingly"
        )
    torch.manual_seed(settings.seed)
    generator = Generator(
        clip,
        image_size=m.image_size,
        conditioning=m.conditioning,
        rat_scope=m.rat_scope,
        hidden_size=m.hidden_size,
        attention=m.attention,
        attention_groups=m.attention_groups,
        latent_size=m.latent_size,
        base_channels=m.base_channels,
        code_channels=m.code_channels,
        mapper_blocks=m.mapper_blocks,
        prompt_blocks=m.prompt_blocks,
        bridge_scale=m.bridge_scale,
    )
    discriminator = Discriminator(
        grid=clip.grid,
        clip_width=clip.width,
        sentence_size=clip.embed_dim,
        feature_blocks=m.feature_blocks,
        d_channels=m.d_channels,
        logit_channels=m.logit_channels,
        unused_shortcuts=m.unused_shortcuts,
        gate=m.gate,
    )
    return generator, discriminator


def sample_latents(seed: int, step: int, count: int, size: int, rank: int = 0) -> Tensor:
    """Standard normal latent (count, size), a function of its arguments on every device."""
    rng = np.random.default_rng([seed, LATENT, step, rank])  # torch's first rows depend on `count`
    return torch.from_numpy(rng.standard_normal((count, size), dtype=np.float32))


def adam(network: nn.Module, lr: float, betas: tuple[float, float]) -> torch.optim.Adam:
    """Adam for all weights of a network, in one pass over them where the device has one (`fused`)."""
    devices = {parameter.device.type for parameter in network.parameters()}
    return torch.optim.Adam(network.parameters(), lr, betas=betas, fused=devices <= {"cpu", "cuda"})


def kept_bytes(settings: Settings) -> int:
    """Size of freed memory worth keeping in training: the maps of the last synthesis block, and a bit."""
    m = settings.model
    return settings.training.batch_size * m.base_channels * m.image_size**2 * 4 * 5 // 4


def averaged(generator: Generator, decay: float) -> AveragedModel:
    """Exponential moving average of the generator's weights, whose decay warms up as (1 + n) / (10 + n)."""

    def update(averages: list[Tensor], news: list[Tensor], updates: Tensor) -> None:
        n = float(updates)  # all tensors at once: on a GPU, reading `updates` waits for it
        torch._foreach_lerp_(averages, news, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(generator, multi_avg_fn=update)  # buffers (batch norm) are copied, not averaged


def total_steps(settings: Settings, images: int) -> int:
    """The budget in steps, whichever way the settings give it."""
    t = settings.training
    return t.steps if t.steps is not None else t.epochs * -(-images // t.batch_size)


def is_complete(folder: str | Path) -> bool:
    """Whether the run in `folder` has done its last step."""
    return (Path(folder) / "provenance.json").is_file()


def train(
    settings: Settings,
    prepared,
    clip: FrozenClip,
    sentences: Tensor,
    folder: str | Path,
    *,
    accelerator: str = "auto",
    devices: int | str = 1,
    workers: int = 0,
    progress: bool = True,
    end: float | None = None,
) -> Path:
    """Train one run into `folder`, or go on with it, or return at once when it is complete.

    `prepared`: the prepared dataset; `sentences`: raw text embeddings (N,E) of all training captions, in the
    order of `prepared.train.all_captions`. `end`: a `time.monotonic()` at which the run saves a checkpoint and
    returns unfinished, for another sitting. Raises RunError where the folder belongs to other settings.
    """
    folder = Path(folder)
    _claim(folder, settings, prepared, clip)
    if is_complete(folder):
        return folder
    t = settings.training
    fabric = _launched(accelerator, devices, t)
    run = Session(fabric, settings, prepared, clip, sentences, folder)
    data = Batches(
        prepared.train,
        crop=settings.data.crop,
        flip=settings.data.flip,
        batch_size=t.batch_size,
        seed=settings.seed,
        rank=fabric.global_rank,
        world=fabric.world_size,
    )
    steps = total_steps(settings, len(prepared.train))
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=range(run.draw, steps - run.begun),
        num_workers=workers,
        pin_memory=fabric.device.type == "cuda",
    )
    log = Log(folder, run.step, enabled=fabric.is_global_zero)
    samples = SampleGrid(settings, prepared, run.clip, folder)
    meter = bar(
        total=steps, initial=run.step, unit="step", desc=folder.name, enabled=progress and fabric.is_global_zero
    )

    for batch in loader:
        loss_d, loss_g = training_step(run, batch)
        meter.update()
        last = run.step == steps
        if run.step % t.log_every == 0 or last:
            row = log.write(run.step, run.seconds, loss_d, loss_g)
            rate = (meter.format_dict["rate"] or 0) * t.batch_size
            meter.set_postfix_str(f"D {row['d_total']:.2f} G {row['g_total']:.2f} {rate:.0f} images/s")
        if fabric.is_global_zero and (run.step % t.sample_every == 0 or last):
            samples.save(run.best_generator(), run.step)
        if fabric.is_global_zero and (run.step % t.checkpoint_every == 0 or last):
            run.save()
        if end is not None and time.monotonic() >= end and not last:
            break
    meter.close()
    log.close()
    if run.step < steps:
        if fabric.is_global_zero:
            run.save()
    elif fabric.is_global_zero:
        write_json(folder / "provenance.json", _provenance(run, prepared))
    fabric.barrier()
    return folder


def _provenance(run: Session, prepared) -> dict:
    """Where a finished run comes from, as plain JSON values."""
    return {
        "run": run.folder.name,
        "seed": run.settings.seed,
        "steps": run.step,
        "training_seconds": round(run.seconds, 1),
        "devices": f"{run.fabric.world_size} x {run.device.type}",
        "peak_memory_mib": peak_memory_mib(run.device),
        **{
            f"{name}_parameters": sum(p.numel() for p in run.networks[name].parameters())
            for name in ("generator", "discriminator")
        },
        "clip": run.clip.name,
        "clip_fingerprint": run.clip.fingerprint,
        "data": prepared.manifest["content_sha256"],
        **describe(),
    }


def peak_memory_mib(device: torch.device) -> int:
    """The most memory held so far: by tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def _launched(accelerator: str, devices: int | str, settings: TrainingSettings) -> Fabric:
    """Device, precision and processes, started. RunError where they are not here or do not fit the batch."""
    try:
        fabric = Fabric(accelerator=accelerator, devices=devices, precision=settings.precision)
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        raise RunError(f"accelerator={accelerator}, devices={devices}: not possible here ({error})") from error
    fabric.launch()
    share, rest = divmod(settings.batch_size, fabric.world_size)
    if rest or (share == 1 and fabric.world_size > 1):
        raise RunError(
            f"devices={devices}: training.batch_size={settings.batch_size} cannot be shared by "
            f"{fabric.world_size} processes; each needs the same number of images, two at least"
        )
    return fabric


class Critic(nn.Module):
    """The discriminator's whole loss as one forward pass.

    The gradient inside MA-GP is then taken within it: Fabric forbids one outside of `fabric.backward` in mixed
    precision, and a process group counts on one forward pass for each backward.
    """

    def __init__(self, discriminator: Discriminator, penalty_weight: float, penalty_power: float):
        super().__init__()
        self.discriminator, self.penalty = discriminator, (penalty_weight, penalty_power)
        for block in (*discriminator.blocks, discriminator.main):
            if block.shortcut is not None and not block.mixes:  # never used: nobody may wait for its gradient
                block.shortcut.requires_grad_(False)

    def forward(
        self, real_features: Tensor, fake_features: Tensor, sentence: Tensor, mismatched: Tensor
    ) -> tuple[Tensor, ...]:
        """Arguments as of `losses.discriminator_loss` -> the fields of its `DiscriminatorLoss`.

        In mixed precision the arguments come in 16 bits; the penalty's sum of squares needs 32.
        """
        full = (argument.float() for argument in (real_features, fake_features, sentence, mismatched))
        loss = discriminator_loss(self.discriminator, *full, *self.penalty)
        return tuple(getattr(loss, field.name) for field in fields(loss))


def training_step(run: Session, batch: dict[str, Tensor]) -> tuple[DiscriminatorLoss, GeneratorLoss]:
    """One update of both networks (official.md, "Discriminator and losses"; the same fakes serve both).

    `batch`: an item of `data.batches.Batches`. Counts `run.step` up and returns the losses before the update.
    """
    t, m = run.settings.training, run.settings.model
    real = to_network(batch["images"].to(run.device, non_blocking=True), m.image_size, t.real_resize)
    captions = batch["caption"].to(run.device)
    sentence = run.sentences[captions]
    latent = sample_latents(run.settings.seed, run.draw, len(real), m.latent_size, run.rank).to(run.device)

    fake = run.generator(latent, sentence)
    with run.fabric.autocast():
        fake_features, fake_embedding = run.clip.features(fake, m.feature_blocks)
        with torch.no_grad():
            if run.real_features is not None:
                real_features = run.real_features(real, batch["image"])
            else:
                real_features, _ = run.clip.features(real, m.feature_blocks, embedding=False)

    mismatched = mismatch(captions, run.sentences, run.groups, t.mismatch, run.settings.seed, run.draw, run.rank)
    loss_d = DiscriminatorLoss(*run.critic(real_features, fake_features.detach(), sentence, mismatched))
    run.optimiser_d.zero_grad()
    run.fabric.backward(loss_d.total)
    run.optimiser_d.step()
    run.optimiser_d.zero_grad()  # used up: memory for G's backward pass, which takes the most

    # The generator is judged by the updated discriminator, whose own weights want no gradient now.
    plain = run.networks["discriminator"].requires_grad_(False)
    with run.fabric.autocast():
        loss_g = generator_loss(plain, fake_features, fake_embedding, sentence, t.similarity_weight)
    run.optimiser_g.zero_grad()
    run.fabric.backward(loss_g.total)
    run.optimiser_g.step()
    run.optimiser_g.zero_grad()
    plain.requires_grad_(True)
    if "average" in run.networks:
        run.networks["average"].update_parameters(run.networks["generator"])
    run.step += 1
    return loss_d, loss_g


def mismatch(
    captions: Tensor, sentences: Tensor, groups: Tensor, mode: str, seed: int, step: int, rank: int = 0
) -> Tensor:
    """Sentences (B,E) that do not belong to the images of the batch, one for each of `captions` (B,).

    `captions` number the rows of `sentences` (N,E) and of `groups` (N,), whose equal numbers say that two captions
    are true of the same images (`clip_training.caption_groups`).

    "roll" (as published): the next image's sentence. Colour and background alone tell most of these from the
    true one, so a discriminator trained on them learns little else. "similar": half of them are instead drawn
    from the 4 most similar of 256 random captions of other groups. "published": as "roll", even for a batch of
    one, where the neighbour's sentence is the true one (official.md, difference 7); any other mode raises
    ValueError there.
    """
    if len(captions) == 1 and mode != "published":
        raise ValueError("a batch of one holds no other sentence to mismatch with: use a batch size of at least 2")
    sentence = sentences[captions]
    rolled = sentence.roll(-1, dims=0)
    if mode != "similar":
        return rolled
    device = sentence.device
    rng = np.random.default_rng([seed, MISMATCH, step, rank])
    pool = torch.from_numpy(rng.integers(0, len(sentences), 256)).to(device)
    choice = torch.from_numpy(rng.integers(0, 4, (len(captions), 1))).to(device)
    cosine = F.normalize(sentence, dim=1) @ F.normalize(sentences[pool], dim=1).T
    cosine = cosine.masked_fill(groups[captions][:, None] == groups[pool], -2)
    similarity, places = cosine.topk(4, dim=1)
    near, found = pool[places.gather(1, choice)].squeeze(1), similarity.gather(1, choice) > -2
    even = torch.arange(len(captions), device=device)[:, None] % 2 == 0
    return torch.where(even & found, sentences[near], rolled)


class Session:
    """A run at work: networks and optimisers on their device, the step, and the checkpoint of all that.

    `networks`: the plain modules by name, as they are saved; `generator` and `critic` (the discriminator with
    its loss): the same, wrapped for precision and processes. Opens with the last checkpoint of `folder`, if
    there is one. `begun`: the step at which the random numbers begin; 0 but after a resume as published.
    """

    def __init__(self, fabric: Fabric, settings: Settings, prepared, clip: FrozenClip, sentences: Tensor, folder: Path):
        self.fabric, self.settings, self.folder = fabric, settings, folder
        self.device, self.rank = fabric.device, fabric.global_rank
        if self.device.type == "cpu":
            keep_freed_memory(kept_bytes(settings))
        self.clip, self.sentences = clip.to(self.device), sentences.to(self.device)
        self.groups = torch.from_numpy(caption_groups(prepared.train)).to(self.device)
        t = settings.training
        generator, discriminator = build_networks(settings, self.clip)
        self.networks: dict[str, nn.Module] = {"generator": generator, "discriminator": discriminator}
        if t.ema:
            self.networks["average"] = averaged(generator, t.ema).to(self.device)
        options.apply(t, generator, discriminator, self.clip)
        self.real_features = (
            options.RealFeatures(self.clip, settings.model.feature_blocks, prepared.train, settings.data)
            if t.cached_features
            else None
        )
        self.generator, self.optimiser_g = fabric.setup(generator, adam(generator, t.lr_g, t.betas))
        self.critic, self.optimiser_d = fabric.setup(
            Critic(discriminator, t.penalty_weight, t.penalty_power), adam(discriminator, t.lr_d, t.betas)
        )
        self.optimisers = {"generator": self.optimiser_g, "discriminator": self.optimiser_d}
        self.step, self.begun, self._earlier, self._clock = 0, 0, 0.0, time.monotonic()
        self._resume()

    @property
    def draw(self) -> int:
        """The number that names this step's random draws: batch, latent, mismatched sentences."""
        return self.step - self.begun

    @property
    def seconds(self) -> float:
        """Training time over all sittings."""
        return self._earlier + time.monotonic() - self._clock

    def best_generator(self) -> Generator:
        """The averaged generator where there is one, else the trained one."""
        return self.networks["average"].module if "average" in self.networks else self.networks["generator"]

    def save(self) -> None:
        """Write `checkpoint.pt`, whole or not at all."""
        content = {
            "step": self.step,
            "seconds": self.seconds,
            "settings": self.settings.to_yaml(),
            "networks": {name: each.state_dict() for name, each in self.networks.items()},
            "optimisers": {name: each.state_dict() for name, each in self.optimisers.items()},
            "precision": self.fabric.strategy.precision.state_dict(),
        }  # the loss scale of 16-mixed
        with atomic_path(self.folder / "checkpoint.pt") as draft:
            torch.save(content, draft)

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            return
        content = read_checkpoint(path, self.device)
        for name, network in self.networks.items():
            network.load_state_dict(content["networks"][name])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(content["optimisers"][name])
        self.step, self._earlier = content["step"], content["seconds"]
        if self.settings.training.resume == "published":
            # Neither loss scale nor random state come back (official.md, difference 12): a whole epoch
            # begins, with the draws of a fresh start.
            self.begun = self.step
        else:
            self.fabric.strategy.precision.load_state_dict(content["precision"])


def read_checkpoint(path: Path, device: torch.device | str) -> dict:
    """The content of a checkpoint; nothing in the file is executed. RunError where it cannot be read."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        missing = {"step", "seconds", "networks", "optimisers", "precision"} - set(content)
    except Exception as error:
        raise RunError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); delete the file to start this run anew"
        ) from error
    if missing:
        raise RunError(
            f"{path}: not a checkpoint of ratlip (no {', '.join(sorted(missing))}); "
            "delete the file to start this run anew"
        )
    return content


def _claim(folder: Path, settings: Settings, prepared, clip: FrozenClip) -> None:
    """Write or check `config.yaml`: a folder belongs to one identity."""
    config = folder / "config.yaml"
    identity = {"run": settings.run_hash, "clip": clip.fingerprint, "data": prepared.manifest["content_sha256"]}
    if config.is_file():
        try:
            found = dict(read_json(folder / "identity.json"))
        except (OSError, ValueError, TypeError) as error:
            raise RunError(
                f"{folder / 'identity.json'}: missing or damaged, so nothing tells what this run "
                "is made of; choose another folder or delete this one"
            ) from error
        different = [
            f"{key} {found.get(key)} instead of {value}" for key, value in identity.items() if found.get(key) != value
        ]
        if different:
            raise RunError(
                f"{folder}: holds a run of other settings ({', '.join(different)}); "
                "choose another folder or delete this one"
            )
        return
    write_json(folder / "identity.json", identity)
    write_text(config, settings.to_yaml())


class Log:
    """Losses to `metrics.jsonl` (one JSON object a line) and to TensorBoard."""

    def __init__(self, folder: Path, step: int, enabled: bool):
        self.path, self.enabled = folder / "metrics.jsonl", enabled
        if not enabled:
            return
        # Rows past the checkpoint belong to steps that will be done again.
        lines = self.path.read_text().splitlines(keepends=True) if self.path.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last one short
        write_text(self.path, "".join(line for line in whole if json.loads(line)["step"] <= step))
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def write(self, step: int, seconds: float, loss_d, loss_g) -> dict:
        row = {"step": step, "seconds": round(seconds, 2)}
        for prefix, loss in (("d", loss_d), ("g", loss_g)):
            row |= {f"{prefix}_{field.name}": round(getattr(loss, field.name).item(), 5) for field in fields(loss)}
        if self.enabled:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            for name, value in row.items():
                self.board.add_scalar(name, value, step)
        return row

    def close(self) -> None:
        if self.enabled:
            self.board.close()


class SampleGrid:
    """The same captions and latents at every visit, so that one sees them become pictures."""

    def __init__(self, settings: Settings, prepared, clip: FrozenClip, folder: Path):
        e, size = settings.evaluation, settings.model.latent_size
        test, count = prepared.test, min(settings.evaluation.grid_captions, len(prepared.test))
        chosen = np.linspace(0, len(test) - 1, count).astype(int)
        self.captions = [test.captions[int(i)][0] for i in chosen]
        self.sentence = clip.embed_text(self.captions).repeat_interleave(e.grid_images, dim=0)
        latent = sample_latents(settings.seed, 0, len(self.sentence), size, rank=10**6)
        self.latent = latent.to(self.sentence.device)
        self.folder, self.columns = folder / "samples", e.grid_images

    def save(self, generator: Generator, step: int) -> None:
        training = generator.training
        with torch.no_grad():
            images = generator.eval()(self.latent, self.sentence).clamp(-1, 1).float().cpu()
        generator.train(training)
        pictures.caption_grid(
            images.unflatten(0, (-1, self.columns)),
            self.captions,
            path=self.folder / f"step-{step:06d}.png",
            title=f"step {step}",
        )
