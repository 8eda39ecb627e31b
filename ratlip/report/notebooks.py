"""The notebooks as programs: how they are run, and how their stored outputs are kept true.

Everything a notebook writes goes below the repository root (outputs/<profile>, or $RATLIP_OUTPUTS/<profile>), from
whatever folder it was started.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratlip.errors import RatlipError, RunError
from ratlip.files import repository, shown, write_text
from ratlip.report import warm

if TYPE_CHECKING:
    from nbformat import NotebookNode
    from papermill.exceptions import PapermillExecutionError

# nbformat and papermill are imported where they are used: two seconds, which no kernel of a notebook need wait for.
# The story, in its order: every notebook that has a number
STORY = tuple(sorted(p.stem for p in (Path(__file__).parents[2] / "notebooks").glob("[0-9][0-9]_*.ipynb")))
HEARTBEAT = 60  # seconds between two lines on a notebook that is still running
LOCAL = ("profile", "data", "outputs", "report")  # parameters that say where, not what


def execute(notebook: str | Path, out: str | Path, parameters: dict[str, Any], talk: bool = True) -> Path:
    """Execute a notebook by papermill with `parameters` and write it to `out`, tidied, whole or not at all.

    A line at the start, one a minute, and one at the end. On an error, the notebook as far as it came is left beside
    `out` as <name>.failed.ipynb, and RunError holds the cell and the error. RunError, too, for a notebook that does
    not exist and for a parameter that it does not have.
    """
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError

    notebook, out = Path(notebook), Path(out)
    if not notebook.is_file():
        raise RunError(f"{notebook}: there is no such notebook; notebooks/ holds {', '.join(STORY)}")
    known = papermill.inspect_notebook(str(notebook))
    if unknown := [name for name in parameters if name not in known]:  # papermill would only warn
        raise RunError(f"{notebook}: has no parameter {', '.join(unknown)}; its parameters are {', '.join(known)}")
    # The kernel works in notebooks/; a path that was given means the caller's folder
    parameters = {name: _absolute(name, value) for name, value in parameters.items()}
    failed, hide, start = out.with_suffix(".failed.ipynb"), _private(parameters), time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    failed.unlink(missing_ok=True)
    name = out.parent.name if out.parent.parent.name == "runs" else notebook.stem
    say = (lambda text: print(f"{name:<22} {text}", flush=True)) if talk else (lambda text: None)
    say("started")
    with tempfile.TemporaryDirectory(prefix="ratlip-") as folder:
        draft = Path(folder) / notebook.name
        options: dict[str, Any] = {
            "cwd": str(repository() / "notebooks"),
            "autosave_cell_every": 15,
            "progress_bar": False,
        }
        options |= {"extra_arguments": ["--IPKernelApp.log_level=ERROR"], **_warm_kernels()}
        try:
            with _heartbeat(draft, say, start):
                papermill.execute_notebook(str(notebook), str(draft), parameters=parameters, **options)
        except papermill.PapermillExecutionError as error:
            nbformat.write(tidy(nbformat.read(draft, 4), hide), failed)
            raise RunError(_failure(notebook, failed, error)) from None
        except DeadKernelError:
            raise RunError(f"{out}: the kernel of {notebook.stem} was killed; is there memory enough?") from None
        finished = tidy(nbformat.read(draft, 4), hide)
    finished.metadata["ratlip"]["seconds"] = round(time.monotonic() - start)
    write_text(out, nbformat.writes(finished) + "\n")
    say(f"done in {_clock(start)}: {shown(out)}")
    return out


def _warm_kernels() -> dict[str, Any]:
    """What papermill is told so that the kernel is a fork of the server (`ratlip.report.warm`), where there is one."""
    if warm.ADDRESS not in os.environ:
        return {}
    from jupyter_client.manager import AsyncKernelManager

    class Warm(AsyncKernelManager):
        def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
            command = super().format_kernel_cmd(extra_arguments)
            parent = f"--IPKernelApp.parent_handle={os.getpid()}"  # from the environment in a kernel that is started
            return [sys.executable, warm.__file__, "kernel", *command[command.index("-f") :], parent]

    return {"kernel_manager_class": Warm}


def _absolute(name: str, value: Any) -> Any:
    path = name == "data" or (name == "profile" and str(value).endswith((".yaml", ".yml")))
    return str(Path(value).expanduser().absolute()) if path and value else value


def _clock(start: float) -> str:
    minutes, seconds = divmod(int(time.monotonic() - start), 60)
    return f"{minutes}:{seconds:02d}"


@contextlib.contextmanager
def _heartbeat(draft: Path, say: Callable[[str], None], start: float) -> Iterator[None]:
    """Once a minute, say the last line that the running cell has printed: in a long cell, its progress bar."""
    import nbformat

    done = threading.Event()

    def watch() -> None:
        while not done.wait(HEARTBEAT):
            try:
                cells = [cell for cell in nbformat.read(draft, 4).cells if cell.cell_type == "code"]
            except (OSError, ValueError, nbformat.reader.NotJSONError):
                continue  # being written at this moment
            states = [cell.metadata.get("papermill", {}).get("status") for cell in cells]
            at = states.index("running") if "running" in states else None
            outputs = [] if at is None else [o for o in cells[at].outputs if o.output_type == "stream"]
            printed = _last_states("".join(output.text for output in outputs)).split("\n")
            last = next((line for line in reversed(printed) if line.strip()), "")[:100]
            say(f"{_clock(start)}, cell {'?' if at is None else at + 1} of {len(cells)}  {last}")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _failure(notebook: Path, failed: Path, error: PapermillExecutionError) -> str:
    cell = "\n".join(f"    {line}" for line in error.source.strip().splitlines())
    ours = {"RatlipError", *(kind.__name__ for kind in RatlipError.__subclasses__())}  # their messages say enough
    trace = "" if error.ename in ours else re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback[-1:]))
    said = trace or f"{error.ename}: {error.evalue}"
    return f"{notebook.stem} stopped at the cell\n{cell}\n{said}\nThe notebook as far as it came: {shown(failed)}"


def tidy(notebook: NotebookNode, hide: dict[str, str] | None = None) -> NotebookNode:
    """Make an executed notebook fit to be kept, in place.

    No papermill records, no paths of this machine (`hide`), progress bars in their last state, no widgets, outputs of
    one stream in one piece; and a digest of the code that ran.
    """
    for cell in notebook.cells:
        unwanted = ["papermill", "execution", "collapsed", "scrolled", *([] if cell.metadata.get("tags") else ["tags"])]
        for key in unwanted:
            cell.metadata.pop(key, None)
        if _injected(cell):
            cell.id, cell.source = "injected", _masked(cell.source, hide)
        merged: list = []
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and merged and merged[-1].get("name") == output.name:
                merged[-1].text += output.text
            else:
                merged.append(output)
        for output in merged:
            if output.output_type == "stream":
                output.text = _masked(_last_states(output.text), hide)
            for kind, value in output.get("data", {}).items():
                if kind.startswith("text/") and isinstance(value, str):
                    output.data[kind] = _masked(value, hide)
        if cell.cell_type == "code":
            cell.outputs = merged
    for key in ("papermill", "widgets"):
        notebook.metadata.pop(key, None)
    kept = {key: value for key, value in notebook.metadata.get("ratlip", {}).items() if key == "reads"}
    notebook.metadata["ratlip"] = {**kept, "code_sha256": code_digest(notebook)}
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    notebook.metadata["kernelspec"], notebook.metadata["language_info"] = kernel, {"name": "python"}
    return notebook


def _last_states(text: str) -> str:
    """What a terminal would show: of the states of a line that were parted by carriage returns, the last."""
    lines = text.replace("\r\n", "\n").split("\n")
    return "\n".join(([part for part in line.split("\r") if part.strip()] or [""])[-1] for line in lines)


def _private(parameters: dict[str, Any]) -> dict[str, str]:
    """Folders of this machine, each with what stands for it in a stored notebook; the longest first."""
    folders = {f"{repository()}/": "", str(repository()): ".", str(Path.home()): "~"}
    folders |= {str(parameters[name]): f"<{name}>" for name in ("data", "outputs") if parameters.get(name)}
    folders[os.environ.get("RATLIP_OUTPUTS", "")] = "<outputs>"
    folders[f"{Path(parameters.get('profile', '')).parent}/"] = ""
    absolute = [folder for folder in folders if folder.startswith("/") and folder != "/"]
    return {folder: folders[folder] for folder in sorted(absolute, key=len, reverse=True)}


def _masked(text: str, hide: dict[str, str] | None) -> str:
    for folder, name in (hide or {}).items():
        end = "" if folder.endswith("/") else r"(?![\w.-])"  # a folder, not the beginning of another one's name
        text = re.sub(re.escape(folder) + end, name, text)
    return text


def _injected(cell: NotebookNode) -> bool:
    return "injected-parameters" in cell.metadata.get("tags", [])


def injected(notebook: NotebookNode) -> dict[str, Any]:
    """The parameters that papermill put in."""
    lines = [line for cell in notebook.cells if _injected(cell) for line in ast.parse(cell.source).body]
    return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}


def own_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """All cells but the one that papermill put in."""
    return [cell for cell in notebook.cells if not _injected(cell)]


def code_digest(notebook: NotebookNode) -> str:
    """SHA-256 of the code of a notebook, papermill's cell left out: which code made these outputs."""
    sources = [cell.source for cell in own_cells(notebook) if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def refresh(profile: str = "demo") -> list[Path]:
    """Bring the outputs of `make reproduce` (reports/<profile>/notebooks/) back into notebooks/.

    Refuses (RunError) where an executed notebook is missing, has other text than the one in notebooks/, or was run
    with other parameters than those that it holds itself.
    """
    import nbformat

    fresh = {}
    for name in STORY:
        stored = repository() / "notebooks" / f"{name}.ipynb"
        made = repository() / "reports" / Path(profile).stem / "notebooks" / f"{name}.ipynb"
        if not made.is_file():
            raise RunError(f"{shown(made)}: not there; run `make reproduce PROFILE={profile}` first")
        notebook, now = nbformat.read(made, 4), nbformat.read(stored, 4)
        given, own = injected(notebook), own_cells(notebook)
        changed = {key: value for key, value in given.items() if key not in LOCAL and value not in (None, "")}
        if changed or given.get("profile", profile) != profile:
            raise RunError(f"{shown(made)}: was run with {changed or given}, not as it stands in notebooks/")
        if [cell.source for cell in own] != [cell.source for cell in now.cells]:
            raise RunError(f"{shown(made)}: its text is not that of {shown(stored)}; run `make reproduce` again")
        notebook.cells = own
        for number, cell in enumerate([cell for cell in own if cell.cell_type == "code"], start=1):
            for counted in [cell, *(each for each in cell.outputs if each.output_type == "execute_result")]:
                counted.execution_count = number
        fresh[stored] = notebook
    for stored, notebook in fresh.items():
        write_text(stored, nbformat.writes(notebook) + "\n")
    return list(fresh)
