"""The notebooks as programs: what they call first, how they are run, how their stored outputs are kept true.

    python -m ratlip.report.notebooks run notebooks/03_train.ipynb --out out.ipynb -p profile smoke
    python -m ratlip.report.notebooks refresh     stored outputs: from reports/demo/notebooks/ back into notebooks/

Everything a notebook writes goes below the repository root (outputs/<profile>, or $RATLIP_OUTPUTS/<profile>),
from whatever folder it was started.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import yaml

from ratlip.errors import RatlipError, RunError
from ratlip.files import repository, shown, write_text

STORY = (
    "01_prepare_data",
    "02_prepare_clip",
    "03_train",
    "04_ablation",
    "05_hidden_size_sweep",
    "06_grad_cam",
    "07_paper_versus_code",
    "08_figures_and_tables",
)
HEARTBEAT = 60  # seconds between two lines on a notebook that is still running
LOCAL = ("profile", "data", "outputs", "report")  # parameters that say where, not what


# ------------------------------------------------------------------------------------- what a notebook calls


# ---------------------------------------------------------------------------------------------- execution


def execute(notebook: str | Path, out: str | Path, parameters: dict[str, Any], talk: bool = True) -> Path:
    """Execute a notebook by papermill with `parameters` and write it to `out`, tidied, whole or not at all.

    A line at the start, one a minute, and one at the end. On an error, the notebook as far as it came is left
    beside `out` as <name>.failed.ipynb, and RunError holds the cell and the error.
    """
    import nbformat  # here and below: a second of imports that a kernel need not wait for
    import papermill
    from papermill.exceptions import PapermillExecutionError

    notebook, out = Path(notebook), Path(out)
    if not notebook.is_file():
        raise RunError(
            f"{notebook}: there is no such notebook; those of the story are {', '.join(STORY)} in notebooks/"
        )
    failed = out.with_suffix(".failed.ipynb")
    parameters = {name: _absolute(name, value) for name, value in parameters.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    failed.unlink(missing_ok=True)
    hide = _private(parameters)
    start = time.monotonic()
    name = out.parent.name if out.parent.parent.name == "runs" else notebook.stem  # of a grid, the run's
    say = (lambda text: print(f"{name:<22} {text}", flush=True)) if talk else (lambda text: None)
    say("started")
    with tempfile.TemporaryDirectory(prefix="ratlip-") as folder:
        draft = Path(folder) / notebook.name
        done = threading.Event()
        heart = threading.Thread(target=_beat, args=(draft, done, say, start), daemon=True)
        heart.start()
        try:
            papermill.execute_notebook(
                str(notebook),
                str(draft),
                parameters=parameters,
                progress_bar=False,
                cwd=str(repository() / "notebooks"),
                autosave_cell_every=15,
                extra_arguments=["--IPKernelApp.log_level=ERROR"],
            )
        except PapermillExecutionError as error:
            nbformat.write(tidy(nbformat.read(draft, 4), hide), failed)
            raise RunError(_failure(notebook, failed, error)) from None
        finally:
            done.set()
            heart.join()
        finished = tidy(nbformat.read(draft, 4), hide)
        finished.metadata["ratlip"]["seconds"] = round(time.monotonic() - start)
    write_text(out, nbformat.writes(finished) + "\n")
    say(f"done in {_clock(start)}: {shown(out)}")
    return out


def _absolute(name: str, value: Any) -> Any:
    """The kernel works in notebooks/; a path that was given means the caller's folder."""
    path = name == "data" or name == "profile" and str(value).endswith((".yaml", ".yml"))
    return str(Path(value).expanduser().absolute()) if path and value else value


def _clock(start: float) -> str:
    minutes, seconds = divmod(int(time.monotonic() - start), 60)
    return f"{minutes}:{seconds:02d}"


def _beat(draft: Path, done: threading.Event, say, start: float) -> None:
    """Once a minute, the last line that the running cell has printed: in a long cell, its progress bar."""
    import nbformat

    while not done.wait(HEARTBEAT):
        try:
            cells = [cell for cell in nbformat.read(draft, 4).cells if cell.cell_type == "code"]
        except (OSError, ValueError, nbformat.reader.NotJSONError):
            continue  # being written at this moment
        running = [i for i, cell in enumerate(cells) if cell.metadata.get("papermill", {}).get("status") == "running"]
        printed = [o.text for i in running for o in cells[i].outputs if o.output_type == "stream" and o.text.strip()]
        last = _last_states(printed[-1]).strip().splitlines()[-1][:100] if printed else ""
        say(f"{_clock(start)}, cell {running[0] + 1 if running else '?'} of {len(cells)}  {last}")


def _failure(notebook: Path, failed: Path, error) -> str:
    cell = "\n".join(f"    {line}" for line in error.source.strip().splitlines())
    mend = error.ename in {kind.__name__ for kind in (RatlipError, *RatlipError.__subclasses__())}
    trace = "" if mend else re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback[-1:]))
    return (
        f"{notebook.stem} stopped at the cell\n{cell}\n{trace or f'{error.ename}: {error.evalue}'}\n"
        f"The notebook as far as it came: {shown(failed)}"
    )


# ------------------------------------------------------------------------------------------- stored outputs


