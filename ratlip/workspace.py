"""The flow, one method a station: data -> CLIP -> run -> scores. Each returns at once what is there.

    outputs/<profile>/prepared-<hash>/   clip-<hash>/   judge-<hash>/   runs/<variant>-seed<n>-<hash>/
                         features-<hash>/  (of real images, for the scores)

Data goes one way: a station reads the folders before it and writes its own. The hash in a folder's name is that of
the settings it depends on (made in `ratlip.settings.sections`), so that changing one setting makes new folders of
what depends on it, and of nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from ratlip.cache import dotted
from ratlip.clip.frozen import FrozenClip
from ratlip.clip.loading import load_clip
from ratlip.clip.retrieval import embed_captions
from ratlip.clip.small import train_small_clip
from ratlip.data.prepared import Prepared, existing, load_prepared, prepare
from ratlip.data.records import Record
from ratlip.errors import DataError, RunError, SettingsError
from ratlip.files import one_writer, outputs_folder, write_json
from ratlip.scores.evaluation import evaluate
from ratlip.scores.judge import Judge, load_judge
from ratlip.settings import ClipSettings, Settings, load_settings, profile_names, read_overrides
from ratlip.training import loop
from ratlip.training.generation import best_device

OUTPUTS = Path("outputs")


def open_workspace(
    profile: str, outputs: str | Path | None = None, *, settings: Any = None, progress: bool = True, **overrides: Any
) -> Workspace:
    """The `Workspace` of a profile, with a notebook's parameters laid over its settings.

    `overrides`: "seed", "steps", "epochs" or a name of the section model; None or "" keep what the profile says.
    `settings`: further ones, as a dict ({"training.ema": 0.9}), a list of "key=value", or one string of such.
    """
    sections = {"steps": "training.", "epochs": "training.", "seed": ""}
    given = {name: value for name, value in overrides.items() if value not in (None, "")}
    laid = {sections.get(name, "model.") + name: value for name, value in given.items()}
    if not isinstance(settings, dict):
        settings = read_overrides(settings.split() if isinstance(settings, str) else settings)
    chosen = load_settings(profile, laid | settings)
    return Workspace.of(chosen, outputs_folder(chosen.profile, outputs), progress)


@dataclass(frozen=True)
class Workspace:
    """Where everything of one profile lies. `root` defaults to outputs/<profile> below the current folder."""

    settings: Settings
    root: Path
    progress: bool = True

    @classmethod
    def of(cls, settings: Settings, root: str | Path | None = None, progress: bool = True) -> Workspace:
        """The workspace of these settings at `root`."""
        return cls(settings, Path(root) if root else OUTPUTS / Path(settings.profile).name, progress)

    @property
    def prepared_folder(self) -> Path:
        """Folder of the prepared data."""
        return self.root / f"prepared-{self.settings.data_hash}"

    @property
    def clip_folder(self) -> Path:
        """Folder of the CLIP, and of its embeddings of the captions."""
        return self.root / f"clip-{self.settings.clip_hash}"

    @property
    def judge_folder(self) -> Path:
        """Folder of the attribute classifier."""
        return self.root / f"judge-{self.settings.judge_hash}"

    @property
    def run_folder(self) -> Path:
        """Folder of the run."""
        return self.root / "runs" / self.settings.run_name

    def prepare(self, data: str | Path | None = None) -> Prepared:
        """The prepared data; at first use, made from the dataset root `data` (not for the generated set)."""
        d, folder = self.settings.data, self.prepared_folder
        stored = {"hash": self.settings.data_hash, **d.stored}
        if (found := existing(folder, resize=d.resize, settings=stored)) is not None:
            return found
        records, shown = read_records(self.settings, data), self.progress
        return prepare(records, folder, resize=d.resize, settings=stored, source=d.dataset, progress=shown)

    @cached_property
    def prepared(self) -> Prepared:
        """The prepared data, which must be there. Raises DataError that says how to make them."""
        if self.settings.data.generated:
            return self.prepare()
        if not (self.prepared_folder / "manifest.json").is_file():
            command = f"ratlip prepare --profile {self.settings.profile} --data ROOT"
            raise DataError(f"{self.prepared_folder}: no prepared data; run `{command}` first")
        return load_prepared(self.prepared_folder)

    @cached_property
    def clip(self) -> FrozenClip:
        """The frozen CLIP of these settings, trained at first use where the settings say so."""
        return self._load_clip(self.settings.clip, self.clip_folder)

    @cached_property
    def independent(self) -> FrozenClip | None:
        """A second CLIP, which no generator was trained with, for scores; None where the profile has none."""
        s = self.settings
        return self._load_clip(s.independent, self.root / f"clip-{s.independent_hash}") if s.independent else None

    def _load_clip(self, clip: ClipSettings, folder: Path) -> FrozenClip:
        device, d = best_device(), self.settings.data
        if clip.source != "train":
            return load_clip(clip).to(device)
        folder.parent.mkdir(parents=True, exist_ok=True)
        images: dict[str, Any] = dict(image_size=self.settings.model.image_size, crop=d.crop, flip=d.flip)
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # runs may be scored side by side
            made = train_small_clip(self.prepared, clip, folder, device=device, **images, progress=self.progress)
            return made.to(device)

    def sentences(self, split: str = "train") -> Tensor:
        """Raw text embeddings (N,E) of a split, in the order of its `all_captions`; cached on disk."""
        return torch.from_numpy(np.array(self._sentences[split]))

    @cached_property
    def _sentences(self) -> dict[str, np.ndarray]:
        return embed_captions(self.clip, self.prepared, self.clip_folder, progress=self.progress)

    @cached_property
    def judge(self) -> Judge | None:
        """The attribute classifier, for the generated set; None for photographs."""
        s = self.settings
        if not s.data.generated:
            return None
        how: dict[str, Any] = dict(crop=s.data.crop, image_size=s.model.image_size, steps=s.evaluation.judge_steps)
        return load_judge(self.prepared, self.judge_folder, **how, progress=self.progress)

    def train(self, **options: Any) -> Path:
        """Train the run (or go on with it, or find it complete). Options: see `ratlip.training.loop.train`."""
        sentences, folder = self.sentences(), self.run_folder
        if self.settings.training.visits:
            _ = self.judge, self.independent  # made before the training begins
            options = {"visit": self._visit, **options}
        return loop.train(self.settings, self.prepared, self.clip, sentences, folder, progress=self.progress, **options)

    def evaluate(self) -> dict:
        """Scores of the run, also written to `scores.json` in its folder.

        RunError before it is complete, and where another process trains or scores it.
        """
        folder = self.run_folder
        if not loop.is_complete(folder):
            raise RunError(f"{folder}: not trained to its last step; run `ratlip train` with the same settings")
        with one_writer(folder):
            scores = self._scores(folder, self.progress)
            write_json(folder / "scores.json", scores)
        return scores

    def _scores(self, folder: Path, progress: bool) -> dict:
        more: dict[str, Any] = dict(independent=self.independent, root=self.root, progress=progress)
        return evaluate(folder, self.settings, self.prepared, self.clip, self.judge, **more)

    def _visit(self, folder: Path) -> dict:
        """The numbers among the scores of the checkpoint, without those of real images, which stand in scores.json."""
        numbers = {k: v for k, v in dotted(self._scores(folder, False)).items() if type(v) in (int, float)}
        known = ("seed", "seconds_per_image", "real.", "chance.")
        return {name: value for name, value in numbers.items() if not name.startswith(known)}


def read_records(settings: Settings, data: str | Path | None) -> Iterable[Record]:
    """Read a dataset root by its official layout, or draw the generated set. DataError lists all problems."""
    require_data(settings, data)
    reader = import_module(f"ratlip.data.{settings.data.dataset}")
    if settings.data.generated:
        return reader.records(settings.data.resize, **settings.data.options)
    return reader.read(data, **settings.data.options)


def require_data(settings: Settings, data: str | Path | None, prepared: bool = False) -> None:
    """SettingsError where the profile needs a dataset root and `data` is none; `prepared`: it is not read again."""
    profile, name = settings.profile, settings.data.dataset
    if not settings.data.generated and not data and not prepared:
        shown = profile if profile in profile_names() else f"{profile}.yaml"
        give = f"give its root folder (`--data ROOT`, with make `make reproduce PROFILE={shown} DATA=ROOT`)"
        fetch = f"`ratlip download {name} --to ROOT` fetches it or says where to get it"
        needs = f"the {name} dataset"
        if name == "folder":
            needs, fetch = "your pictures", "`ratlip profile new --data ROOT` looks at them and says what is wrong"
        raise SettingsError(f"profile {profile} needs {needs}: {give}; {fetch}. The profile demo needs no data")
    if data and not Path(data).expanduser().is_dir():
        raise SettingsError(f"{data}: there is no such folder; give the root of the {name} dataset")
