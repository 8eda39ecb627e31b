"""Settings: what a run is made of, checked before anything is computed, and hashed into the run's name.

A profile (`profiles/*.yaml`) names a dataset, sizes and a budget. A profile may extend another one; overrides
(`{"model.conditioning": "rat", "seed": 1}`) are laid over it. Published behaviour that ratlip corrects by
default is one named setting each (see `docs` in the field descriptions and `profiles/*-published.yaml`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ratlip.errors import SettingsError

Conditioning = Literal["cat", "rat", "rat-official"]
PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Immutable, and a misspelt key is an error rather than a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=True, allow_inf_nan=False)


class DataSettings(Section):
    """Which pictures, and how they are cut. Sizes in pixels."""

    dataset: Literal["synthetic", "birds", "flowers", "faces"]
    resize: Annotated[int, Field(ge=16, le=1024, description="shorter side of the stored images")]
    crop: Annotated[int, Field(ge=16, le=1024, description="side of the square cut at random at each visit")]
    flip: bool = Field(True, description="mirror half of the images (not where captions say left, right)")
    train_images: PositiveInt = Field(4096, description="synthetic only: size of the training split")
    test_images: PositiveInt = Field(512, description="synthetic only: size of the test split")
    human_captions_only: bool = Field(False, description="flowers only: no template captions")
    tiny: bool = Field(True, description="faces only: our CelebA-tiny instead of all images")
    seed: Count = Field(0, description="of the generated set (synthetic)")

    @model_validator(mode="after")
    def _fits(self):
        if self.crop > self.resize:
            raise ValueError(f"crop={self.crop} is larger than resize={self.resize}; choose crop <= resize")
        if self.dataset == "synthetic" and self.flip:
            raise ValueError("flip=true would turn 'on the left' into a lie; synthetic needs flip: false")
        return self

    @property
    def stored(self) -> dict[str, Any]:
        """What decides what `prepare` writes: not the crop, the flip, or another dataset's options."""
        used = {
            "synthetic": ("train_images", "test_images", "seed"),
            "flowers": ("human_captions_only",),
            "faces": ("tiny",),
            "birds": (),
        }[self.dataset]
        return {name: getattr(self, name) for name in ("dataset", "resize", *used)}


class ClipSettings(Section):
    """Where the frozen CLIP comes from: `train`ed on the captions, downloaded (`pretrained`), or a `file`."""

    source: Literal["train", "pretrained", "file"]
    model: str = Field("ViT-B-32-quickgelu", description="open_clip architecture (pretrained, file)")
    pretrained: str = Field("openai", description="open_clip weight tag (pretrained)")
    path: Path | None = Field(None, description="local checkpoint (file)")
    normalisation: Literal["standard", "published"] = Field(
        "standard", description="published: pixels go to [0,1] twice before mean and std (difference 4)"
    )
    patch_size: PositiveInt = 4
    width: PositiveInt = 64
    layers: Annotated[int, Field(ge=2, le=48)] = 4
    heads: PositiveInt = 4
    text_width: PositiveInt = 64
    text_layers: PositiveInt = 2
    text_heads: PositiveInt = 2
    embed_dim: PositiveInt = 64
    context_length: Annotated[int, Field(ge=8, le=256)] = 24
    steps: PositiveInt = 800
    batch_size: Annotated[int, Field(ge=2)] = 64
    lr: Rate = 2e-3
    weight_decay: Weight = 0.05
    warmup: Count = 50
    hard_negatives: bool = True
    seed: Count = 0

    @model_validator(mode="after")
    def _fits(self):
        if self.source == "file" and self.path is None:
            raise ValueError("source=file needs path: the local checkpoint to read")
        if self.width % (4 * self.heads):
            raise ValueError(f"width={self.width} must be a multiple of {4 * self.heads} = 4 x heads")
        if self.text_width % self.text_heads:
            raise ValueError(f"text_width={self.text_width} must be a multiple of text_heads={self.text_heads}")
        return self


