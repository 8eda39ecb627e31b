"""Where the authors' code parts from their paper, and the numbers they published. Nothing here is measured by us.

DIFFERENCES is the one table of the former: profiles `*-published`, the descriptions of settings, notebook 07 and the
`ratlip/settings/README.md` say what it says. `ratlip/networks/official.md` describes the code they were read off.
"""

from __future__ import annotations

from dataclasses import dataclass

Value = str | bool | int
NOT_STATED, NO_RAT = "not stated", "no: GALIP has no RAT"
COLUMNS = {
    "expected": "paper, or what a reader expects",
    "code": "published code",
    "default": "our default",
    "setting": "setting to switch it back",
    "inherited": "inherited from GALIP",
}


@dataclass(frozen=True)
class Difference:
    """One difference. `back` are the settings that switch it back, or words; `test` is the test that shows it."""

    expected: str
    code: str
    default: str
    back: dict[str, Value] | str
    inherited: str
    test: str

    @property
    def setting(self) -> str:
        """What switches it back, in words: "section.name: value; ..."."""
        if isinstance(self.back, str):
            return self.back
        return "; ".join(f"{key}: {str(value).lower()}" for key, value in self.back.items())


_ROWS: dict[str, tuple[tuple[str, str], tuple[str, dict[str, Value] | str, str]]] = {  # test: the other fields
    "test_only_the_published_rat_lets_batch_mates_change_an_image": (
        ("each image's scale and shift come from its own text", "the batch is the LSTM's time axis: one state"),
        ("model.conditioning: rat", {"model.conditioning": "rat-official"}, NO_RAT),
    ),
    "test_recurrence_is_an_lstm_over_the_layers_fed_with_the_sentence": (
        ("one LSTM runs over the blocks and hands h and c on", "an LSTM for each affine, no state handed on"),
        ("model.conditioning: rat", {"model.conditioning": "rat-official"}, NO_RAT),
    ),
    "test_affines_of_the_published_size_are_counted": (
        ("RAT connects the fusion blocks of the generator", "RAT in the mapper, CAT in the synthesis blocks"),
        ("model.rat_scope: generator", {"model.rat_scope": "mapper"}, NO_RAT),
    ),
    "test_normalisation_maps_black_grey_white": (
        ("CLIP sees images as it was trained to", "pixels go to [0,1] twice before mean and std"),
        (
            "clip.normalisation: standard",
            {"clip.normalisation": "published", "evaluation.clip_score_normalisation": "published"},
            "yes, with its CLIP score",
        ),
    ),
    "test_nearest_leaves_rows_out_as_published": (
        ("real and fake images come the same way", "real images 256 -> 224 by nearest, fakes drawn at 224"),
        ("training.real_resize: antialias", {"training.real_resize": "nearest"}, NOT_STATED),
    ),
    "test_the_published_range_is_the_one_that_was_measured": (
        ("FID: Inception sees values in [-1, 1]", "it sees about [-0.2, 0.43]"),
        ("evaluation.inception_range: standard", {"evaluation.inception_range": "published"}, NOT_STATED),
    ),
    "test_a_batch_of_one_teaches_nothing_about_matching": (
        ("the batch size is the yaml's, 16", "the command line's default, 1, overrides it"),
        (
            "the profile's training.batch_size; 1 is refused",
            {"training.batch_size": 1, "training.mismatch": "published"},
            NOT_STATED,
        ),
    ),
    "test_outcomes_of_calls": (
        ("the code runs", "calls that need a process group, a GPU, older pandas and scipy"),
        ("runs on a CPU alone", "none: it cannot run", NOT_STATED),
    ),
    "test_the_published_protocol_by_its_name": (
        ("all test images count", "a last batch that is not full is dropped"),
        ("evaluation.last_batch: keep", {"evaluation.last_batch": "drop"}, NOT_STATED),
    ),
    "test_files_that_survive": (
        ("every generated image is kept", "files are named by the step, later ones overwrite"),
        ("ratlip generate --names caption", "ratlip generate --names published", NOT_STATED),
    ),
    "test_unused_shortcuts_change_no_logit": (
        ("every parameter is used", "1x1 shortcuts are built and never used"),
        ("model.unused_shortcuts: false", {"model.unused_shortcuts": True}, "yes: GALIP's checkpoints hold them"),
    ),
    "test_the_published_way_begins_an_epoch_with_the_draws_of_a_fresh_start": (
        ("a run that was stopped goes on", "next epoch, neither scaler nor random state restored"),
        ("training.resume: exact", {"training.resume": "published"}, NOT_STATED),
    ),
}
DIFFERENCES = {
    n: Difference(*texts, *ours, test=test)  # type: ignore[arg-type]
    for n, (test, (texts, ours)) in enumerate(_ROWS.items(), start=1)
}
_BACK = [(n, *pair) for n, each in DIFFERENCES.items() if isinstance(each.back, dict) for pair in each.back.items()]


