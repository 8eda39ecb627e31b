"""Settings: what is refused and how it is said, and what changes an identity and what does not."""

import itertools
import re

import pytest
import yaml

from ratlip.errors import SettingsError
from ratlip.settings import load_settings, merge, profile_names

LOGGING = {f"training.{name}" for name in ("log_every", "sample_every", "checkpoint_every", "visits")}
LABELS = {"profile", "summary"}
# Valid values where "one more" is none; the first that differs is taken.
OTHER = {
    "data.dataset": ("faces", "birds"),
    "data.crop": (17,),
    "data.named": ("subset",),
    "data.scenes": ({"shapes": 4},),
    "evaluation.split": ("validation",),
    "experiments.groups": (["study"],),
    "clip.source": ("file", "train"),
    "clip.model": ("ViT-B-16",),
    "clip.pretrained": ("laion2b",),
    "clip.path": ("elsewhere.pt",),
    "clip.normalisation": ("published",),
    "clip.patch_size": (2,),
    "clip.width": (64,),
    "clip.text_width": (64,),
    "clip.heads": (4,),
    "clip.text_heads": (1,),
    "clip.lr": (0.5,),
    "clip.optimiser": ("adamw", "muon"),
    "clip.masked": (0.5, 0.25),
    "model.conditioning": ("cat", "rat"),
    "model.rat_scope": ("mapper", "generator"),
    "model.rat_input": ("scaled",),
    "model.attention": ("norm", "none"),
    "model.attention_groups": (2,),
    "model.image_size": (32,),
    "model.base_channels": (16,),
    "model.code_channels": (16,),
    "model.prompt_blocks": ([2],),
    "model.feature_blocks": ([1, 2],),
    "model.discriminator_tower": ("random",),
    "training.lr_g": (0.5,),
    "training.lr_d": (0.5,),
    "training.betas": ([0.5, 0.9],),
    "training.ema": (0.5, 0.25),
    "training.mismatch": ("similar", "roll"),
    "model.gate": (0.5, 0.25),
    "training.real_resize": ("nearest",),
    "training.precision": ("bf16-mixed",),
    "training.resume": ("published",),
    "training.visits": ([2, 4],),
    "evaluation.extractor": ("inception",),
    "evaluation.extractor_weights": ("here.pt",),
    "evaluation.inception_range": ("published",),
    "evaluation.last_batch": ("drop",),
    "evaluation.clip_score_normalisation": ("published",),
    "evaluation.study": ([5, 6],),
    "experiments.steps": (7,),
    "experiments.hidden_sizes": ([0, 4],),
    "independent.source": ("file", "train"),
    "independent.path": ("elsewhere.pt",),
    "independent.normalisation": ("published",),
    "independent.width": (32,),
    "independent.heads": (2,),
    "independent.text_width": (32,),
    "independent.text_heads": (2,),
    "independent.lr": (0.5,),
    "independent.optimiser": ("adamw", "muon"),
    "independent.masked": (0.5, 0.25),
}
STORED_LARGER = {"data.resize": 20, "data.crop": 18}  # so that the crop can change alone


def fields(settings) -> list[str]:
    """Every setting as `section.name`."""
    return [
        f"{section}.{name}" if isinstance(value, dict) else section
        for section, value in settings.model_dump().items()
        for name in (value if isinstance(value, dict) else [None])
    ]


def changed(base, field: str):
    """`base` with another valid value of one field."""
    content = base.model_dump(mode="json")
    section, _, name = field.rpartition(".")
    holder = content[section] if section else content
    old = holder[name]
    if field in ("training.steps", "training.epochs"):
        holder |= {"steps": None, "epochs": None, name: 7}
    elif field in OTHER:
        holder[name] = next(value for value in OTHER[field] if value != old)
    elif isinstance(old, bool):
        holder[name] = not old
    else:
        holder[name] = f"{old}x" if isinstance(old, str) else old + 1
    return type(base).model_validate(content)


