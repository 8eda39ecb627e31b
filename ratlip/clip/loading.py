"""Where the frozen CLIP comes from: a download, a local file, or a small CLIP that was trained on the captions."""

from __future__ import annotations

import difflib
import logging
import zipfile
from pathlib import Path

import open_clip
import torch
from open_clip.constants import HF_SAFE_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn

from ratlip.clip.frozen import FrozenClip
from ratlip.clip.vocabulary import Vocabulary
from ratlip.errors import WeightsError
from ratlip.fast.tower import accelerate_tower
from ratlip.files import read_json


def build_small_clip(
    image_size: int,
    patch_size: int,
    width: int,
    layers: int,
    heads: int,
    text_width: int,
    text_layers: int,
    text_heads: int,
    embed_dim: int,
    context_length: int,
    vocab_size: int,
) -> open_clip.CLIP:
    """A small CLIP of open_clip's own classes, randomly initialised from torch's global generator.

    Two of open_clip's options are chosen for a training of minutes. Fixed sines and cosines as positions: the
    learned ones start so small beside the patches that it takes long to find out where things are. The mean
    of the patch tokens as the image: the patches, which the GAN reads, then have to know what they show; the
    class token would have to learn first where to look.
    """
    for name, size, parts in (
        ("image_size", image_size, patch_size),
        ("width", width, 4 * heads),
        ("text_width", text_width, text_heads),
    ):
        if size % parts:
            raise ValueError(f"{name}={size} must be a multiple of {parts}")
    vision = {
        "image_size": image_size,
        "patch_size": patch_size,
        "width": width,
        "layers": layers,
        "head_width": width // heads,
        "pos_embed_type": "sin_cos_2d",
        "pool_type": "avg",
    }
    text = {
        "context_length": context_length,
        "vocab_size": vocab_size,
        "width": text_width,
        "layers": text_layers,
        "heads": text_heads,
    }
    return open_clip.CLIP(embed_dim, vision, text)


def load_clip(settings, folder: Path | str | None = None, device: str | torch.device = "cpu") -> FrozenClip:
    """The frozen CLIP that `settings` (`ratlip.settings.ClipSettings`) ask for, on `device`.

    `folder` is where the small CLIP was trained (source "train" only). No pickled code is run for any source.
    Raises WeightsError with what to do where weights are missing, damaged, or of another network.
    """
    with torch.random.fork_rng(devices=[]):  # a network draws weights before it reads them; not the caller's
        return _load(settings, folder).to(device)


def _load(settings, folder: Path | str | None) -> FrozenClip:
    if settings.source == "train":
        if folder is None:
            raise WeightsError("clip.source=train: name the folder in which the small CLIP was trained")
        return load_small_clip(folder, settings)
    if settings.model not in open_clip.list_models():
        near = difflib.get_close_matches(settings.model, open_clip.list_models(), n=3)
        raise WeightsError(
            f"clip.model={settings.model}: open_clip {open_clip.__version__} knows no such "
            f"architecture; near it: {', '.join(near) or 'ViT-B-32-quickgelu'}"
        )
    if settings.source == "file":
        model, name = _model_from_file(settings.model, Path(settings.path)), Path(settings.path).name
    else:
        model, name = _downloaded_model(settings.model, settings.pretrained), settings.pretrained
    try:
        tokenizer = open_clip.get_tokenizer(settings.model)
    except Exception as error:
        raise WeightsError(
            f"clip.model={settings.model}: its tokenizer cannot be had ({_brief(error)}); "
            f"those with OpenAI's vocabulary (ViT-B-32-quickgelu) need no download"
        ) from error
    clip = FrozenClip(model, tokenizer, f"{settings.model}/{name}", settings.normalisation)
    accelerate_tower(model.visual)
    return clip


