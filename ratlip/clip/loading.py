"""Where the frozen CLIP comes from: a download, a local file, or a small CLIP that was trained on the captions."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ratlip.cache import check_identity
from ratlip.clip.frozen import FrozenClip
from ratlip.clip.towers import ImageTower, SmallClip
from ratlip.clip.vocabulary import Vocabulary
from ratlip.errors import WeightsError
from ratlip.fast.tower import accelerate_tower
from ratlip.files import read_json
from ratlip.settings import ClipSettings


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
) -> SmallClip:
    """A small CLIP, randomly initialised from torch's global generator.

    Two choices suit a training of minutes: fixed sines and cosines as positions (learned ones start
    small beside the patches), and the mean of the patch tokens as the image (the GAN reads the patches, so they must
    know what they show).
    """
    visual = ImageTower(image_size, patch_size, width, layers, heads, embed_dim)
    return SmallClip(visual, context_length, vocab_size, text_width, text_layers, text_heads)


def load_clip(
    settings: ClipSettings, folder: Path | str | None = None, device: str | torch.device = "cpu"
) -> FrozenClip:
    """The frozen CLIP that `settings` ask for, on `device`, its image tower in the fast form.

    `folder` is where the small CLIP was trained (source "train" only). No pickled code is run for any source. Raises
    WeightsError with what to do where weights are missing, damaged, or of another network.
    """
    with torch.random.fork_rng(devices=[]):  # a network draws weights before it reads them; not the caller's
        clip = _small_clip(settings, folder) if settings.source == "train" else _open_clip(settings)
    accelerate_tower(clip.model.visual)
    return clip.to(device)


def _small_clip(settings: ClipSettings, folder: Path | str | None) -> FrozenClip:
    """The small CLIP that `ratlip.clip.small.train_small_clip` left in `folder`."""
    if folder is None:
        raise WeightsError("clip.source=train: name the folder in which the small CLIP was trained")
    folder, mend = Path(folder), "remove the folder and train it again"
    if not (folder / "manifest.json").is_file():
        raise WeightsError(f"{folder}: no small CLIP was trained here to the end; `ratlip clip` trains it or goes on")
    try:
        manifest = read_json(folder / "manifest.json")
        trained_by, expected = manifest["settings"], manifest["fingerprint"]
        arch, state = read_json(folder / "arch.json"), load_file(folder / "clip.safetensors")
        clip = assemble(arch, state, Vocabulary.load(folder / "vocabulary.json"), settings.normalisation)
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(f"{folder}: the small CLIP is damaged ({brief(error)}); {mend}") from error
    if clip.fingerprint != expected:
        raise WeightsError(f"{folder}: clip.safetensors is not the file that was trained ({clip.fingerprint}); {mend}")
    asked = {name: getattr(settings, name) for name in trained_by}
    check_identity(folder, trained_by, asked, what="a small CLIP", error=WeightsError)
    return clip


def assemble(arch: dict, state: dict[str, Tensor], vocabulary: Vocabulary, normalisation: str) -> FrozenClip:
    """A small CLIP of its parts: the arguments of `build_small_clip`, its weights, its words."""
    model = build_small_clip(**arch)
    model.load_state_dict(state, strict=True)
    clip = FrozenClip(model, vocabulary, normalisation=normalisation)
    clip.name = f"small CLIP {clip.fingerprint[:6]}"
    return clip


def _open_clip(settings: ClipSettings) -> FrozenClip:
    """An architecture that open_clip knows by name, with weights from the network or a file."""
    import open_clip

    name, path = settings.model, Path(settings.path or "")
    if name not in open_clip.list_models():
        raise WeightsError(f"clip.model={name}: open_clip has no such architecture; see open_clip.list_models()")
    local, tag = settings.source == "file", settings.pretrained
    model = _model_from_file(name, path) if local else _downloaded_model(name, tag)
    try:
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:
        raise WeightsError(
            f"clip.model={name}: its tokenizer cannot be had ({brief(error)}); those with OpenAI's vocabulary "
            "(ViT-B-32-quickgelu) need no download"
        ) from error
    return FrozenClip(model, tokenizer, f"{name}/{path.name if local else tag}", settings.normalisation)


def _downloaded_model(model: str, tag: str) -> nn.Module:
    """Weights by their open_clip tag, from the local cache or the network."""
    import open_clip
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME

    known = open_clip.pretrained.get_pretrained_cfg(model, tag)
    if not known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise WeightsError(f"clip.pretrained={tag}: open_clip has no such weights for {model}; it has {tags}")
    if known.get("quick_gelu", False) != open_clip.get_model_config(model).get("quick_gelu", False):
        twin = f"{model}-quickgelu".removesuffix("-quickgelu-quickgelu")
        raise WeightsError(f"clip.model={model}: the weights {tag} belong to the other GELU; set clip.model: {twin}")
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)  # without network, the client logs some forty lines before it gives up
    try:
        return open_clip.create_model(model, pretrained=tag)
    except Exception as error:  # urllib, the Hugging Face client and open_clip raise a dozen classes of them
        repository, _, file = known.get("hf_hub", "").rpartition("/")
        source = f"{file or HF_SAFE_WEIGHTS_NAME} of {repository} on huggingface.co" if repository else known["url"]
        raise WeightsError(
            f"CLIP weights {model}/{tag} are not here and could not be downloaded: fetch {source} where there is "
            "network, copy it here and set clip.source: file and clip.path: FILE; or use the profile demo, which needs "
            f"no download ({type(error).__name__}: {brief(error)[:120]})"
        ) from error
    finally:
        logging.disable(disabled)


def _model_from_file(model: str, path: Path) -> nn.Module:
    """A local checkpoint: .safetensors, a state dict saved by torch, or an original TorchScript archive."""
    import open_clip

    if not path.is_file():
        raise WeightsError(f"clip.path={path}: no such file; give the checkpoint of {model}, or use the profile demo")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):  # only TorchScript has it
                    return _openai_model(model, path)
        return open_clip.create_model(model, pretrained=str(path.resolve()), weights_only=True)
    except Exception as error:  # unpickling, safetensors, zip and shape errors share no base class
        raise WeightsError(
            f"clip.path={path} is no intact checkpoint of clip.model={model} ({brief(error)}); check clip.model or "
            "copy the file again (pickled code is never run)"
        ) from error


def _openai_model(model: str, path: Path) -> nn.Module:
    """OpenAI's archive; open_clip infers the architecture from the weights, so that it must be compared."""
    import open_clip

    if not open_clip.get_model_config(model).get("quick_gelu"):
        raise ValueError("OpenAI's archives need an architecture with -quickgelu")
    loaded = open_clip.load_openai_model(str(path), precision="fp32", device="cpu")
    expected = open_clip.create_model(model, load_weights=False, device="meta")
    shapes, wanted = ({key: value.shape for key, value in m.state_dict().items()} for m in (loaded, expected))
    if shapes != wanted:
        raise ValueError(f"it holds another architecture, {len(shapes)} tensors, not these {len(wanted)}")
    return loaded


def brief(error: Exception) -> str:
    """The first lines of an error: state-dict errors list every key."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__