@pytest.fixture(scope="module")
def base():
    """Settings of which every field can be changed alone."""
    return load_settings(
        "smoke", {"data.dataset": "birds", "clip.path": "here.pt", "independent.path": "other.pt", **STORED_LARGER}
    )


def wrong(overrides, profile="smoke") -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(profile, overrides)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- profiles


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_loads_and_its_yaml_is_the_same_run(name, tmp_path):
    settings = load_settings(name)
    path = tmp_path / "config.yaml"
    path.write_text(settings.to_yaml())
    again = load_settings(path)
    assert again == settings
    for identity in ("run_hash", "data_hash", "clip_hash", "judge_hash", "run_name"):
        assert getattr(again, identity) == getattr(settings, identity)
    assert settings.profile == name and settings.summary


def test_names_are_those_before_a_setting_came():
    assert load_settings("birds-small").run_name == "rat-h64-shuffle-seed0-38997af5"
    assert load_settings("birds-small").clip_hash == "b9401be1"
    assert load_settings("cub").run_name == "rat-h64-shuffle-seed0-349baf47"


def test_profiles_have_different_identities():
    hashes = {name: load_settings(name).run_hash for name in profile_names()}
    assert len(set(hashes.values())) == len(hashes)


def test_published_profiles_differ_from_their_parents_only_in_named_differences():
    for name in ("cub", "demo"):
        ours, published = (load_settings(each).model_dump() for each in (name, f"{name}-published"))
        different = {
            f"{section}.{key}"
            for section in ("data", "clip", "model", "training", "evaluation")
            for key in ours[section]
            if ours[section][key] != published[section][key]
        }
        assert different == {
            "clip.normalisation",
            "model.conditioning",
            "model.rat_scope",
            "model.unused_shortcuts",
            "training.real_resize",
            "training.mismatch",
            "training.resume",
            "evaluation.inception_range",
            "evaluation.last_batch",
            "evaluation.clip_score_normalisation",
        }


def test_extends_lays_a_file_over_its_parent_section_by_section(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: smoke\nmodel: {hidden_size: 16}\n")
    mine, smoke = load_settings(path), load_settings("smoke")
    assert mine.model.hidden_size == 16
    assert mine.model == smoke.model.model_copy(update={"hidden_size": 16})
    assert mine.training == smoke.training
    assert mine.profile == "mine"  # not its parent's, or both would share a folder


def test_extends_finds_a_file_beside_the_one_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "base.yaml").write_text("extends: smoke\nseed: 5\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nmodel: {hidden_size: 16}\n")
    monkeypatch.chdir("/")
    assert load_settings(tmp_path / "mine.yaml").seed == 5


def test_profiles_that_extend_one_another_are_refused(tmp_path):
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{one}.yaml").write_text(f"extends: {other}.yaml\n")
    assert "circle" in wrong({}, tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "content, said",
    [
        ("summary: süß".encode("latin-1"), r"is not UTF-8 \(.* at byte 10\); save it as UTF-8"),
        (b"\xff\xfes\x00", "is not UTF-8"),
        (b"seed: " + b"1" * 5000, "not readable as YAML: Exceeds the limit"),
        (b"summary: 2026-02-30", "not readable as YAML: day is out of range"),
        (b"[" * 5000, "not readable as YAML"),
        (b"summary: a\x00b", "not readable as YAML"),
    ],
)
def test_a_profile_that_cannot_be_read_is_named(tmp_path, content, said):
    (tmp_path / "mine.yaml").write_bytes(content)
    assert re.search("mine.yaml: " + said, wrong({}, tmp_path / "mine.yaml"))


@pytest.mark.parametrize("key", ["seed", "data.seed", "clip.seed", "independent.seed", "experiments.first_seed"])
def test_a_seed_is_one_that_torch_takes(key):
    load_settings("smoke", {key: 2**63 - 1})
    for seed in (2**63, 12345678901234567890123456789, -1):
        assert f"{key}={seed}: input should be " in wrong({key: seed})


