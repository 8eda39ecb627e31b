"""What a run is made of: one section a part, checked before anything is computed, and hashed into the run's name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ratlip.cache import digest
from ratlip.published import describe

Conditioning = Literal["cat", "rat", "rat-official"]
PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # torch takes no larger one
Rate = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Pixels = Annotated[int, Field(ge=16, le=1024)]
Form = Literal["standard", "published"]
Group = Literal["ablation", "sweep", "versus", "study"]


class Section(BaseModel):
    """Immutable, and a misspelt key is an error rather than a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class SceneSettings(Section):
    """How many values of each attribute the set `scenes` uses, the first ones of `ratlip.data.scenes.EVERY`."""

    shapes: Annotated[int, Field(ge=2, le=8)] = 8
    colours: Annotated[int, Field(ge=4, le=8)] = 8
    textures: Annotated[int, Field(ge=1, le=4)] = 4
    sizes: Annotated[int, Field(ge=1, le=2)] = 2
    backgrounds: Annotated[int, Field(ge=1, le=5)] = 5
    relations: Annotated[int, Field(ge=1, le=3)] = 3


GENERATED = ("synthetic", "scenes")  # drawn, not read: no dataset root, attributes and masks are known


class DataSettings(Section):
    """Which pictures, and how they are cut. Sizes in pixels."""

    dataset: Literal["synthetic", "scenes", "birds", "flowers", "faces", "folder"]
    resize: Pixels = Field(description="shorter side of the stored images")
    crop: Pixels = Field(description="side of the square cut at random at each visit")
    flip: bool = Field(True, description="mirror half of the images (not where captions say left, right)")
    train_images: PositiveInt = Field(4096, description="generated sets: size of the training split")
    test_images: PositiveInt = Field(512, description="generated sets: size of the test split")
    validation_images: Count = Field(0, description="generated sets: of a split for choices that no verdict uses")
    named: Literal["all", "subset"] = Field("all", description="synthetic only: what captions name")
    scenes: SceneSettings = Field(SceneSettings(), description="scenes only: how difficult")
    human_captions_only: bool = Field(False, description="flowers only: no template captions")
    tiny: bool = Field(True, description="faces only: our CelebA-tiny instead of all images")
    seed: Seed = Field(0, description="of a generated set")

    @model_validator(mode="after")
    def _fits(self):
        if self.crop > self.resize:
            raise ValueError(f"crop={self.crop} is larger than resize={self.resize}; choose crop <= resize")
        if self.generated and self.flip:
            raise ValueError(f"flip=true would turn 'on the left' into a lie; {self.dataset} needs flip: false")
        return self

    @property
    def generated(self) -> bool:
        """Whether the set is drawn."""
        return self.dataset in GENERATED

    @property
    def options(self) -> dict[str, Any]:
        """The dataset's own settings: what its reader in `ratlip.data` is given. Later ones only where they are set."""
        drawn = {name: getattr(self, name) for name in ("train_images", "test_images", "seed")}
        drawn |= {"validation_images": self.validation_images} if self.validation_images else {}
        if self.dataset == "synthetic":
            return drawn | ({"named": self.named} if self.named != "all" else {})
        if self.dataset == "scenes":
            return drawn | self.scenes.model_dump()
        own = {"flowers": ("human_captions_only",), "faces": ("tiny",)}
        return {name: getattr(self, name) for name in own.get(self.dataset, ())}

    @property
    def stored(self) -> dict[str, Any]:
        """What decides what `prepare` writes: not the crop, the flip, or another dataset's options."""
        return {"dataset": self.dataset, "resize": self.resize, **self.options}


CAME_LATER = {"optimiser": "adamw", "masked": 0}  # of the small CLIP: where a field is so, names are as before it was