def rows() -> list[dict[str, str]]:
    """The table as notebook 07 prints it, one dict a difference: heading (see COLUMNS) -> text."""
    return [{heading: getattr(each, name) for name, heading in COLUMNS.items()} for each in DIFFERENCES.values()]


def overrides(*sections: str) -> dict[str, Value]:
    """The settings of these sections (all if none is named) that switch the differences back, with dotted names.

    The batch size of 1 is left out: the profiles keep the yaml's 16 and only allow it (`training.mismatch`).
    """
    wanted = {key: value for _, key, value in _BACK if key != "training.batch_size"}
    return {key: value for key, value in wanted.items() if not sections or key.split(".")[0] in sections}


def describe(key: str) -> str:
    """A setting's part in the differences, e.g. "nearest: real images 256 -> 224 by ... (difference 5)"."""
    found = [(number, value) for number, each, value in _BACK if each == key]
    parts = "; ".join(f"{DIFFERENCES[number].code} (difference {number})" for number, _ in found)
    return f"{str(found[0][1]).lower()}: {parts}"


def markdown() -> str:
    """The table of the differences in `ratlip/settings/README.md`."""
    lines = ["| | paper, or what a reader expects | published code | what switches it back |", "|---|---|---|---|"]
    for number, each in DIFFERENCES.items():
        back = each.setting if each.setting.startswith("none") else f"`{each.setting.replace('; ', '`, `')}`"
        lines.append(f"| {number} | {each.expected} | {each.code} | {back} |")
    return "\n".join(lines)


# The authors' numbers, copied. values: score -> model -> {data set: value}; what is not there was not reported.
_ABOUT_FID = "Inception-v3, torchvision's ImageNet weights (authors' code)"
_ABOUT_CLIP = "ViT-B/32, 100 x cosine (authors' code)"
NUMBERS = {
    "source": "Lin, Lu, Chen (2024), arXiv 2405.08114, as the authors' repository states them",
    "whose": "published by the authors",
    "seeds": NOT_STATED,
    "scores": {
        "FID": {"better": "lower", "images": NOT_STATED, "extractor": _ABOUT_FID},
        "CLIP score": {"better": "higher", "images": NOT_STATED, "extractor": _ABOUT_CLIP},
    },
    "values": {
        "FID": {
            "AttnGAN": {"CUB": 23.98, "CelebA-tiny": 125.98},
            "LAFITE": {"CUB": 14.58},
            "DF-GAN": {"CUB": 14.81, "CelebA-tiny": 137.60},
            "GALIP": {"CUB": 10.00, "CelebA-tiny": 94.45},
            "RATLIP": {"CUB": 13.28, "CelebA-tiny": 81.48},
        },
        "CLIP score": {
            "AttnGAN": {"Oxford": 21.15},
            "LAFITE": {"CUB": 31.25},
            "DF-GAN": {"CUB": 29.20, "Oxford": 26.67, "CelebA-tiny": 24.41},
            "GALIP": {"CUB": 31.60, "Oxford": 31.77, "CelebA-tiny": 27.95},
            "RATLIP": {"CUB": 32.03, "Oxford": 31.94, "CelebA-tiny": 28.91},
        },
    },
    "notes": [
        "On CUB, GALIP's published FID is better than RATLIP's.",
        "An earlier version of the authors' table has the columns Oxford and CelebA-tiny of the CLIP score the other "
        "way round.",
        "The values of the other models are the authors' as well; whether they ran these models or quote them is not "
        "stated.",
        "The published FID and CLIP score are not the standard ones (notebook 7, differences 4, 6 and 9).",
        "The size and the rule of CelebA-tiny are not published; ours is another set of the same name.",
    ],
}
