"""Published and measured tables (`ratlip.report.tables`): whose each row is, and what the writers write."""

import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from ratlip.errors import RunError
from ratlip.report import tables
from ratlip.settings import load_settings
from ratlip.studies import grid

LABELS = {
    "clip_similarity": "CLIP similarity (small CLIP aa, trained with)",
    "frechet_distance": "FD (small CLIP bb)",
    "independent_similarity": "CLIP similarity (small CLIP bb, independent)",
}


def write_run(folder, seed: int, similarity: float) -> None:
    """What a complete run leaves, as far as tables read it."""
    folder.mkdir(parents=True)
    (folder / "provenance.json").write_text(
        json.dumps({"steps": 8, "training_seconds": 2.0, "generator_parameters": 1_000_000})
    )
    (folder / "scores.json").write_text(
        json.dumps(
            {
                "seed": seed,
                "images": 48,
                "extractor": "small CLIP bb",
                "labels": LABELS,
                "clip_similarity": 0.9,
                "independent_similarity": similarity,
                "frechet_distance": 2.0,
                "kernel_distance": 0.5,
                "real": {"independent_similarity": 0.75, "frechet_distance": 0.5},
            }
        )
    )


@pytest.fixture
def workspace(tmp_path):
    """A workspace with runs of CAT (two seeds) and RAT + SA (one seed)."""
    two = load_settings("smoke", {"experiments.seeds": 2, "experiments.versus_seeds": 2})
    workspace = SimpleNamespace(settings=two, root=tmp_path)
    for run in grid.plan(workspace.settings, "ablation"):
        if run.label == "CAT" or (run.label, run.seed) == ("RAT + SA", 0):
            write_run(run.folder(tmp_path), run.seed, 0.5 + 0.1 * run.seed)
    return workspace


class TestPublished:
    def test_numbers_are_those_of_the_paper(self):
        rows = tables.published_rows().set_index(["score", "model", "data"])["value"]
        assert len(rows) == 20
        assert rows["FID", "RATLIP", "CUB"] == 13.28 and rows["FID", "GALIP", "CUB"] == 10.00
        assert rows["CLIP score", "RATLIP", "Oxford"] == 31.94 and rows["CLIP score", "RATLIP", "CelebA-tiny"] == 28.91
        assert rows["CLIP score", "AttnGAN", "Oxford"] == 21.15 and ("FID", "RATLIP", "Oxford") not in rows

    def test_best_is_the_lowest_fid_and_the_highest_clip_score(self):
        fid, clip = (tables.published_table(name).view.set_index("model") for name in ("FID", "CLIP score"))
        assert fid.loc["GALIP", "CUB"] == "10.00 (best)" and fid.loc["RATLIP", "CUB"] == "13.28"
        assert fid.loc["LAFITE", "CelebA-tiny"] == "-" and fid.loc["RATLIP", "CelebA-tiny"] == "81.48 (best)"
        assert clip.loc["RATLIP"].str.endswith("(best)").all() and list(clip) == ["CUB", "Oxford", "CelebA-tiny"]

    def test_notes_say_what_the_authors_do_not(self):
        notes = " ".join(tables.published_table("FID").notes)
        assert "GALIP's published FID is better" in notes and "other way round" in notes and "2405.08114" in notes


class TestMeasured:
    def test_a_row_says_whose_which_data_extractor_images_and_seeds(self, workspace):
        rows = tables.measured_rows(workspace, "ablation").set_index(["model", "score"])
        cat = rows.loc["CAT", "independent_similarity"]
        assert (cat["whose"], cat["data"], cat["extractor"]) == (
            "measured here",
            "generated set, 16 px",
            "small CLIP bb, independent",
        )
        assert (cat["images"], cat["seeds"], cat["steps"]) == (48, 2, 8)
        assert cat["mean"] == pytest.approx(0.55) and cat["sd"] == pytest.approx(np.std([0.5, 0.6], ddof=1))
        assert rows.loc["real images", "independent_similarity"]["mean"] == 0.75
        assert ("real images", "clip_similarity") not in rows.index

    def test_one_seed_has_no_spread(self, workspace):
        view = tables.measured_table(workspace, "ablation").view.set_index("model")
        assert view.loc["CAT", "CLIP similarity [1]"] == "0.55 ± 0.07"
        assert view.loc["RAT + SA", "CLIP similarity [1]"] == "0.50" and view.loc["RAT + SA", "seeds"] == "1"
        assert view.loc["real images", "CLIP similarity [2]"] == "-"

    def test_two_scores_of_one_name_stay_apart(self, workspace):
        table = tables.measured_table(workspace, "ablation")
        assert {"CLIP similarity [1]", "CLIP similarity [2]", "FD [3]"} <= set(table.view)
        assert "[2] small CLIP aa, trained with; [3] small CLIP bb." in table.notes[0]

    def test_no_run_says_how_to_make_one(self, workspace):
        assert list(tables.found_groups(workspace)) == ["ablation", "sweep", "versus"]  # RAT + SA is in all of them
        with pytest.raises(RunError, match="ratlip grid --profile smoke --run"):
            tables.found_groups(SimpleNamespace(settings=workspace.settings, root=workspace.root / "none"))
        with pytest.raises(RunError, match="--group versus --run"):
            tables.measured_table(SimpleNamespace(settings=workspace.settings, root=workspace.root / "none"), "versus")