def test_an_unknown_profile_names_the_nearest_and_all():
    message = wrong({}, "smok")
    assert "did you mean 'smoke'?" in message
    assert all(name in message for name in profile_names())


def test_a_profile_file_that_is_not_there_is_named():
    assert "absent.yaml: no such profile file" in wrong({}, "absent.yaml")


@pytest.mark.parametrize(
    "text, said",
    [
        ("model: {hidden_size: 16\n", "not readable as YAML"),
        ("- a list\n", "should be a mapping"),
        ("", "should be a mapping"),
        ("data: {dataset: birds, resize: 32, crop: 32}\ntraining: {steps: 5}\n", "clip: missing"),
        ("extends: smoke\nclip:\n", "clip=None"),
    ],
)
def test_a_bad_profile_file_is_named_with_what_is_wrong(tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    message = wrong({}, path)
    assert said in message and str(path) in message


# --------------------------------------------------------------------------------------- values and types


@pytest.mark.parametrize(
    "field, near",
    [
        ("model.hiden_size", "hidden_size"),
        ("training.step", "steps"),
        ("trainig", "training"),
        ("clip.layer", "layers"),
    ],
)
def test_an_unknown_setting_comes_with_a_suggestion(field, near):
    message = wrong({field: 1})
    assert field in message and f"did you mean {near!r}?" in message


@pytest.mark.parametrize(
    "field, value",
    [
        ("seed", -1),
        ("seed", "one"),
        ("seed", 1.5),
        ("data.dataset", "cats"),
        ("data.resize", 8),
        ("data.flip", "perhaps"),
        ("clip.layers", 1),
        ("clip.lr", 0),
        ("clip.lr", 2),
        ("clip.batch_size", 1),
        ("clip.context_length", 4),
        ("clip.normalisation", "twice"),
        ("model.conditioning", "lstm"),
        ("model.hidden_size", -1),
        ("model.attention", "self"),
        ("model.prompt_blocks", [-1]),
        ("model.prompt_blocks", 3),
        ("model.bridge_scale", float("nan")),
        ("training.steps", 0),
        ("training.lr_g", 0),
        ("training.betas", [0.0, 1.0]),
        ("training.betas", [0.0]),
        ("training.ema", 1.0),
        ("training.similarity_weight", -1),
        ("training.penalty_power", float("inf")),
        ("training.precision", "8"),
        ("evaluation.images", 0),
        ("model", 3),
    ],
)
def test_a_value_out_of_range_or_of_another_type_is_named(field, value):
    message = wrong({field: value})
    assert re.search(rf"^  {re.escape(field)}", message, re.MULTILINE), message
    assert message.startswith("profile smoke: 1 setting(s) wrong")


def test_all_wrong_settings_are_listed_at_once():
    message = wrong({"seed": -1, "model.hiden_size": 3, "training.lr_g": 9, "data.resize": "big"})
    assert "4 setting(s) wrong" in message
    assert all(field in message for field in ("seed=-1", "model.hiden_size", "training.lr_g=9", "data.resize='big'"))


@pytest.mark.parametrize(
    "overrides, said",
    [
        ({"data.crop": 17}, "crop=17 is larger than resize=16"),
        ({"data.flip": True}, "flip=true"),
        ({"clip.source": "file"}, "source=file needs path"),
        ({"clip.width": 36}, "multiple of 8 = 4 x heads"),
        ({"clip.text_width": 33}, "text_width=33 must be a multiple"),
        ({"model.feature_blocks": []}, "feature_blocks is empty"),
        ({"model.feature_blocks": [0, 0]}, "names a block twice"),
        ({"model.feature_blocks": [0, 3]}, "blocks 0 to 2"),
        ({"model.prompt_blocks": [3]}, "blocks 0 to 2"),
        ({"model.conditioning": "rat-official"}, "set rat_scope: mapper"),
        (
            {"model.conditioning": "rat-official", "model.rat_scope": "mapper", "model.rat_input": "scaled"},
            "set rat_input: state",
        ),
        ({"model.base_channels": 12}, "base_channels=12 must be a multiple of 8"),
        ({"model.code_channels": 7, "model.attention": "none"}, "must be even"),
        ({"model.image_size": 18}, "the patch must divide"),
        ({"model.image_size": 256, "data.resize": 256}, "grid of 4 to 32"),
        ({"training.batch_size": 1, "training.mismatch": "roll"}, "batch_size=1 has no other sentence"),
        ({"training.batch_size": 1, "training.mismatch": "similar"}, "batch_size=1 has no other sentence"),
        ({"training.steps": 5, "training.epochs": 2}, "exactly one"),
    ],
)
def test_an_impossible_combination_says_why(overrides, said):
    assert said in wrong(overrides)


def test_a_budget_is_steps_or_epochs_and_the_override_decides():
    by_epochs = load_settings("smoke", {"training.epochs": 3})
    assert (by_epochs.training.steps, by_epochs.training.epochs) == (None, 3)
    by_steps = load_settings("cub", {"training.steps": 3})
    assert (by_steps.training.steps, by_steps.training.epochs) == (3, None)
    content = yaml.safe_load(load_settings("smoke").to_yaml())
    content["training"]["steps"] = None
    with pytest.raises(ValueError, match="exactly one"):
        type(by_steps).model_validate(content)


def test_dotted_overrides_reach_their_field_and_none_changes_nothing():
    settings = load_settings(
        "smoke", {"model.hidden_size": 16, "seed": 3, "training.lr_g": "1e-3", "model.attention": None}
    )
    assert (settings.model.hidden_size, settings.seed, settings.training.lr_g) == (16, 3, 1e-3)
    assert settings.model.attention == load_settings("smoke").model.attention


def test_settings_cannot_be_changed_after_they_were_checked():
    with pytest.raises(ValueError):
        load_settings("smoke").training.steps = 5


def test_merge_leaves_its_arguments_as_they_were():
    base, over = {"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"x": 5}}
    assert merge(base, over) == {"a": {"x": 5, "y": 2}, "b": 3}
    assert base == {"a": {"x": 1, "y": 2}, "b": 3} and over == {"a": {"x": 5}}


@pytest.mark.parametrize(
    "overrides, variant",
    [
        ({}, "rat-h8-shuffle"),
        ({"model.hidden_size": 0}, "cat-shuffle"),
        ({"model.conditioning": "cat"}, "cat-shuffle"),
        ({"model.rat_scope": "mapper"}, "rat-mapper-h8-shuffle"),
        ({"model.rat_input": "scaled"}, "rat-scaled-h8-shuffle"),
        ({"model.rat_scope": "mapper", "model.rat_input": "scaled"}, "rat-mapper-scaled-h8-shuffle"),
        ({"model.rat_input": "state-latent-sentence"}, "rat-state-latent-sentence-h8-shuffle"),
        ({"model.conditioning": "cat", "model.rat_input": "scaled"}, "cat-shuffle"),
        ({"model.attention": "norm"}, "rat-h8-norm"),
        ({"model.conditioning": "rat-official", "model.rat_scope": "mapper"}, "rat-official-h8-shuffle"),
    ],
)
def test_the_run_is_named_by_its_arm_seed_and_identity(overrides, variant):
    settings = load_settings("smoke", {**overrides, "seed": 4})
    assert settings.run_name == f"{variant}-seed4-{settings.run_hash}"


# ------------------------------------------------------------------------------------------- identities


ALL_FIELDS = fields(load_settings("smoke"))


def test_the_list_of_fields_is_complete():
    assert {"seed", "data.tiny", "clip.embed_dim", "model.d_channels", "training.mismatch"} <= set(ALL_FIELDS)
    assert len(ALL_FIELDS) > 55


@pytest.mark.parametrize("field", ALL_FIELDS)
def test_the_run_changes_with_every_setting_but_those_that_leave_its_weights(base, field):
    other = changed(base, field)
    assert other != base
    kept = field in LOGGING | LABELS or field.startswith(("evaluation.", "independent.", "experiments."))
    assert (other.run_hash == base.run_hash) == kept


def moved_by(base, identity: str, leave: set = frozenset()) -> set[str]:
    """The fields whose change changes that identity."""
    return {
        field
        for field in ALL_FIELDS
        if field not in leave and getattr(changed(base, field), identity) != getattr(base, identity)
    }


@pytest.mark.parametrize(
    "dataset, used",
    [
        ("birds", set()),
        ("flowers", {"human_captions_only"}),
        ("faces", {"tiny"}),
        ("synthetic", {"train_images", "test_images", "validation_images", "seed", "named"}),
        ("scenes", {"train_images", "test_images", "validation_images", "seed", "scenes"}),
    ],
)
def test_the_prepared_data_change_with_what_is_stored_and_nothing_else(dataset, used):
    base = load_settings(
        "smoke", {"data.dataset": dataset, "clip.path": "here.pt", "independent.path": "other.pt", **STORED_LARGER}
    )
    moved = moved_by(base, "data_hash", leave={"data.flip"} if base.data.generated else set())
    assert moved == {f"data.{name}" for name in ("dataset", "resize", *used)}


CLIP_FIELDS = {field for field in ALL_FIELDS if field.startswith("clip.")}
STORED = {"data.dataset", "data.resize"}


@pytest.mark.parametrize(
    "source, depends",
    [
        (
            "train",
            CLIP_FIELDS - {"clip.model", "clip.pretrained", "clip.path", "clip.normalisation"}
            | STORED
            | {"data.crop", "data.flip", "model.image_size"},
        ),
        ("pretrained", {"clip.source", "clip.model", "clip.pretrained"} | STORED),
        ("file", {"clip.source", "clip.model", "clip.path"} | STORED),
    ],
)
def test_the_clip_changes_with_what_it_is_made_of_and_nothing_else(source, depends):
    base = load_settings(
        "smoke",
        {
            "data.dataset": "birds",
            "clip.source": source,
            "clip.path": "here.pt",
            "independent.path": "other.pt",
            **STORED_LARGER,
        },
    )
    assert moved_by(base, "clip_hash") == depends


def test_the_judge_changes_with_what_it_is_trained_on_and_nothing_else():
    base = load_settings("smoke", {"clip.path": "here.pt", "independent.path": "other.pt", **STORED_LARGER})
    assert moved_by(base, "judge_hash", leave={"data.dataset", "data.flip"}) == {
        "data.resize",
        "data.crop",
        "data.train_images",
        "data.test_images",
        "data.validation_images",
        "data.named",
        "data.seed",
        "model.image_size",
        "evaluation.judge_steps",
    }


def test_runs_of_before_a_setting_was_there_keep_their_names():
    """Hashes as they were before `rat_input` and `discriminator_tower`; without an LSTM, what RAT reads is nothing."""
    names = {"cub": "rat-h64-shuffle-seed0-349baf47", "cub-published": "rat-official-h64-shuffle-seed0-9fed934c"}
    assert {name: load_settings(name).run_name for name in names} == names
    cat = [load_settings("smoke", {"model.hidden_size": 0, "model.rat_input": each}) for each in ("state", "scaled")]
    assert cat[0].run_hash == cat[1].run_hash


def test_identities_do_not_collide_over_a_sweep():
    grid = itertools.product((0, 8, 16), ("shuffle", "none", "norm"), range(3))
    runs = [load_settings("smoke", {"model.hidden_size": h, "model.attention": a, "seed": s}) for h, a, s in grid]
    assert len({run.run_hash for run in runs}) == len({run.run_name for run in runs}) == len(runs)
    assert len({run.clip_hash for run in runs}) == 1  # one CLIP for all variants


def test_no_profile_names_a_path_of_a_machine():
    for name in profile_names():
        assert load_settings(name).clip.path is None
        assert not re.search(r"(^|\s)/\w", load_settings(name).to_yaml())
