"""Frozen CLIP towers: the discriminator's eyes, the generator's bridge, the judge of the text match.

Three sources of weights, one class: downloaded through open_clip ("pretrained"), a local checkpoint of an
open_clip architecture ("file"), or the small CLIP that `ratlip.clip.small` trains on the captions
("train").
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import logging
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Callable, Sequence

import open_clip
import torch
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transformer import VisionTransformer
from safetensors.torch import load_file
from torch import Tensor, nn

from ratlip.clip.vocabulary import Vocabulary
from ratlip.errors import WeightsError
from ratlip.fast.maps import checkpointed
from ratlip.fast.tower import lean_tower
from ratlip.files import read_json

NORMALISATIONS = ("standard", "published")


def normalise(images: Tensor, mean: Tensor, std: Tensor, mode: str = "standard") -> Tensor:
    """Images (B,3,H,W) in [-1,1] -> what CLIP's first layer takes; `mean`, `std` (1,3,1,1) as CLIP has them.

    "standard": to [0,1], then mean and standard deviation. "published": the published code maps to [0,1]
    twice, so pixels -1/0/1 become 0.5/0.75/1 before mean and std: half the contrast (official.md, difference
    4).
    """
    scale, shift = (0.5, 0.5) if mode == "standard" else (0.25, 0.75)
    return (images * scale + shift - mean) / std


def with_normalisation(clip: FrozenClip, normalisation: str) -> FrozenClip:
    """The same CLIP (its weights are shared), told to normalise pixels in this way."""
    other = copy.copy(clip)
    other.normalisation = normalisation
    return other


class FrozenClip(nn.Module):
    """An open_clip CLIP with a ViT image tower that never learns and never leaves eval mode.

    `model`: an open_clip `CLIP` or `CustomTextCLIP`. `tokenizer`: list of N strings -> LongTensor (N, L).
    `name`: what figures and tables call it. `normalisation`: see `preprocess`.

    Gradients pass through the towers to their inputs; no parameter receives one.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        name: str = "CLIP",
        normalisation: str = "standard",
    ):
        super().__init__()
        visual = getattr(model, "visual", None)
        if not isinstance(visual, VisionTransformer) or visual.grid_size[0] != visual.grid_size[1]:
            raise WeightsError(
                f"{name}: RATLIP reads patch tokens on a square grid, as open_clip's own ViT "
                f"has them, not {type(visual).__name__}; set clip.model: ViT-B-32-quickgelu"
            )
        if normalisation not in NORMALISATIONS:
            raise ValueError(f"normalisation must be one of {NORMALISATIONS}, not {normalisation!r}")
        self.model = model.requires_grad_(False)
        lean_tower(visual)
        self.tokenizer = tokenizer
        self.name = name
        self.checkpointing = False  # of the image tower's blocks: see `ratlip.fast.options`
        self.normalisation = normalisation
        self.image_size: int = visual.image_size[0]
        self.grid: int = visual.grid_size[0]
        self.width: int = visual.transformer.width
        self.layers: int = visual.transformer.layers
        self.embed_dim: int = visual.output_dim
        mean = getattr(visual, "image_mean", None) or OPENAI_DATASET_MEAN
        std = getattr(visual, "image_std", None) or OPENAI_DATASET_STD
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenClip:
        """Stay in eval mode: a frozen judge must not change with the mode of the network around it."""
        return super().train(False)

    @cached_property
    def fingerprint(self) -> str:
        """First 12 hex digits of the SHA-256 of all weights (name, shape, values), whatever device they are
        on.
        """
        digest = hashlib.sha256()
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:12]

    def preprocess(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) in [-1,1] -> CLIP's input, S = `image_size` (else ValueError); see `normalise`."""
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"{self.name} takes images (B,3,{self.image_size},{self.image_size}), "
                f"not {tuple(images.shape)}: resize them first"
            )
        return normalise(images, self.mean, self.std, self.normalisation)

    def features(self, images: Tensor, blocks: Sequence[int], embedding: bool = True) -> tuple[Tensor, Tensor | None]:
        """Patch tokens after some blocks and, unless not wanted, the image embedding, in one pass.

        `images` (B,3,S,S) in [-1,1]; `blocks`: K block numbers from 0, in any order. Returns (B,K,C,g,g) in
        the order of `blocks` (no `ln_post`), and (B,E), not normalised. Without the embedding, the blocks
        after the last one asked for are not computed.
        """
        if not len(blocks) or min(blocks) < 0 or max(blocks) >= self.layers:
            raise ValueError(f"blocks must be within 0..{self.layers - 1} and not empty, not {list(blocks)}")
        wanted = sorted(set(blocks))
        self.model.visual.transformer.grad_checkpointing = self.checkpointing and torch.is_grad_enabled()
        output = self.model.visual.forward_intermediates(
            self.preprocess(images), indices=wanted, stop_early=not embedding, intermediates_only=not embedding
        )
        taken = dict(zip(wanted, output["image_intermediates"]))
        return torch.stack([taken[block] for block in blocks], dim=1), output.get("image_features")

    def embed_images(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) in [-1,1] -> image embeddings (B,E), not normalised."""
        return self.model.encode_image(self.preprocess(images))

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """N strings -> text embeddings (N,E) float32, not normalised, on CLIP's device, without gradient."""
        device, texts = self.mean.device, list(texts)
        parts = [torch.empty(0, self.embed_dim, device=device)]
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenizer(texts[start : start + batch_size]).to(device)
            parts.append(self.model.encode_text(tokens).float())
        return torch.cat(parts)

    def unknown_words(self, text: str) -> list[str]:
        """Words of `text` that this CLIP cannot read (open_clip's own tokenizers can spell out any)."""
        return self.tokenizer.unknown(text) if isinstance(self.tokenizer, Vocabulary) else []

    def bridge(self, patches: Tensor, prompts: Tensor, prompt_blocks: Sequence[int]) -> Tensor:
        """Send a map of patch tokens through the whole image tower, with learned prompts on the way.

        `patches` (B,C,g,g), C = `width`; `prompts` (B,P,C): prompt i joins as the last token of block
        `prompt_blocks[i]` and is dropped after it. Class embedding first, positional embedding, `ln_pre`, all
        blocks; returns the patch tokens of the last block, without `ln_post`, (B,C,g,g). Source: official.md,
        generator ("frozen CLIP").
        """
        if patches.shape[1:] != (self.width, self.grid, self.grid):
            raise ValueError(
                f"{self.name} bridges patches (B,{self.width},{self.grid},{self.grid}), not {tuple(patches.shape)}"
            )
        if prompts.shape != (len(patches), len(prompt_blocks), self.width):
            raise ValueError(
                f"prompts must be ({len(patches)},{len(prompt_blocks)},{self.width}), not {tuple(prompts.shape)}"
            )
        visual = self.model.visual
        first = visual.class_embedding.expand(len(patches), 1, -1)
        tokens = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1)
        tokens = visual.ln_pre(tokens + visual.positional_embedding)
        prompt_of = {block: prompts[:, i : i + 1] for i, block in enumerate(prompt_blocks)}
        if len(prompt_of) != len(prompt_blocks) or not set(prompt_of) <= set(range(self.layers)):
            raise ValueError(
                f"prompt_blocks must be different numbers within 0..{self.layers - 1}, not {list(prompt_blocks)}"
            )
        for number, block in enumerate(visual.transformer.resblocks):
            if number in prompt_of:
                tokens = torch.cat([tokens, prompt_of[number]], dim=1)
            again = self.checkpointing and torch.is_grad_enabled()
            tokens = checkpointed(block, tokens) if again else block(tokens)
            tokens = tokens[:, :-1] if number in prompt_of else tokens
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))


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
    return FrozenClip(model, tokenizer, f"{settings.model}/{name}", settings.normalisation)


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
    clip.name = f"small CLIP {clip.fingerprint[:6]}"
    return clip