class TestSideBySide:
    def test_two_blocks_that_share_no_row(self, workspace):
        table = tables.side_by_side(workspace)
        owner = list(table.view["whose"])
        assert owner == sorted(owner, reverse=True) and set(owner) == {"published by the authors", "measured here"}
        mine = table.view[table.view["whose"] == "measured here"]
        assert set(mine["score"]) == {"CLIP similarity", "FD"}  # the kinds that the authors publish
        assert set(mine["model"]) == {"CAT", "RAT + SA"} and set(mine["images"]) == {"48"}
        assert not set(mine["extractor"]) & set(table.view["extractor"][table.view["whose"] != "measured here"])
        assert not set(mine["data"]) & {"CUB", "Oxford", "CelebA-tiny"}

    def test_without_runs_only_the_published_block(self, workspace):
        table = tables.side_by_side(SimpleNamespace(settings=workspace.settings, root=workspace.root / "none"))
        assert len(table.view) == 20 and set(table.view["whose"]) == {"published by the authors"}


class TestWriters:
    NASTY = tables.Table(
        "t_1",
        "50 % of a_b & c",
        pd.DataFrame({"n_1": [1.25, np.nan], "who|what": ["a|b", 'ü, "q"']}),
        pd.DataFrame({"n_1": ["1.25 ± 0.10", "-"], "who|what": ["a|b #1", "{x}^2 ~ $y \\ é"]}),
        ["a note with 10 % & <tags>"],
    )

    def test_csv_comes_back(self, tmp_path):
        tables.write(self.NASTY, tmp_path)
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "t_1.csv"), self.NASTY.data)
        published = tables.published_table("FID")
        text = tables.write(published, tmp_path) and (tmp_path / "published_fid.csv").read_text()
        pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(text)), published.data)

    def test_what_the_page_reads_is_what_is_printed(self, tmp_path):
        tables.write(self.NASTY, tmp_path)
        again = json.loads((tmp_path / "t_1.json").read_text())
        assert again["caption"] == self.NASTY.caption and again["notes"] == self.NASTY.notes
        pd.testing.assert_frame_equal(pd.DataFrame(again["data"], columns=again["columns"]), self.NASTY.view)

    def test_markdown_has_a_line_for_every_row_and_no_bare_separator(self):
        lines = tables.markdown(self.NASTY).splitlines()
        assert lines[0] == "**50 % of a_b & c**" and lines[-1] == "- a note with 10 % & <tags>"
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
        cells = [[cell.strip().replace(r"\|", "|").replace(r"\$", "$") for cell in row] for row in rows]
        assert cells == [list(self.NASTY.view.columns), ["---", "---"], *self.NASTY.view.to_numpy().tolist()]

    @pytest.mark.parametrize(
        "table",
        [NASTY, tables.published_table("FID"), tables.published_table("CLIP score")],
        ids=lambda table: table.name,
    )
    def test_latex_has_even_rows_and_no_bare_command(self, table):
        text = tables.latex(table)
        body = text[text.index("\\toprule") : text.index("\\bottomrule")]
        rows = [line for line in body.splitlines() if line.endswith("\\\\")]
        assert len(rows) == 1 + len(table.view)
        columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)[1]
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(columns)} == {table.view.shape[1]}
        plain = re.sub(r"\\[%&_#${}]|\$\\(pm|times|geq|leq)\$", "", text.split("\n", 1)[1])
        assert not re.search(r"[%#~^_]", re.sub(r"\\label\{.*?\}", "", plain))
        assert plain.count("$") == 0 and plain.count("{") == plain.count("}")
        assert text.count("\\begin{") == text.count("\\end{") == 2

    def test_many_columns_are_shrunk_to_the_line(self):
        wide = pd.DataFrame({f"c{i}": ["1"] for i in range(9)})
        text = tables.latex(tables.Table("w", "c", wide, wide))
        assert text.index("\\resizebox") < text.index("\\begin{tabular}") and "\\end{tabular}}\n" in text

    def test_no_folder_no_file(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert tables.write(self.NASTY, None) is self.NASTY and not list(tmp_path.iterdir())


def test_study_table_keeps_standard_rows_first_and_all_digits_short():
    row = {
        "aspect": "images",
        "variant": "24 images",
        "images": 24,
        "value": 1234.5678,
        "label": "FD (x)",
        "real": None,
        "mean": 0.01234,
        "spread": 0.00056,
        "parts": 4,
    }
    table = tables.study_table(
        [row, {"aspect": "crops", "variant": "centre", "images": 48, "value": 8.8, "label": "FD (x)", "real": 0.355}],
        "CAT",
    )
    assert table.view.loc[0, "distance"] == "1235" and table.view.loc[0, "real images"] == "-"
    assert table.view.loc[0, "mean ± sd of parts"] == "0.012 ± 0.001 (4 parts)"
    assert table.view.loc[1, "mean ± sd of parts"] == "-" and set(table.view["whose"]) == {"measured here"}
