"""The published checkpoints: read into our own modules, and written back (official.md, parity fixtures).

A published checkpoint is a file or dict {"model": {"netG", "netD", "netC"}, "optimizers", "epoch"}: `netG` is
the generator, `netD` the discriminator without its logit head, `netC` the logit head. RATLIP's and GALIP's
files have the same form and are told apart by their keys. Keys may carry the prefix `module.`.

Assumption (our description of the published code does not list these names): `netG` also holds the frozen CLIP image
tower under `mapping.CLIP_ViT.`, all or some of its tensors, named as in open_clip, with or without `visual.`.
"""

import os
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from torch.nn import functional as F

from ratlip.clip.frozen import FrozenClip
from ratlip.errors import WeightsError
from ratlip.files import atomic_path
from ratlip.networks import Discriminator, Generator

FEATURE_BLOCKS = (1, 4, 8)
GENERATORS: dict[str, dict[str, Any]] = {  # what sets the two apart; all other settings are the defaults
    "RATLIP": dict(conditioning="rat-official", rat_scope="mapper", hidden_size=64, attention="shuffle"),
    "GALIP": dict(conditioning="cat", attention="none"),
}
CLIP_SIZES = dict(image_size=224, grid=7, width=768, layers=12, embed_dim=512)  # ViT-B/32
CLIP_PREFIX = "mapping.CLIP_ViT."

# Our names -> published names, applied in this order.
GENERATOR_NAMES = (
    (r"^code\.", "fc_code."),
    (r"^to_rgb\.", "to_rgb.1."),
    (r"^mapper\.to_clip\.", "mapping.conv_fuse."),
    (r"^mapper\.prompts\.", "mapping.fc_prompt."),
    (r"^mapper\.from_clip\.", "mapping.conv."),
    (r"^mapper\.fusion_blocks\.", "mapping.FBlocks."),
    (r"^synthesis_blocks\.(\d+)\.conv", r"GBlocks.\1.c"),
    (r"^synthesis_blocks\.(\d+)\.shortcut\.", r"GBlocks.\1.c_sc."),
    (r"^synthesis_blocks\.", "GBlocks."),
    (r"\.attention\.norm\.", ".se.gn."),
    (r"\.attention\.channel_", ".se.c"),
    (r"\.attention\.spatial_", ".se.s"),
    (r"\.norm\.", ".bn."),
    (r"\.lstm\.", ".rnn."),
    (r"\.(gamma|beta)\.", r".fc_\1."),
)
CAT_NAMES = ((r"(fc_gamma|fc_beta)\.0\.", r"\1.linear1."), (r"(fc_gamma|fc_beta)\.2\.", r"\1.linear2."))
DISCRIMINATOR_NAMES = (
    (r"^blocks\.", "DBlocks."),
    (r"\.residual\.", ".conv_r."),
    (r"\.shortcut\.", ".conv_s."),
    (r"^logit\.", "joint_conv."),
)