def _downloaded_model(model: str, tag: str) -> nn.Module:
    """Weights by their open_clip tag, from the local cache or the network."""
    known = open_clip.pretrained.get_pretrained_cfg(model, tag)
    if not known:
        raise WeightsError(
            f"clip.pretrained={tag}: open_clip has no such weights for {model}; it has "
            f"{', '.join(open_clip.list_pretrained_tags_by_model(model)) or 'none'}"
        )
    if known.get("quick_gelu", False) != open_clip.get_model_config(model).get("quick_gelu", False):
        twin = model.removesuffix("-quickgelu") if model.endswith("-quickgelu") else f"{model}-quickgelu"
        raise WeightsError(
            f"clip.model={model}: the weights {tag} were trained with the other kind of GELU "
            f"and would give wrong features; set clip.model: {twin}"
        )
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)  # without network, the client logs some forty lines before it gives up
    try:
        return open_clip.create_model(model, pretrained=tag)
    except Exception as error:  # urllib, the Hugging Face client and open_clip raise a dozen classes of them
        repository, _, file = known.get("hf_hub", "").rpartition("/")
        hub = f"{file or HF_SAFE_WEIGHTS_NAME} of {repository} on huggingface.co"
        raise WeightsError(
            f"CLIP weights {model}/{tag} are not here and could not be downloaded: fetch "
            f"{hub if repository else known['url']} where there is network, copy it here and set "
            f"clip.source: file and clip.path: FILE; or use the profile demo, which needs no download "
            f"({type(error).__name__}: {_brief(error)[:120]})"
        ) from error
    finally:
        logging.disable(disabled)


def _model_from_file(model: str, path: Path) -> nn.Module:
    """A local checkpoint: .safetensors, a state dict saved by torch, or an original TorchScript archive."""
    if not path.is_file():
        raise WeightsError(
            f"clip.path={path}: there is no such file; give the checkpoint of {model}, "
            f"or use the profile demo, which needs none"
        )
    try:
        if _is_torchscript(path):
            return _openai_model(model, path)
        return open_clip.create_model(model, pretrained=str(path.resolve()), weights_only=True)
    except Exception as error:  # unpickling, safetensors, zip and shape errors share no base class
        raise WeightsError(
            f"clip.path={path} is no intact checkpoint of clip.model={model} "
            f"({_brief(error)}); check clip.model or copy the file again (pickled code is "
            f"never run)"
        ) from error


def _openai_model(model: str, path: Path) -> nn.Module:
    """OpenAI's archive; open_clip tells the architecture from the weights, so that it must be compared."""
    if not open_clip.get_model_config(model).get("quick_gelu"):
        raise ValueError("OpenAI's archives need an architecture with -quickgelu")
    loaded = open_clip.load_openai_model(str(path), precision="fp32", device="cpu")
    expected = open_clip.create_model(model, load_weights=False, device="meta")
    shapes, wanted = ({key: value.shape for key, value in m.state_dict().items()} for m in (loaded, expected))
    if shapes != wanted:
        raise ValueError(f"it holds another architecture, {len(shapes)} tensors, not these {len(wanted)}")
    return loaded


def _is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript archive, by the entry that only those have (as torch tells it)."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _brief(error: Exception) -> str:
    """The first line of an error: state-dict errors list every key."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__


def load_small_clip(folder: Path | str, settings=None) -> FrozenClip:
    """The small CLIP that `ratlip.clip.small.train_small_clip` left in `folder`, on the CPU.

    With `settings` (`ClipSettings`), they must be those it was trained with. Raises WeightsError where the
    training is missing or incomplete, the files are damaged, or the settings differ.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise WeightsError(
            f"{folder}: no small CLIP was trained here to the end (manifest.json is missing); "
            f"`ratlip clip` trains it, and goes on where it was interrupted"
        )
    try:
        manifest, arch = read_json(folder / "manifest.json"), read_json(folder / "arch.json")
        trained, expected = manifest["settings"], manifest["fingerprint"]
        model = build_small_clip(**arch)
        model.load_state_dict(load_file(folder / "clip.safetensors"), strict=True)
    except Exception as error:
        raise WeightsError(
            f"{folder}: the small CLIP is damaged ({_brief(error)}); remove the folder and train it again"
        ) from error
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    clip = FrozenClip(model, vocabulary, normalisation=getattr(settings, "normalisation", "standard"))
    if clip.fingerprint != expected:
        raise WeightsError(
            f"{folder}: clip.safetensors is not the file that was trained (fingerprint "
            f"{clip.fingerprint}, manifest {expected}); remove the folder and train it again"
        )
    if settings is not None:
        different = [
            f"{key}={value} (asked: {getattr(settings, key)})"
            for key, value in trained.items()
            if getattr(settings, key) != value
        ]
        if different:
            raise WeightsError(
                f"{folder}: the small CLIP was trained with {', '.join(different)}; choose "
                f"another folder, or the settings it was trained with"
            )
    accelerate_tower(model.visual)
    clip.name = f"small CLIP {clip.fingerprint[:6]}"
    return clip