def tidy(notebook, hide: dict[str, str] | None = None):
    """Make an executed notebook fit to be kept, in place.

    No papermill records, no paths of this machine (`hide`), progress bars in their last state, no widgets,
    outputs of one stream in one piece; and a digest of the code that ran.
    """
    notebook.metadata.pop("papermill", None)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        for key in ("papermill", "execution", "collapsed", "scrolled"):
            cell.metadata.pop(key, None)
        if cell.metadata.get("tags") == []:
            cell.metadata.pop("tags")
        if cell.cell_type != "code":
            continue
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.id, cell.source = "injected", _masked(cell.source, hide)
        merged = []
        for output in cell.outputs:
            if output.output_type == "stream" and merged and merged[-1].get("name") == output.name:
                merged[-1].text += output.text
            else:
                merged.append(output)
        cell.outputs = [_tidy_output(output, hide) for output in merged]
    notebook.metadata["ratlip"] = {"code_sha256": code_digest(notebook)}
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    notebook.metadata["kernelspec"], notebook.metadata["language_info"] = kernel, {"name": "python"}
    return notebook


def _tidy_output(output, hide):
    if output.output_type == "stream":
        output.text = _masked(_last_states(output.text), hide)
    for kind, value in output.get("data", {}).items():
        if kind.startswith("text/") and isinstance(value, str):
            output.data[kind] = _masked(value, hide)
    return output


def _last_states(text: str) -> str:
    """What a terminal would show: of the states of a line that were parted by carriage returns, the last."""
    lines = text.replace("\r\n", "\n").split("\n")
    return "\n".join(([part for part in line.split("\r") if part.strip()] or [""])[-1] for line in lines)


def _private(parameters: dict[str, Any]) -> dict[str, str]:
    """Folders of this machine, each with what stands for it in a stored notebook; the longest first."""
    places = {
        str(repository()) + "/": "",
        str(repository()): ".",
        str(Path.home()): "~",
        **{str(parameters[name]): f"<{name}>" for name in ("data", "outputs") if parameters.get(name)},
        os.environ.get("RATLIP_OUTPUTS", ""): "<outputs>",
        f"{Path(parameters.get('profile', '')).parent}/": "",
    }
    absolute = [place for place in places if place.startswith("/") and place != "/"]
    return {place: places[place] for place in sorted(absolute, key=len, reverse=True)}


def _masked(text: str, hide: dict[str, str] | None) -> str:
    for place, name in (hide or {}).items():
        end = "" if place.endswith("/") else r"(?![\w.-])"  # a folder, not the beginning of another one's name
        text = re.sub(re.escape(place) + end, name, text)
    return text


def own_cells(notebook) -> list:
    """All cells but the one that papermill put in."""
    return [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]


def code_digest(notebook) -> str:
    """SHA-256 of the code of a notebook, papermill's cell left out: which code made these outputs."""
    sources = [cell.source for cell in own_cells(notebook) if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def injected(notebook) -> dict[str, Any]:
    """The parameters that papermill put in."""
    cells = [cell for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    return {line.targets[0].id: ast.literal_eval(line.value) for cell in cells for line in ast.parse(cell.source).body}


def refresh(profile: str = "demo") -> list[Path]:
    """Bring the outputs of `make reproduce` (reports/<profile>/notebooks/) back into notebooks/.

    Refuses (RunError) where an executed notebook is missing, has other text than the one in notebooks/, or
    was run with other parameters than those that it holds itself.
    """
    import nbformat

    fresh = {}
    for name in STORY:
        stored = repository() / "notebooks" / f"{name}.ipynb"
        made = repository() / "reports" / Path(profile).stem / "notebooks" / f"{name}.ipynb"
        if not made.is_file():
            raise RunError(f"{shown(made)}: not there; run `make reproduce PROFILE={profile}` first")
        notebook, now = nbformat.read(made, 4), nbformat.read(stored, 4)
        changed = {
            key: value for key, value in injected(notebook).items() if key not in LOCAL and value not in (None, "")
        }
        if changed or injected(notebook).get("profile", profile) != profile:
            raise RunError(
                f"{shown(made)}: was run with {changed or injected(notebook)}, not as it stands in notebooks/"
            )
        if [cell.source for cell in own_cells(notebook)] != [cell.source for cell in now.cells]:
            raise RunError(f"{shown(made)}: its text is not that of {shown(stored)}; run `make reproduce` again")
        notebook.cells = own_cells(notebook)
        for number, cell in enumerate([cell for cell in notebook.cells if cell.cell_type == "code"], start=1):
            cell.execution_count = number
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = number
        fresh[stored] = notebook
    for stored, notebook in fresh.items():
        write_text(stored, nbformat.writes(notebook) + "\n")
    return list(fresh)


def main() -> None:
    """Entry point of `python -m ratlip.report.notebooks`."""
    parser = argparse.ArgumentParser(
        prog="python -m ratlip.report.notebooks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute one notebook")
    run.add_argument("notebook", type=Path)
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters")
    commands.add_parser("refresh", help="store the outputs of reports/<profile>/").add_argument(
        "--profile", default="demo"
    )
    chosen = parser.parse_args()
    try:
        if chosen.command == "run":
            given = {name: yaml.safe_load(value) for name, value in chosen.parameters if value not in ("", "None")}
            execute(chosen.notebook, chosen.out, given)
        else:
            print(*map(shown, refresh(chosen.profile)), sep="\n")
    except RatlipError as error:
        sys.exit(f"ratlip: {error}")


if __name__ == "__main__":
    main()