@dataclass
class PublishedNetworks:
    """The published networks as our own modules, in eval mode.

    kind: "RATLIP" or "GALIP".
    clip: the frozen CLIP with the published pre-processing (pixels normalised twice: difference 4).
    generator: `generator(latent (B,100), sentence (B,512)) -> images (B,3,224,224)`, not clamped.
    judge: the discriminator as a module, None where the checkpoint has none; call it by `discriminator`.
    parts: which of netG, netD, netC there are.
    clip_names: which entries `mapping.CLIP_ViT.*` the checkpoint had; None stands for the whole tower.
    rest: what lay beside "model" (optimizers, epoch), untouched; `save_checkpoint` writes it back.
    """

    kind: str
    clip: FrozenClip
    generator: Generator
    judge: Discriminator | None = None
    parts: tuple[str, ...] = ("netG", "netD", "netC")
    clip_names: tuple[str, ...] | None = None
    rest: dict = field(default_factory=dict)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B,3,S,S) in [-1,1] -> patch features (B,3,768,7,7) after blocks 1, 4, 8, embedding (B,512).

        Other sizes than 224 are resized by nearest, without anti-aliasing, as published (difference 5).
        """
        size = (self.clip.image_size, self.clip.image_size)
        return self.clip.features(images if images.shape[2:] == size else F.interpolate(images, size), FEATURE_BLOCKS)

    @property
    def discriminator(self) -> Discriminator:
        """`discriminator(features (B,3,768,7,7), sentence (B,512)) -> logits (B,)`.

        Raises WeightsError where the checkpoint had no netD or no netC.
        """
        absent = sorted({"netD", "netC"}.difference(self.parts if self.judge else ()))
        if absent or self.judge is None:
            mend = "load one that holds both to judge images, this one only generates"
            raise WeightsError(f"the checkpoint has no {' and no '.join(absent)}: {mend}")
        return self.judge


def load_checkpoint(source: str | os.PathLike | dict, clip: nn.Module) -> PublishedNetworks:
    """Read a published RATLIP or GALIP checkpoint into our modules.

    source: path of the `.pth` file (read with weights_only=True), or the same content as a dict.
    clip: the open_clip model that the networks were trained with, ViT-B/32 (`ViT-B-32-quickgelu`); it is frozen in
        place. Entries `mapping.CLIP_ViT.*` of the checkpoint must agree with it; what is absent comes from it.

    Raises one WeightsError that lists every key that is missing, left over or of another shape, in all parts.
    """
    checkpoint, name = _read(source)
    model = {part: {k.removeprefix("module."): v for k, v in s.items()} for part, s in checkpoint["model"].items()}
    clip, judge = _published_clip(clip), None
    tower = {key: model["netG"].pop(key) for key in list(model["netG"]) if key.startswith(CLIP_PREFIX)}
    with torch.device("meta"):  # shapes only: the checkpoint brings the values
        generators = {kind: Generator(clip, **settings).eval() for kind, settings in GENERATORS.items()}
        if {"netD", "netC"} & set(model):
            judge = Discriminator(
                grid=clip.grid, clip_width=clip.width, sentence_size=clip.embed_dim, unused_shortcuts=True
            ).eval()

    def likeness(kind: str) -> int:  # so that the kind of a damaged checkpoint is known too
        keys = {key for _, key in published_names(generators[kind], kind).values()}
        return len(keys & model["netG"].keys()) - len(keys - model["netG"].keys())

    kind = max(generators, key=likeness)
    rest = {key: value for key, value in checkpoint.items() if key != "model"}
    networks = PublishedNetworks(kind, clip, generators[kind], judge, tuple(model), tuple(tower), rest)
    if problems := _problems(networks, model, tower):
        raise WeightsError(
            f"{name} is not a {kind} checkpoint for this CLIP; {len(problems)} entries do not fit (use an unmodified "
            "published checkpoint, and the CLIP it was trained with):\n  " + "\n  ".join(problems)
        )
    for network in filter(None, (generators[kind], judge)):  # in float32; values of absent parts stay undefined
        names = published_names(network, kind).items()
        state = {ours: model[part][key] for ours, (part, key) in names if part in model}
        network.to_empty(device=clip.mean.device).load_state_dict(state, strict=False)
    return networks


def save_checkpoint(networks: PublishedNetworks, path: str | os.PathLike) -> None:
    """Write the networks under the published keys, so that the published code can read them.

    What `load_checkpoint` read is written back exactly, without the prefix `module.`; the optimizers' state
    as it was read. The file is written whole or not at all.
    """
    parts = _published_tensors(networks).items()
    model = {part: {key: t.detach().cpu().clone() for key, t in tensors.items()} for part, tensors in parts}
    tower = networks.clip.model.get_submodule("visual").state_dict()
    names = [CLIP_PREFIX + key for key in tower] if networks.clip_names is None else networks.clip_names
    model["netG"] |= {name: tower[_tower_name(name)].cpu().clone() for name in names}
    with atomic_path(path) as draft:
        torch.save({"optimizers": {}, "epoch": 0, **networks.rest, "model": model}, draft)


def published_names(network: nn.Module, kind: str) -> dict[str, tuple[str, str]]:
    """Our name of each tensor of a generator or discriminator -> (part, published key); kind: "RATLIP" or "GALIP"."""

    def renamed(key: str, rules: tuple[tuple[str, str], ...]) -> str:
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        return key

    def named(key: str) -> tuple[str, str]:
        if isinstance(network, Discriminator):
            return "netC" if key.startswith("logit.") else "netD", renamed(key, DISCRIMINATOR_NAMES)
        name = renamed(key, GENERATOR_NAMES)
        # The two published affines name their layers differently; RATLIP uses GALIP's outside the mapper.
        return "netG", name if kind == "RATLIP" and name.startswith("mapping.") else renamed(name, CAT_NAMES)

    return {key: named(key) for key in network.state_dict()}


def _tower_name(key: str) -> str:
    return key.removeprefix(CLIP_PREFIX).removeprefix("visual.")


def _read(source) -> tuple[dict, str]:
    """The checkpoint and what to call it, or WeightsError if it is no checkpoint at all."""
    name = "the checkpoint" if isinstance(source, dict) else str(Path(source))
    if not isinstance(source, dict):
        try:
            source = torch.load(source, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise WeightsError(f"{name} does not exist: give the path of a published .pth file") from None
        except Exception as error:  # torch.load raises half a dozen kinds for damaged or unsafe files
            brief = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            message = f"{name} cannot be read as a checkpoint of tensors; download it again ({brief})"
            raise WeightsError(message) from error
    model = source.get("model") if isinstance(source, dict) else None
    if not isinstance(model, dict) or not all(isinstance(state, dict) for state in model.values()):
        needs = 'an entry "model" with netG (and netD, netC), each a dict of tensors'
        raise WeightsError(f"{name} is no published checkpoint: it needs {needs}")
    if "netG" not in model:
        raise WeightsError(f'{name} holds no generator: its "model" has {sorted(model)} and needs netG')
    return source, name


def _published_clip(clip: nn.Module) -> FrozenClip:
    """The CLIP with the published pre-processing, if it is the one the published networks were built on."""
    model = clip.model if isinstance(clip, FrozenClip) else clip
    tokenizer = open_clip.SimpleTokenizer(context_length=getattr(model, "context_length", 77))
    frozen = FrozenClip(model, tokenizer, name="ViT-B-32 (published)", normalisation="published")
    sizes = {field: getattr(frozen, field) for field in CLIP_SIZES}
    if sizes != CLIP_SIZES:
        mend = "pass open_clip.create_model('ViT-B-32-quickgelu', pretrained='openai')"
        raise WeightsError(f"the published networks need CLIP ViT-B/32 {CLIP_SIZES}, this one has {sizes}: {mend}")
    if not any(isinstance(module, QuickGELU) for module in model.get_submodule("visual").modules()):
        other = "this CLIP has another one and gives other images: use 'ViT-B-32-quickgelu'"
        text = f"the published networks see through OpenAI's CLIP, whose activation is QuickGELU; {other}"
        warnings.warn(text, stacklevel=3)
    return frozen


def _published_tensors(networks: PublishedNetworks) -> dict[str, dict[str, Tensor]]:
    """Our tensors by part and published key, for the parts that the networks have."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for network in filter(None, (networks.generator, networks.judge)):
        state = network.state_dict()
        for ours, (part, key) in published_names(network, networks.kind).items():
            if part in networks.parts:
                tensors.setdefault(part, {})[key] = state[ours]
    return tensors


