"""A trained model that travels: one folder with all that drawing needs, and nothing that training needed.

    model.safetensors   the generator (its moving average where there is one), and the small CLIP it was trained with
    config.json         settings, words and shape of the small CLIP, digests of both networks, where they come from

`ratlip.report.card` adds README.md and samples.png. Where the CLIP is a pretrained one, it is not packed: the settings
name it.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from ratlip import __version__
from ratlip.cache import weights_digest
from ratlip.clip.frozen import FrozenClip
from ratlip.clip.loading import assemble, brief, load_clip
from ratlip.clip.vocabulary import Vocabulary
from ratlip.errors import RunError
from ratlip.fast.tower import accelerate_tower
from ratlip.files import read_json, write_json
from ratlip.networks import Generator
from ratlip.settings import Settings
from ratlip.training.session import build_networks

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
HUB = re.compile(r"hf:/{1,2}([^/@]+/[^/@]+)(?:@(.+))?")  # pathlib makes one slash of two


def local(source: str | Path) -> Path:
    """The folder on disk of a run or an exported model: `source`, or what `hf://owner/name[@revision]` names, fetched.

    RunError where that cannot be had.
    """
    if not str(source).startswith("hf:"):
        return Path(source).expanduser()
    found = HUB.fullmatch(str(source))
    if not found:
        raise RunError(f"{source}: should be hf://owner/name, or hf://owner/name@revision")
    from huggingface_hub import snapshot_download  # here: 0.5 s

    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)  # without network, the client logs every attempt
    try:
        return Path(snapshot_download(found[1], revision=found[2], allow_patterns=[WEIGHTS, CONFIG]))
    except Exception as error:  # the client raises a dozen classes
        mend = "is the name right, and is there a network? A folder made by `ratlip export` can also be copied here"
        raise RunError(f"{source}: could not be fetched ({type(error).__name__}); {mend}") from error
    finally:
        logging.disable(disabled)


def save(folder: Path, settings: Settings, clip: FrozenClip, generator: Generator, about: dict[str, Any]) -> None:
    """Write both files into `folder`. `about`: more of config.json; its "arch" is the small CLIP's shape."""
    state = {f"generator.{name}": tensor for name, tensor in generator.state_dict().items()}
    config = {"format": FORMAT, "ratlip": __version__, **about, "settings": _without_places(settings)}
    config["generator"] = weights_digest(generator)
    if settings.clip.source == "train":
        words: Vocabulary = clip.tokenizer  # type: ignore[assignment]
        state |= {f"clip.{name}": tensor for name, tensor in clip.model.state_dict().items()}
        config |= {"words": list(words.words), "context_length": words.context_length}
    config["clip"] = clip.fingerprint
    folder.mkdir(parents=True, exist_ok=True)
    # as bytes: safetensors' own files are for their owner's eyes alone
    packed = serialise({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    (folder / WEIGHTS).write_bytes(packed)
    write_json(folder / CONFIG, config)


def read(folder: Path, device: torch.device) -> tuple[Settings, FrozenClip, Generator, dict[str, Any]]:
    """What `save` wrote: settings, CLIP and generator on `device`, config.json. RunError where it is not whole."""
    mend = "export it again, or copy it again"
    try:
        config, state = read_json(folder / CONFIG), load_file(folder / WEIGHTS)
        if config["format"] != FORMAT:
            raise RunError(f"{folder / CONFIG}: has format {config['format']}, this ratlip reads {FORMAT}; update it")
        settings = Settings.model_validate(config["settings"])
        with torch.random.fork_rng(devices=[]):  # networks draw weights before they read them; not the caller's
            clip = _clip(settings, config, _part(state, "clip.")).to(device)
            generator, _ = build_networks(settings, clip)
        generator.load_state_dict(_part(state, "generator."))
    except ValidationError as error:
        raise RunError(f"{folder / CONFIG}: its settings are not those of this ratlip ({brief(error)})") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise RunError(f"{folder}: no whole exported model ({type(error).__name__}: {brief(error)}); {mend}") from error
    for name, expected, found in (
        ("generator", config["generator"], weights_digest(generator)),
        ("CLIP", config["clip"], clip.fingerprint),
    ):
        if expected != found:
            raise RunError(f"{folder / WEIGHTS}: its {name} is not the one of {CONFIG} ({found}); {mend}")
    return settings, clip, generator.to(device).eval(), config


def _clip(settings: Settings, config: dict[str, Any], state: dict[str, Tensor]) -> FrozenClip:
    if settings.clip.source != "train":
        return load_clip(settings.clip)
    words = Vocabulary(config["words"], config["context_length"])
    clip = assemble(config["arch"], state, words, settings.clip.normalisation)
    accelerate_tower(clip.model.visual)
    return clip


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _without_places(settings: Settings) -> dict[str, Any]:
    """The settings as JSON values; of a path, the name alone: the rest is no one else's."""

    plain = settings.model_dump(mode="json")
    for section, field in (("clip", "path"), ("independent", "path"), ("evaluation", "extractor_weights")):
        if plain[section] and plain[section][field]:
            plain[section][field] = Path(plain[section][field]).name
    return plain
