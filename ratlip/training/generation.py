"""Your own captions: `ratlip.load(run).generate("a large red ring on a white background", n=8)`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ratlip.clip.frozen import FrozenClip
from ratlip.clip.loading import load_clip
from ratlip.errors import RunError, SettingsError
from ratlip.fast.memory import keep_freed_memory
from ratlip.files import read_json
from ratlip.networks import Generator
from ratlip.progress import bar
from ratlip.settings import Settings, load_settings
from ratlip.training import portable
from ratlip.training.session import build_networks, read_checkpoint
from ratlip.training.step import sample_latents

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def best_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_generator(folder: str | Path, settings: Settings, clip: FrozenClip) -> Generator:
    """The run's generator as of its last checkpoint (its moving average where there is one), in eval mode."""
    return _restored(folder, settings, clip)[0]


def _restored(folder: str | Path, settings: Settings, clip: FrozenClip) -> tuple[Generator, int]:
    """See `load_generator`; and how many steps it was trained."""
    device, identity = clip.mean.device, Path(folder) / "identity.json"
    trained_with = read_json(identity)["clip"] if identity.is_file() else clip.fingerprint
    if trained_with != clip.fingerprint:
        other = f"was trained with the CLIP {trained_with}, not with {clip.name} ({clip.fingerprint})"
        raise RunError(f"{folder}: {other}, which would draw noise; give the folder of its own CLIP")
    content = read_checkpoint(Path(folder) / "checkpoint.pt", "cpu", mapped=True)
    networks = content["networks"]
    generator, _ = build_networks(settings, clip)  # whose fresh weights are overwritten
    average = {key.removeprefix("module."): value for key, value in networks.get("average", {}).items()}
    average.pop("n_averaged", None)
    generator.load_state_dict(average or networks["generator"])
    return generator.to(device).eval(), content["step"]


@torch.no_grad()
def generate(
    generator: nn.Module, latent: Tensor, sentence: Tensor, batch_size: int = 64, progress: bool = False
) -> Tensor:
    """Images (N,3,S,S) clamped to [-1,1] on the CPU for latent (N,Z) and sentences (N,E), in batches."""
    device = next(generator.parameters()).device
    if device.type == "cpu":
        keep_freed_memory()
    batches = list(zip(latent.split(batch_size), sentence.split(batch_size), strict=True))
    pairs = bar(batches, desc="generate", unit="batch", enabled=progress)
    return torch.cat([generator(z.to(device), s.to(device)).clamp(-1, 1).float().cpu() for z, s in pairs])


def _device(name: str) -> torch.device:
    """`name` ("auto", "cpu", "cuda", "cuda:1") as a device. Raises SettingsError where it is not here."""
    try:
        return best_device() if name == "auto" else torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        brief = str(error).splitlines()[0]
        raise SettingsError(f"device={name}: cannot be used here ({brief}); use auto or cpu") from error


def file_names(captions: int, n: int, names: str = "caption", batch_size: int = 64) -> list[str]:
    """Names of the single images, `n` for each of `captions`, in their order (without ".png").

    "caption": 00-000, 00-001, ..: caption and image. "published": by the number of the batch, so that each
    image of a batch overwrites the one before (difference 10). Else SettingsError.
    """
    if names == "caption":
        return [f"{c:02d}-{i:03d}" for c in range(captions) for i in range(n)]
    if names == "published":
        return [f"step-{i // batch_size:04d}" for i in range(captions * n)]
    raise SettingsError(f"names={names}: choose caption or published")


class Run:
    """A trained run, opened for generating. `step`: how many steps it was trained; `name`: the run's.

    `folder`: the run folder (with `config.yaml` and `checkpoint.pt`), one made by `ratlip export`, or
    `hf://owner/name`, such a folder on the Hugging Face hub. The small CLIP of a run folder is found beside it
    (`../../clip-<hash>`), or in `clip_folder`. Raises RunError or WeightsError where something is missing.
    """

    settings: Settings
    clip: FrozenClip

    def __init__(self, folder: str | Path, *, device: str = "auto", clip_folder: str | Path | None = None):
        self.folder = portable.local(folder)
        if (self.folder / portable.CONFIG).is_file():
            self.settings, self.clip, self.generator, config = portable.read(self.folder, _device(device))
            self.name, self.step = config["run"], config["step"]
            return
        for name in ("config.yaml", "checkpoint.pt"):
            if not (self.folder / name).is_file():
                mend = "give a folder such as outputs/demo/runs/<run> (`ratlip train` makes them), or an exported one"
                raise RunError(f"{self.folder}: has no {name}, so it is not a trained run; {mend}")
        self.settings = load_settings(self.folder / "config.yaml")
        self.name = self.folder.resolve().name
        beside = self.folder.resolve().parents[1] / f"clip-{self.settings.clip_hash}"
        chosen = Path(clip_folder or beside)
        if self.settings.clip.source == "train" and not (chosen / "manifest.json").is_file():
            mend = (
                f"give the folder {beside.name} of the outputs it was trained in (--clip-folder, in Python clip_folder)"
            )
            lost = f"the small CLIP of this run is not at {chosen}; a run folder that was moved needs it too"
            raise RunError(f"{self.folder}: {lost}: {mend}")
        self.clip = load_clip(self.settings.clip, chosen, _device(device))
        self.clip_folder = chosen
        self.generator, self.step = _restored(self.folder, self.settings, self.clip)

    def __str__(self) -> str:
        """Which run this is, in one line."""
        return f"{self.name} (profile {self.settings.profile}, {self.step} training steps)"

    def generate(self, captions: str | Sequence[str], n: int = 1, seed: int = 0, batch_size: int = 64) -> Tensor:
        """Images (R,n,3,S,S) in [-1,1]: `n` for each of the R captions, the same latents for every caption.

        Warns of words that the CLIP's vocabulary does not hold: they cannot have an effect.
        """
        captions = [captions] if isinstance(captions, str) else list(captions)
        if not captions or any(not caption.strip() for caption in captions):
            raise SettingsError("captions: give one at least, and no empty one")
        for caption in captions:
            if unknown := ", ".join(map(repr, self.clip.unknown_words(caption))):
                text = f"{self.clip.name} has never read {unknown}: these words of {caption!r} have no effect"
                warnings.warn(text, stacklevel=2)
        sentence = self.clip.embed_text(captions).cpu().repeat_interleave(n, dim=0)
        latent = sample_latents(seed, 0, n, self.settings.model.latent_size).repeat(len(captions), 1)
        return generate(self.generator, latent, sentence, batch_size).unflatten(0, (len(captions), n))

    def grid(self, captions: str | Sequence[str], n: int = 8, seed: int = 0, path: str | Path | None = None) -> Figure:
        """A figure with one row a caption; saved to `path` where given."""
        from ratlip.plots import pictures  # here, because matplotlib takes 0.3 s and only figures need it

        captions = [captions] if isinstance(captions, str) else list(captions)
        return pictures.caption_grid(self.generate(captions, n, seed), captions, path)