class ClipSettings(Section):
    """Where the frozen CLIP comes from: `train`ed on the captions, downloaded (`pretrained`), or a `file`."""

    source: Literal["train", "pretrained", "file"]
    model: str = Field("ViT-B-32-quickgelu", description="open_clip architecture (pretrained, file)")
    pretrained: str = Field("openai", description="open_clip weight tag (pretrained)")
    path: Path | None = Field(None, description="local checkpoint (file)")
    normalisation: Form = Field("standard", description=describe("clip.normalisation"))
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
    optimiser: Literal["adamw", "muon"] = Field("adamw", description="muon: for the weight matrices of the blocks")
    masked: Annotated[float, Field(ge=0, lt=1)] = Field(0, description="share of patches left out in most steps")
    seed: Seed = 0

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

    conditioning: Conditioning = Field("rat", description=describe("model.conditioning"))
    rat_scope: Literal["mapper", "generator"] = Field("generator", description=describe("model.rat_scope"))
    hidden_size: Annotated[int, Field(ge=0, le=1024)] = Field(64, description="h of the LSTM; 0 means CAT")
    rat_input: Literal["state", "scaled", "state-latent-sentence"] = Field(
        "state",
        description="what RAT's affines read: the LSTM's state (the paper); the state times a constant that gives it "
        "the spread of CAT's condition at the start; the state beside latent and sentence",
    )
    attention: Literal["shuffle", "none", "norm"] = Field("shuffle", description="none: as GALIP; norm: its norm alone")
    attention_groups: PositiveInt = 8
    image_size: Pixels = 224
    latent_size: PositiveInt = 100
    base_channels: PositiveInt = 64
    code_channels: PositiveInt = 64
    mapper_blocks: PositiveInt = 4
    prompt_blocks: tuple[Count, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    bridge_scale: float = 0.1
    feature_blocks: tuple[Count, ...] = (1, 4, 8)
    discriminator_tower: Literal["clip", "random"] = Field(
        "clip", description="whose features D sees; random: the same tower, each tensor's values in random order"
    )
    d_channels: PositiveInt = 512
    logit_channels: PositiveInt = 128
    gate: float = Field(0.0, ge=0, le=1, description="start of the discriminator's residual gates; 0 as published")
    unused_shortcuts: bool = Field(False, description=describe("model.unused_shortcuts"))

    @model_validator(mode="after")
    def _fits(self):
        for name in ("prompt_blocks", "feature_blocks"):
            if len(set(blocks := getattr(self, name))) != len(blocks):
                raise ValueError(f"{name}={list(blocks)} names a block twice")
        if not self.feature_blocks:
            raise ValueError("feature_blocks is empty; the discriminator needs one CLIP block at least")
        if self.conditioning == "rat-official" and self.rat_scope == "generator":
            raise ValueError("conditioning=rat-official exists in the mapper only; set rat_scope: mapper")
        if self.conditioning == "rat-official" and self.rat_input != "state":
            raise ValueError(f"rat_input={self.rat_input} would change what was published; set rat_input: state")
        step = 2 * self.attention_groups
        for name in ("base_channels", "code_channels"):
            if self.attention == "shuffle" and (value := getattr(self, name)) % step:
                raise ValueError(f"{name}={value} must be a multiple of {step} = 2 x attention_groups")
        if self.code_channels % 2:
            raise ValueError(f"code_channels={self.code_channels} must be even")
        return self

    @property
    def effective_conditioning(self) -> Conditioning:
        """`conditioning`, but CAT where the LSTM has no hidden units."""
        return self.conditioning if self.hidden_size else "cat"

    @property
    def variant(self) -> str:
        """Short name of the ablation variant, e.g. `rat-h64-shuffle`, `rat-mapper-h16-shuffle`, `cat-none`."""
        if self.effective_conditioning == "cat":
            return f"cat-{self.attention}"
        scope = "-mapper" if self.conditioning == "rat" and self.rat_scope == "mapper" else ""
        read = "" if self.rat_input == "state" else f"-{self.rat_input}"
        return f"{self.conditioning}{scope}{read}-h{self.hidden_size}-{self.attention}"


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
        description="roll: the neighbour's sentence in the batch; similar: another caption close to the true one; "
        "published: roll even in a batch of one, where it is the true sentence (difference 7)",
    )
    real_resize: Literal["antialias", "nearest"] = Field("antialias", description=describe("training.real_resize"))
    resume: Literal["exact", "published"] = Field("exact", description=describe("training.resume"))
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    sync_batch_norm: bool = Field(
        True, description="several processes: batch norm sees the whole batch, as one does; off: each its own part"
    )
    checkpointing: bool = Field(False, description="make maps again for the backward pass: less memory, more time")
    channels_last: bool = Field(False, description="weights of convolutions with the channels last")
    cached_features: bool = Field(False, description="keep CLIP's features of real images (no flip, crop = resize)")
    log_every: PositiveInt = 25
    sample_every: PositiveInt = 500
    checkpoint_every: PositiveInt = 500
    visits: tuple[PositiveInt, ...] = Field((), description="steps at which the generator is scored, as at the end")

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_gone(cls, given: Any) -> Any:
        """Runs of before name `compile`, which was off in all of them."""
        if not isinstance(given, dict) or "compile" not in given:
            return given
        if given["compile"]:
            raise ValueError("compile is gone: G's gradient was wrong with it (reports/performance.md); leave it out")
        return {name: value for name, value in given.items() if name != "compile"}

    @model_validator(mode="after")
    def _fits(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give the budget as steps or as epochs: exactly one of them")
        if self.batch_size == 1 and self.mismatch != "published":
            mend = "use 2 or more (mismatch: published reruns what the published code does there)"
            raise ValueError(f"batch_size=1 has no other sentence to mismatch with; {mend}")
        return self


class EvaluationSettings(Section):
    """How a finished run is scored."""

    images: PositiveInt = Field(512, description="images generated for the scores")
    split: Literal["test", "validation"] = Field("test", description="validation: for choices that no verdict uses")
    batch_size: PositiveInt = 64
    grid_captions: PositiveInt = Field(8, description="captions shown in the sample grid")
    grid_images: PositiveInt = Field(4, description="images a caption in the sample grid")
    judge_steps: Count = Field(600, description="training steps of the attribute classifier (synthetic only)")
    extractor: Literal["clip", "inception"] = Field(
        "clip", description="of FID and its like; clip: the independent one"
    )
    extractor_weights: Path | None = Field(None, description="inception: a local file; none: torch-fidelity's own")
    inception_range: Form = Field("standard", description=describe("evaluation.inception_range"))
    last_batch: Literal["keep", "drop"] = Field("keep", description=describe("evaluation.last_batch"))
    clip_score_normalisation: Form = Field(
        "standard", description="of the CLIP score; " + describe("evaluation.clip_score_normalisation")
    )
    study: tuple[PositiveInt, ...] = (1000, 2000, 5000, 10000, 20000, 30000)  # images of the protocol study


class ExperimentSettings(Section):
    """The grid of runs behind notebooks 04 to 08 (`ratlip.studies.grid`)."""

    steps: PositiveInt | None = Field(None, description="training steps of each run; none: as training says")
    seeds: PositiveInt = Field(3, description="runs of each variant of the ablation and the sweep")
    first_seed: Seed = Field(0, description="seeds are this one and those after it")
    versus_seeds: PositiveInt = Field(3, description="runs of the published and the corrected form")
    hidden_sizes: tuple[Count, ...] = Field((0, 4, 8, 16, 32, 64, 128), description="h of the sweep; 0: CAT")
    groups: tuple[Group, ...] = Field(("ablation", "sweep", "versus"), description="parts of the grid that are made")


class Settings(Section):
    """Everything a run depends on."""

    profile: str
    summary: str = ""
    seed: Seed = 0
    data: DataSettings
    clip: ClipSettings
    model: ModelSettings = ModelSettings.model_validate({})
    training: TrainingSettings
    evaluation: EvaluationSettings = EvaluationSettings.model_validate({})
    independent: ClipSettings | None = Field(None, description="a second CLIP, which no generator knows, for scores")
    experiments: ExperimentSettings = ExperimentSettings.model_validate({})

    @model_validator(mode="after")
    def _fits(self):
        m, size, patch, layers = self.model, self.model.image_size, self.clip.patch_size, self.clip.layers
        if self.independent and self.independent_hash == self.clip_hash:
            mend = "give it another seed and width (or other pretrained weights)"
            raise ValueError(f"independent is the CLIP that the generator is trained with; {mend}")
        if self.clip.source != "train":
            return self
        if size % patch or not 4 <= size // patch <= 32:
            given = f"model.image_size={size} and clip.patch_size={patch}"
            raise ValueError(f"{given}: the patch must divide the image into a grid of 4 to 32 patches a side")
        for name, blocks in {"prompt_blocks": m.prompt_blocks, "feature_blocks": m.feature_blocks}.items():
            if max(blocks, default=0) >= layers:
                has = f"the CLIP has blocks 0 to {layers - 1} (clip.layers={layers})"
                raise ValueError(f"model.{name}={list(blocks)}: {has}")
        return self

    @property
    def data_hash(self) -> str:
        """Identity of the prepared data (the crop, the flip and other sections' settings do not touch it)."""
        return digest({"stored": self.data.stored})

    @property
    def clip_hash(self) -> str:
        """Identity of the CLIP and of the caption embeddings that it gives for the prepared data."""
        return self._clip_hash(self.clip)

    @property
    def independent_hash(self) -> str | None:
        """Identity of the independent CLIP, which only scores; None where the profile names none."""
        return self._clip_hash(self.independent) if self.independent else None

    def _clip_hash(self, c: ClipSettings) -> str:
        if c.source != "train":
            where = "pretrained" if c.source == "pretrained" else "path"
            return digest({"data": self.data_hash, **c.model_dump(mode="json", include={"source", "model", where})})
        # without the normalisation: a small CLIP is trained with the standard one
        own = c.model_dump(mode="json", exclude={"model", "pretrained", "path", "normalisation"})
        own = {name: value for name, value in own.items() if (name, value) not in CAME_LATER.items()}
        cut = {"crop": self.data.crop, "flip": self.data.flip, "image_size": self.model.image_size}
        return digest({"data": self.data_hash, **cut, **own})

    @property
    def judge_hash(self) -> str:
        """Identity of the attribute classifier (generated set only)."""
        cut = {"crop": self.data.crop, "image_size": self.model.image_size}
        return digest({"data": self.data_hash, **cut, "steps": self.evaluation.judge_steps})

    @property
    def run_hash(self) -> str:
        """Identity of a run: every setting that changes its weights (when it logs, saves or is scored does not)."""
        content = self.model_dump(mode="json", include={"seed", "data", "clip", "model", "training"})
        model, training = content["model"], content["training"]
        for name in ("log_every", "sample_every", "checkpoint_every", "visits"):
            del training[name]
        for name, before in {"named": "all", "validation_images": 0, "scenes": SceneSettings().model_dump()}.items():
            if content["data"][name] == before:
                del content["data"][name]
        model["noise_size"] = model.pop("latent_size")  # its name when runs were first named
        later = ("checkpointing", "channels_last", "cached_features")  # off: as before they were there
        for name, before in {"resume": "exact", "sync_batch_norm": True, **dict.fromkeys(later, False)}.items():
            if training[name] == before:
                del training[name]
        content["clip"] = {k: v for k, v in content["clip"].items() if (k, v) not in CAME_LATER.items()}
        if self.model.effective_conditioning == "cat":  # no LSTM: how large it would be and where is no difference
            model |= {"conditioning": "cat", "hidden_size": 0, "rat_scope": "generator", "rat_input": "state"}
        for name, before in {"rat_input": "state", "discriminator_tower": "clip"}.items():
            if model[name] == before:
                del model[name]
        return digest(content)

    @property
    def run_name(self) -> str:
        """Folder name of the run: variant, seed, identity."""
        return f"{self.model.variant}-seed{self.seed}-{self.run_hash}"

    def to_yaml(self) -> str:
        """The settings as YAML that `load_settings` reads back to the same identity."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
