"""The flow, one function a station: data -> CLIP -> run -> scores. Each returns at once what is there.

    outputs/<profile>/prepared-<hash>/   clip-<hash>/   judge-<hash>/   runs/<variant>-seed<n>-<hash>/
                         features-<hash>/  (of real images, for the scores)

Data goes one way: a station reads the folders before it and writes its own. The hash in a folder's name is
that of the settings it depends on, so that changing one setting makes new folders of what depends on it, and
of nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from ratlip.clip import small
from ratlip.clip.frozen import FrozenClip
from ratlip.clip.loading import load_clip
from ratlip.clip.retrieval import embed_captions
from ratlip.data import birds, faces, flowers, synthetic
from ratlip.data.prepared import Prepared, existing, load_prepared, prepare
from ratlip.data.records import Record
from ratlip.errors import DataError, RunError
from ratlip.files import outputs_folder, write_json
from ratlip.scores import evaluation
from ratlip.scores.judge import Judge, load_judge
from ratlip.settings import ClipSettings, Settings, load_settings
from ratlip.training import loop
from ratlip.training.generation import best_device

OUTPUTS = Path("outputs")


@dataclass(frozen=True)
class Workspace:
    """Where everything of one profile lies. `root` defaults to outputs/<profile> below the current folder."""

    settings: Settings
    root: Path
    progress: bool = True

    @classmethod
    def of(cls, settings: Settings, root: str | Path | None = None, progress: bool = True) -> Workspace:
        return cls(settings, Path(root) if root else OUTPUTS / Path(settings.profile).name, progress)

    @property
    def prepared_folder(self) -> Path:
        return self.root / f"prepared-{self.settings.data_hash}"

    @property
    def clip_folder(self) -> Path:
        return self.root / f"clip-{self.settings.clip_hash}"

    @property
    def judge_folder(self) -> Path:
        return self.root / f"judge-{self.settings.judge_hash}"

    @property
    def run_folder(self) -> Path:
        return self.root / "runs" / self.settings.run_name

    def prepare(self, data: str | Path | None = None) -> Prepared:
        """The prepared data; at first use, made from the dataset root `data` (not for the generated set)."""
        found = existing(self.prepared_folder, resize=self.settings.data.resize, settings=self._data_settings)
        if found is not None:
            return found
        d = self.settings.data
        return prepare(
            read_records(self.settings, data),
            self.prepared_folder,
            resize=d.resize,
            settings=self._data_settings,
            source=d.dataset,
            progress=self.progress,
        )

    @property
    def _data_settings(self) -> dict:
        return {"hash": self.settings.data_hash, **self.settings.data.stored}

    @cached_property
    def prepared(self) -> Prepared:
        """The prepared data, which must be there. Raises DataError that says how to make them."""
        if self.settings.data.dataset == "synthetic":
            return self.prepare()
        if not (self.prepared_folder / "manifest.json").is_file():
            raise DataError(
                f"{self.prepared_folder}: no prepared data; run `ratlip prepare --profile "
                f"{self.settings.profile} --data ROOT` first"
            )
        return load_prepared(self.prepared_folder)

    @cached_property
    def clip(self) -> FrozenClip:
        """The frozen CLIP of these settings, trained at first use where the settings say so."""
        return self._tower(self.settings.clip, self.clip_folder)

    @cached_property
    def independent(self) -> FrozenClip | None:
        """A second CLIP, which no generator was trained with, for scores; None where the profile has none."""
        s = self.settings
        return self._tower(s.independent, self.root / f"clip-{s.independent_hash}") if s.independent else None

    def _tower(self, clip: ClipSettings, folder: Path) -> FrozenClip:
        s = self.settings
        if clip.source != "train":
            return load_clip(clip).to(best_device())
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # runs may be scored side by side
            return small.train_small_clip(
                self.prepared,
                clip,
                folder,
                device=best_device(),
                image_size=s.model.image_size,
                crop=s.data.crop,
                flip=s.data.flip,
                progress=self.progress,
            ).to(best_device())

    def sentences(self, split: str = "train") -> Tensor:
        """Raw text embeddings (N,E) of a split, in the order of its `all_captions`; cached on disk."""
        rows = embed_captions(self.clip, self.prepared, self.clip_folder, progress=self.progress)[split]
        return torch.from_numpy(np.array(rows))

    @cached_property
    def judge(self) -> Judge | None:
        """The attribute classifier, for the generated set; None for photographs."""
        if self.settings.data.dataset != "synthetic":
            return None
        s = self.settings
        return load_judge(
            self.prepared,
            self.judge_folder,
            crop=s.data.crop,
            image_size=s.model.image_size,
            steps=s.evaluation.judge_steps,
            progress=self.progress,
        )

    def train(self, **options) -> Path:
        """Train the run (or go on with it, or find it complete). Options: see `ratlip.training.loop.train`."""
        return loop.train(
            self.settings,
            self.prepared,
            self.clip,
            self.sentences(),
            self.run_folder,
            progress=self.progress,
            **options,
        )

    def evaluate(self) -> dict:
        """Scores of the run, also written to `scores.json` in its folder. RunError before it is complete."""
        if not loop.is_complete(self.run_folder):
            raise RunError(
                f"{self.run_folder}: not trained to its last step; run `ratlip train` with the same settings"
            )
        scores = evaluation.evaluate(
            self.run_folder,
            self.settings,
            self.prepared,
            self.clip,
            self.judge,
            independent=self.independent,
            root=self.root,
            progress=self.progress,
        )
        write_json(self.run_folder / "scores.json", scores)
        return scores


def read_records(settings: Settings, data: str | Path | None) -> list[Record]:
    """Read a dataset root by its official layout, or draw the generated set. DataError lists all problems."""
    d = settings.data
    if d.dataset == "synthetic":
        return synthetic.records(d.resize, d.train_images, d.test_images, d.seed)
    if not data:
        raise DataError(
            f"profile {settings.profile} needs the {d.dataset} dataset: give its root folder "
            f"(`--data ROOT`, or DATA=ROOT with make); `ratlip download {d.dataset} --to ROOT` "
            "fetches it or says where to get it. The profile demo needs no data"
        )
    if d.dataset == "birds":
        return birds.read(data)
    if d.dataset == "flowers":
        return flowers.read(data, human_captions_only=d.human_captions_only)
    return faces.read(data, tiny=d.tiny)


def open_workspace(profile: str, outputs: str | Path | None = None, *, settings: Any = None, **overrides):
    """The `Workspace` of a profile, with a notebook's parameters laid over its settings.

    `overrides`: "seed", "steps", "epochs" or a name of the section model; None or "" keep what the profile
    says. `settings`: further ones, as a dict ({"training.ema": 0.9}), a list of "key=value", or one string
    ("training.ema=0.9 clip.steps=100").
    """
    from ratlip.workspace import Workspace

    sections = {"steps": "training", "epochs": "training", "seed": ""}
    laid = {
        f"{section}.{name}" if (section := sections.get(name, "model")) else name: value
        for name, value in overrides.items()
        if value not in (None, "")
    }
    chosen = load_settings(profile, {**laid, **_pairs(settings)})
    return Workspace.of(chosen, outputs_folder(chosen.profile, outputs))


def _pairs(settings: Any) -> dict:
    from ratlip.settings import read_overrides

    if isinstance(settings, dict):
        return settings
    return read_overrides(settings.split() if isinstance(settings, str) else settings)
