"""One table of the differences between paper and published code: profiles, settings and tests agree with it."""

from pathlib import Path

import pytest

from ratlip import published
from ratlip.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["cub", "demo"])
def test_the_published_profiles_are_their_parents_with_all_differences_switched_back(name):
    laid, profile = load_settings(name, published.overrides()), load_settings(f"{name}-published")
    for section in ("data", "clip", "model", "training", "evaluation", "independent", "experiments"):
        assert getattr(laid, section) == getattr(profile, section)
    assert load_settings(f"{name}-published", {"training.batch_size": 1}).training.batch_size == 1


def test_our_defaults_are_those_of_the_table():
    content = load_settings("cub").model_dump(mode="json")
    said = [each.default.split(": ") for each in published.DIFFERENCES.values() if ": " in each.default]
    assert len(said) == 9
    for key, value in said:
        section, name = key.split(".")
        assert str(content[section][name]).lower() == value, key


def test_sections_of_the_overrides_can_be_chosen():
    assert set(published.overrides("evaluation")) == {
        f"evaluation.{name}" for name in ("inception_range", "last_batch", "clip_score_normalisation")
    }
    assert set(published.overrides("clip", "evaluation")) < set(published.overrides())


def test_settings_describe_their_difference():
    for key, value in published.overrides().items():
        section, name = key.split(".")
        text = Settings.model_fields[section].annotation.model_fields[name].description
        assert "(difference " in text and str(value).lower() in text, key


def test_the_table_as_notebook_07_prints_it():
    rows = published.rows()
    assert [list(row) for row in rows] == [list(published.COLUMNS.values())] * 12
    assert rows[6]["setting to switch it back"] == "training.batch_size: 1; training.mismatch: published"
    assert rows[10]["setting to switch it back"] == "model.unused_shortcuts: true"
    assert rows[11]["inherited from GALIP"] == "not stated"


def test_each_difference_names_a_test_that_is_there():
    tests = "\n".join(path.read_text("utf-8") for path in ROOT.glob("tests/unit/test_*.py"))
    assert [each.test for each in published.DIFFERENCES.values() if f"def {each.test}(" not in tests] == []


def test_the_readme_holds_the_table():
    text = (ROOT / "ratlip/settings/README.md").read_text("utf-8")
    table = text.partition("<!-- differences:")[2].partition("-->\n")[2].partition("\n<!-- end of differences -->")[0]
    assert table == published.markdown(), "put what ratlip.published.markdown() gives there"


def test_the_authors_numbers_are_about_the_scores_they_name():
    numbers = published.NUMBERS
    assert set(numbers["values"]) == set(numbers["scores"]) == {"FID", "CLIP score"}
    assert numbers["values"]["FID"]["RATLIP"] == {"CUB": 13.28, "CelebA-tiny": 81.48}
