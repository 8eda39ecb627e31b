"""A run at work: its networks, optimisers and checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ratlip.cache import check_archive
from ratlip.clip.frozen import FrozenClip, shuffled
from ratlip.clip.loading import brief
from ratlip.clip.pairs import caption_facts
from ratlip.errors import RunError, SettingsError
from ratlip.fast import accelerate, options
from ratlip.fast.critic import fast_discriminator_loss
from ratlip.fast.memory import keep_freed_memory
from ratlip.files import atomic_path
from ratlip.networks import Discriminator, Generator
from ratlip.settings import Settings
from ratlip.training.processes import sync_batch_norms
from ratlip.training.start import match_spread, weights_by_name

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from ratlip.data.prepared import Prepared

Tensors = tuple[Tensor, ...] | list[Tensor]
OF_GENERATOR = (  # settings of the section model that are arguments of the same name
    *("image_size", "rat_scope", "rat_input", "hidden_size", "attention", "attention_groups", "latent_size"),
    *("base_channels", "code_channels", "mapper_blocks", "prompt_blocks", "bridge_scale"),
)
OF_DISCRIMINATOR = ("feature_blocks", "d_channels", "logit_channels", "unused_shortcuts", "gate")


def build_networks(
    settings: Settings, clip: FrozenClip, sentences: Tensor | None = None
) -> tuple[Generator, Discriminator]:
    """Both networks in their fast form, fresh weights from `settings.seed` and their names.

    `sentences` (N,E), embeddings of all training captions, set the scale of `model.rat_input: scaled`, which is NaN
    without them (a checkpoint brings it too). Raises SettingsError where the networks do not fit the CLIP.
    """
    m = settings.model
    if m.image_size != clip.image_size or max((*m.prompt_blocks, *m.feature_blocks)) >= clip.layers:
        raise SettingsError(
            f"{clip.name} takes images of {clip.image_size} px and has the blocks 0 to {clip.layers - 1}; "
            f"set model.image_size (now {m.image_size}), model.prompt_blocks (now {list(m.prompt_blocks)}) "
            f"and model.feature_blocks (now {list(m.feature_blocks)}) accordingly"
        )
    of_g, of_d = ({name: getattr(m, name) for name in names} for names in (OF_GENERATOR, OF_DISCRIMINATOR))
    with torch.random.fork_rng(devices=[]):  # these weights are drawn anew at once
        generator = Generator(clip, conditioning=m.effective_conditioning, **of_g)
        discriminator = Discriminator(grid=clip.grid, clip_width=clip.width, sentence_size=clip.embed_dim, **of_d)
    weights_by_name(generator, settings.seed, "generator")
    weights_by_name(discriminator, settings.seed, "discriminator")
    accelerate(generator, discriminator)
    if sentences is not None and generator.state_scale is not None:
        match_spread(generator, sentences, settings.seed)
    return generator, discriminator


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

    def update(averages: Tensors, news: Tensors, updates: Tensor | int) -> None:
        n = float(updates)  # all tensors at once: on a GPU, reading `updates` waits for it
        torch._foreach_lerp_(averages, news, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(generator, multi_avg_fn=update)  # buffers (batch norm) are copied, not averaged


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

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """The first four arguments of `losses.discriminator_loss` -> the fields of its `DiscriminatorLoss`.

        In mixed precision the arguments come in 16 bits; the penalty's sum of squares needs 32.
        """
        real, fake, sentence, mismatched = (each.float() for each in arguments)
        loss = fast_discriminator_loss(self.discriminator, real, fake, sentence, mismatched, *self.penalty)
        return loss.real, loss.mismatch, loss.fake, loss.penalty, loss.total


class Session:
    """A run at work: networks and optimisers on their device, the step, and the checkpoint of all that.

    `networks`: the bare modules by name, as they are saved; `generator` and `critic` (the discriminator with
    its loss): the same, wrapped for precision and processes. `tower`: the CLIP whose features D sees, `clip` itself
    but for `model.discriminator_tower: random`. Opens with the last checkpoint of `folder`, if
    there is one. `begun`: the step at which the random numbers begin; 0 but after a resume as published. `part`: what
    of the global batch is this process's.
    """

    def __init__(
        self, fabric: Fabric, settings: Settings, prepared: Prepared, clip: FrozenClip, sentences: Tensor, folder: Path
    ):
        self.fabric, self.settings, self.folder = fabric, settings, folder
        self.device, share = fabric.device, settings.training.batch_size // fabric.world_size
        self.part = slice(fabric.global_rank * share, (fabric.global_rank + 1) * share)
        if self.device.type == "cpu":
            keep_freed_memory(kept_bytes(settings))
        self.clip, self.sentences = clip.to(self.device), sentences.to(self.device)
        self.facts = torch.from_numpy(caption_facts(prepared.train)).to(self.device)
        t = settings.training
        random = settings.model.discriminator_tower == "random"
        self.tower = shuffled(self.clip, settings.seed) if random else self.clip
        generator, discriminator = build_networks(settings, self.clip, self.sentences)
        if t.sync_batch_norm and fabric.world_size > 1:
            sync_batch_norms(generator)
        self.networks: dict[str, Any] = {"generator": generator, "discriminator": discriminator}
        if t.ema:
            self.networks["average"] = averaged(generator, t.ema).to(self.device)
        options.apply(t, generator, discriminator, *dict.fromkeys((self.clip, self.tower)))
        cached = (self.tower, settings.model.feature_blocks, prepared.train, settings.data)
        self.real_features = options.RealFeatures(*cached) if t.cached_features else None
        critic = Critic(discriminator, t.penalty_weight, t.penalty_power)
        self.generator, self.optimiser_g = fabric.setup(generator, adam(generator, t.lr_g, t.betas))
        self.critic, self.optimiser_d = fabric.setup(critic, adam(discriminator, t.lr_d, t.betas))
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

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile does not count as training time."""
        start = time.monotonic()
        yield
        self._clock += time.monotonic() - start

    def best_generator(self) -> nn.Module:
        """The averaged generator where there is one, else the trained one."""
        return self.networks["average"].module if "average" in self.networks else self.networks["generator"]

    def save(self) -> None:
        """Write `checkpoint.pt`, whole or not at all. RunError where a weight or a moment is not finite."""
        content = {
            "step": self.step,
            "seconds": self.seconds,
            "settings": self.settings.to_yaml(),
            "networks": {name: each.state_dict() for name, each in self.networks.items()},
            "optimisers": {name: each.state_dict() for name, each in self.optimisers.items()},
            "precision": self.fabric.strategy.precision.state_dict(),  # the loss scale of 16-mixed
        }
        path = self.folder / "checkpoint.pt"
        if wrong := [name for name, tensor in tensors(content) if not bool(tensor.isfinite().all())]:
            few = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            kept = "the one that is there is good" if path.is_file() else "there is none yet"
            mend = f"lower training.lr_g and training.lr_d ({kept})"
            raise RunError(f"{path}: not written at step {self.step}, where not finite: {few}; {mend}")
        try:
            with atomic_path(path) as draft:
                torch.save(content, draft)
        except (OSError, RuntimeError) as error:  # torch says RuntimeError where the disk is full
            kept = "the one that is there is good" if path.is_file() else "there is none yet"
            mend = f"free disk space or mend the folder's rights ({kept}); the same command goes on"
            raise RunError(f"{path}: not written at step {self.step} ({brief(error)}); {mend}") from error

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            return
        content = read_checkpoint(path, self.device)
        for kind, modules in (("networks", self.networks), ("optimisers", self.optimisers)):
            for name, each in modules.items():
                each.load_state_dict(content[kind][name])
        self.step, self._earlier = content["step"], content["seconds"]
        if self.settings.training.resume == "published":
            self.begun = self.step  # difference 12: no loss scale, and an epoch begins with the draws of a fresh start
        else:
            self.fabric.strategy.precision.load_state_dict(content["precision"])


def tensors(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of a nest of dicts and lists with their dotted names."""
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, dict | list | tuple):
        for key, each in content.items() if isinstance(content, dict) else enumerate(content):
            yield from tensors(each, f"{name}.{key}" if name else f"{key}")


def read_checkpoint(path: Path, device: torch.device | str, mapped: bool = False) -> dict:
    """The content of a checkpoint; nothing in the file is executed. RunError where it cannot be read, or was changed.

    `mapped`: of the tensors, only those that are looked at are read (a generator is an eighth of its checkpoint).
    """
    mend = "delete the file to start this run anew"
    try:
        content = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
        check_archive(path)
        missing = {"step", "seconds", "networks", "optimisers", "precision"} - set(content)
    except Exception as error:
        why = f"{error}" if type(error) is ValueError else type(error).__name__
        raise RunError(f"{path}: not a readable checkpoint ({why}); {mend}") from error
    if missing:
        raise RunError(f"{path}: not a checkpoint of ratlip (no {', '.join(sorted(missing))}); {mend}")
    for name, state in content["networks"].items():  # runs of before the spatial gates were called so
        content["networks"][name] = {k.replace("attention.place_", "attention.spatial_"): v for k, v in state.items()}
    return content