class ModelSettings(Section):
    """The two networks (paper, method; official.md, generator and discriminator)."""

    conditioning: Conditioning = "rat"
    rat_scope: Literal["mapper", "generator"] = Field(
        "generator", description="recurrent: all of the generator (paper), or the mapper's (published)"
    )
    hidden_size: Annotated[int, Field(ge=0, le=1024)] = Field(64, description="h of the LSTM; 0 means CAT")
    attention: Literal["shuffle", "none", "norm"] = Field(
        "shuffle", description="none: plain convolutions (GALIP); norm: shuffle's batch norm, no attention"
    )
    attention_groups: PositiveInt = 8
    image_size: Annotated[int, Field(ge=16, le=1024)] = 224
    latent_size: PositiveInt = 100
    base_channels: PositiveInt = 64
    code_channels: PositiveInt = 64
    mapper_blocks: PositiveInt = 4
    prompt_blocks: tuple[Count, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    bridge_scale: float = 0.1
    feature_blocks: tuple[Count, ...] = (1, 4, 8)
    d_channels: PositiveInt = 512
    logit_channels: PositiveInt = 128
    gate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="what the discriminator's residual gates start at; 0 as published"
    )
    unused_shortcuts: bool = Field(False, description="published: build D's dead 1x1 convolutions")

    @model_validator(mode="after")
    def _fits(self):
        for name in ("prompt_blocks", "feature_blocks"):
            blocks = getattr(self, name)
            if len(set(blocks)) != len(blocks):
                raise ValueError(f"{name}={list(blocks)} names a block twice")
        if not self.feature_blocks:
            raise ValueError("feature_blocks is empty; the discriminator needs one CLIP block at least")
        if self.conditioning == "rat-official" and self.rat_scope == "generator":
            raise ValueError("conditioning=rat-official exists in the mapper only; set rat_scope: mapper")
        if self.attention == "shuffle":
            step = 2 * self.attention_groups
            for name in ("base_channels", "code_channels"):
                if getattr(self, name) % step:
                    raise ValueError(
                        f"{name}={getattr(self, name)} must be a multiple of {step} = 2 x attention_groups"
                    )
        if self.code_channels % 2:
            raise ValueError(f"code_channels={self.code_channels} must be even")
        return self

    @property
    def variant(self) -> str:
        """Short name of the ablation variant, e.g. `rat-h64-shuffle`, `rat-mapper-h16-shuffle`, `cat-none`."""
        if self.conditioning == "cat" or self.hidden_size == 0:
            return f"cat-{self.attention}"
        scope = "-mapper" if self.conditioning == "rat" and self.rat_scope == "mapper" else ""
        return f"{self.conditioning}{scope}-h{self.hidden_size}-{self.attention}"