def _problems(networks: PublishedNetworks, model: dict[str, dict], tower: dict[str, Any]) -> list[str]:
    """Everything in which a checkpoint's networks and CLIP tower differ from what they must be, a line each."""
    problems, expected = [], _published_tensors(networks)
    for part, tensors in expected.items():
        absent = {key: tuple(tensor.shape) for key, tensor in tensors.items() if key not in model[part]}
        problems += [f"missing: {part} {key} {shape}" for key, shape in absent.items()]
        problems += _misfits(part, model[part], tensors, "needs")
    visual = networks.clip.model.get_submodule("visual").state_dict()
    ours = {key: visual[_tower_name(key)] for key in tower if _tower_name(key) in visual}
    problems += _misfits("netG", tower, ours, "the CLIP that was passed has")
    for key, tensor in ours.items():
        if _shape(tower[key]) == _shape(tensor):  # half precision of the same weights agrees: the narrower counts
            narrow = min(tensor.dtype, tower[key].dtype, key=lambda dtype: dtype.itemsize)
            if not torch.equal(tower[key].cpu().to(narrow), tensor.cpu().to(narrow)):
                problems.append(f"other values: netG {key} differs from the CLIP that was passed")
    return problems + [f"left over: {part}, no part of a checkpoint" for part in model if part not in expected]


def _misfits(part: str, given: dict[str, Any], ours: dict[str, Tensor], whose: str) -> list[str]:
    """Every given entry that is left over or of another shape than ours, a line each."""
    problems = [f"left over: {part} {key}" for key in given if key not in ours]
    for key, tensor in ours.items():
        shape, needed = _shape(given.get(key, tensor)), _shape(tensor)
        if shape != needed:
            problems.append(f"other shape: {part} {key} is {shape}, {whose} {needed}")
    return problems


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