class TrainingSettings(Section):
    """Optimisation. The budget is `steps` or `epochs`, not both."""

    steps: PositiveInt | None = None
    epochs: PositiveInt | None = None
    batch_size: PositiveInt = 16
    lr_g: Rate = 1e-4
    lr_d: Rate = 4e-4
    betas: tuple[Decay, Decay] = (0.0, 0.9)
    ema: Decay = Field(0.0, description="decay of the averaged generator; 0 = none")
    similarity_weight: Weight = 4.0
    penalty_weight: Weight = 2.0
    penalty_power: Weight = 6.0
    mismatch: Literal["roll", "similar", "published"] = Field(
        "roll",
        description="roll: the neighbour's sentence in the batch; similar: another caption close to "
        "the true one; published: roll even in a batch of one, where it is the true "
        "sentence (difference 7)",
    )
    real_resize: Literal["antialias", "nearest"] = Field(
        "antialias", description="how crops become image_size; nearest as published (difference 5)"
    )
    resume: Literal["exact", "published"] = Field(
        "exact",
        description="exact: as if never stopped; published: a whole epoch begins with the random "
        "numbers of a fresh start, and the loss scale is not restored (difference 12)",
    )
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    checkpointing: bool = Field(False, description="make maps again for the backward pass: less memory, more time")
    compile: bool = Field(False, description="torch.compile for the generator and CLIP, never for D")
    channels_last: bool = Field(False, description="weights of convolutions with the channels last")
    cached_features: bool = Field(
        False,
        description="CLIP features of real images made once and kept; needs square images, crop = resize and no flip",
    )
    log_every: PositiveInt = 25
    sample_every: PositiveInt = 500
    checkpoint_every: PositiveInt = 500

    @model_validator(mode="after")
    def _fits(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give the budget as steps or as epochs: exactly one of them")
        if self.batch_size == 1 and self.mismatch != "published":
            raise ValueError(
                "batch_size=1 has no other sentence to mismatch with; use 2 or more "
                "(mismatch: published reruns what the published code does there)"
            )
        return self


class EvaluationSettings(Section):
    """How a finished run is scored."""

    images: PositiveInt = Field(512, description="images generated for the scores")
    batch_size: PositiveInt = 64
    grid_captions: PositiveInt = Field(8, description="captions shown in the sample grid")
    grid_images: PositiveInt = Field(4, description="images a caption in the sample grid")
    judge_steps: Count = Field(600, description="training steps of the attribute classifier (synthetic only)")
    extractor: Literal["clip", "inception"] = Field(
        "clip",
        description="features of FID, KID, IS, precision, recall: the independent CLIP's (labelled so), "
        "or torch-fidelity's Inception",
    )
    extractor_weights: Path | None = Field(
        None, description="inception: local file of torch-fidelity's weights; none: it downloads them"
    )
    inception_range: Literal["standard", "published"] = Field(
        "standard",
        description="published: pixels reach the extractor as if they were in [0,1] and normalised "
        "again (difference 6)",
    )
    last_batch: Literal["keep", "drop"] = Field(
        "keep", description="drop: as published, a last batch that is not full is not counted (difference 9)"
    )
    clip_score_normalisation: Literal["standard", "published"] = Field(
        "standard", description="of the CLIP score; published: pixels normalised twice (difference 4)"
    )
    study: tuple[PositiveInt, ...] = Field(
        (1000, 2000, 5000, 10000, 20000, 30000), description="numbers of images of the protocol study"
    )


class ExperimentSettings(Section):
    """The grid of runs behind notebooks 04 to 08 (`ratlip.studies.grid`)."""

    steps: PositiveInt | None = Field(None, description="training steps of each run; none: as training says")
    seeds: PositiveInt = Field(3, description="runs of each variant of the ablation and the sweep")
    versus_seeds: PositiveInt = Field(3, description="runs of the published and the corrected form")
    hidden_sizes: tuple[Count, ...] = Field((0, 4, 8, 16, 32, 64, 128), description="h of the sweep; 0: CAT")


def _digest(content: dict) -> str:
    """8 hex digits that change when, and only when, a value in `content` does."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


class Settings(Section):
    """Everything a run depends on."""

    profile: str
    summary: str = ""
    seed: Count = 0
    data: DataSettings
    clip: ClipSettings
    model: ModelSettings = ModelSettings()
    training: TrainingSettings
    evaluation: EvaluationSettings = EvaluationSettings()
    independent: ClipSettings | None = Field(
        None, description="a second CLIP, which no generator was trained with, for scores only"
    )
    experiments: ExperimentSettings = ExperimentSettings()

    @model_validator(mode="after")
    def _fits(self):
        size, clip, model = self.model.image_size, self.clip, self.model
        if self.independent and self._clip_hash(self.independent) == self.clip_hash:
            raise ValueError(
                "independent is the CLIP that the generator is trained with; give it another seed "
                "and width (or other pretrained weights)"
            )
        if clip.source == "train":
            if size % clip.patch_size or not 4 <= size // clip.patch_size <= 32:
                raise ValueError(
                    f"model.image_size={size} and clip.patch_size={clip.patch_size}: the patch "
                    "must divide the image into a grid of 4 to 32 patches a side"
                )
            layers = clip.layers
            for name in ("prompt_blocks", "feature_blocks"):
                if max(getattr(model, name), default=0) >= layers:
                    raise ValueError(
                        f"model.{name}={list(getattr(model, name))}: the CLIP has blocks 0 to "
                        f"{layers - 1} (clip.layers={layers})"
                    )
        return self

    @property
    def data_hash(self) -> str:
        """Identity of the prepared data (the crop, the flip and other sections' settings do not touch it)."""
        return _digest({"stored": self.data.stored})

    @property
    def clip_hash(self) -> str:
        """Identity of the CLIP and of the caption embeddings that it gives for the prepared data."""
        return self._clip_hash(self.clip)

    @property
    def independent_hash(self) -> str | None:
        """Identity of the independent CLIP, which only scores; None where the profile names none."""
        return self._clip_hash(self.independent) if self.independent else None

    def _clip_hash(self, c: ClipSettings) -> str:
        content = {"data": self.data_hash}
        if c.source == "train":  # without the normalisation: a small CLIP is trained with the standard one
            content |= {
                "crop": self.data.crop,
                "flip": self.data.flip,
                "image_size": self.model.image_size,
                **c.model_dump(mode="json", exclude={"model", "pretrained", "path", "normalisation"}),
            }
        else:
            where = "pretrained" if c.source == "pretrained" else "path"
            content |= c.model_dump(mode="json", include={"source", "model", where})
        return _digest(content)

    @property
    def judge_hash(self) -> str:
        """Identity of the attribute classifier (generated set only)."""
        return _digest(
            {
                "data": self.data_hash,
                "crop": self.data.crop,
                "image_size": self.model.image_size,
                "steps": self.evaluation.judge_steps,
            }
        )

    @property
    def run_hash(self) -> str:
        """Identity of a run: every setting that changes its weights (how often it logs or saves does not)."""
        content = self.model_dump(
            mode="json",
            exclude={
                "profile": True,
                "summary": True,
                "evaluation": True,
                "independent": True,
                "experiments": True,
                "training": {"log_every", "sample_every", "checkpoint_every"},
            },
        )
        content["model"]["noise_size"] = content["model"].pop("latent_size")  # its name when runs were first named
        if self.training.resume == "exact":  # as before this setting was there
            del content["training"]["resume"]
        for option in ("checkpointing", "compile", "channels_last", "cached_features"):
            if not content["training"][option]:  # as before these settings were there
                del content["training"][option]
        if self.model.variant.startswith("cat-"):  # no LSTM: how large it would be and where is no difference
            content["model"] |= {"conditioning": "cat", "hidden_size": 0, "rat_scope": "generator"}
        return _digest(content)

    @property
    def run_name(self) -> str:
        """Folder name of the run: variant, seed, identity."""
        return f"{self.model.variant}-seed{self.seed}-{self.run_hash}"

    def to_yaml(self) -> str:
        """The settings as YAML that `load_settings` reads back to the same identity."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def profile_names() -> list[str]:
    """The profiles that come with ratlip."""
    return sorted(
        p.name.removesuffix(".yaml")
        for p in resources.files("ratlip.settings.profiles").iterdir()
        if p.name.endswith(".yaml")
    )


def _read_profile(profile: str | Path, chain: tuple[str, ...] = ()) -> tuple[str, dict]:
    path = Path(profile)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise SettingsError(
                f"{path}: no such profile file; give a path that exists or one of {', '.join(profile_names())}"
            )
        name, text = str(path), path.read_text(encoding="utf-8")
    elif profile in profile_names():
        name = f"profile {profile}"
        text = (resources.files("ratlip.settings.profiles") / f"{profile}.yaml").read_text("utf-8")
    else:
        near = difflib.get_close_matches(str(profile), profile_names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise SettingsError(
            f"there is no profile {str(profile)!r}{hint} "
            f"Profiles: {', '.join(profile_names())}; or give the path of a .yaml file."
        )
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{name}: not readable as YAML: {error}") from None
    if not isinstance(content, dict):
        raise SettingsError(
            f"{name}: should be a mapping of sections (data, clip, model, training), not {type(content).__name__}"
        )
    parent = content.pop("extends", None)
    if parent:
        beside = path.parent / str(parent)  # a path is meant from the file that names it
        parent = str(beside) if beside.is_file() else str(parent)
        if parent in chain:
            raise SettingsError(f"{name}: extends {parent}, which extends this profile; break the circle")
        inherited = _read_profile(parent, (*chain, parent))[1]
        content = merge({key: value for key, value in inherited.items() if key != "profile"}, content)
    if path.suffix in (".yaml", ".yml"):
        content.setdefault("profile", path.stem)
    else:
        content["profile"] = str(profile)
    return name, content


def merge(base: dict, over: dict) -> dict:
    """`over` laid on `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def lay(content: dict, given: dict[str, Any]) -> dict:
    """Dotted settings (`{"model.hidden_size": 16}`) laid over those of a profile; a budget replaces the other."""
    for dotted, value in given.items():
        nested: Any = value
        for part in reversed(dotted.split(".")):
            nested = {part: nested}
        content = merge(content, nested)
    for budget, other in (("steps", "epochs"), ("epochs", "steps")):  # the one asked for replaces the other
        if f"training.{budget}" in given and f"training.{other}" not in given:
            content = merge(content, {"training": {other: None}})
    return content


def load_settings(profile: str | Path, overrides: dict[str, Any] | None = None) -> Settings:
    """Read a profile by name or path and lay dotted overrides over it (`{"model.hidden_size": 16}`).

    An override of None is no override. Raises SettingsError that lists every wrong field with its value and
    what would be allowed.
    """
    name, content = _read_profile(profile, (str(profile),))
    content = lay(content, {dotted: value for dotted, value in (overrides or {}).items() if value is not None})
    try:
        return Settings.model_validate(content)
    except ValidationError as error:
        raise SettingsError(_explain(name, error)) from None


def _fields_at(location: tuple) -> list[str]:
    model: Any = Settings
    for part in location:
        field = getattr(model, "model_fields", {}).get(part)
        model = field.annotation if field else None
    return list(getattr(model, "model_fields", {}))


def _explain(name: str, error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        location = tuple(part for part in problem["loc"])
        dotted = ".".join(str(part) for part in location)
        if problem["type"] == "extra_forbidden":
            known = _fields_at(location[:-1])
            near = difflib.get_close_matches(str(location[-1]), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            lines.append(f"{dotted}: no such setting; {hint}known here: {', '.join(known)}")
        elif problem["type"] == "missing":
            lines.append(f"{dotted}: missing")
        elif problem["type"] == "value_error":
            lines.append(f"{dotted + ': ' if dotted else ''}{problem['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"{dotted}={problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}")
    return f"{name}: {len(lines)} setting(s) wrong:\n" + "\n".join(f"  {line}" for line in lines)


def read_overrides(pairs: list[str] | None) -> dict:
    """`["seed=1", "model.hidden_size=16"]` -> {"seed": 1, ...}; values are read as YAML."""
    overrides = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise SettingsError(f"--set {pair}: should be KEY=VALUE, e.g. --set model.hidden_size=16")
        try:
            overrides[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SettingsError(f"--set {pair}: {value!r} is no YAML value ({error})") from error
        if not value.strip():
            raise SettingsError(f"--set {pair}: has no value; to keep a setting, leave the option out")
    return overrides
