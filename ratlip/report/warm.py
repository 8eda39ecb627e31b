"""Processes that import nothing: forks of a server that has imported what the notebooks need, and has done no more.

The notebook of a run spends ten seconds on starting two programs that import the same libraries: papermill, and the
kernel in which the cells run. Here both are forks of one server, which the workflow (Snakefile) or `ratlip grid --run`
starts and ends. Each fork is a process of its own, so that nothing goes over from one run to the next. To whoever
started it, it looks like any program: `python ratlip/report/warm.py WORDS` hands its terminal, folder and environment
over, waits, and ends with the fork's exit status; when it is killed, the fork is killed. Where no server answers, it
does the work itself: a job of a cluster, another number of threads than the server's, a system that is not Linux.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import gc
import io
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

ADDRESS = "RATLIP_WARM"  # the environment variable that holds the server's socket
THREADS = "OMP_NUM_THREADS"  # libraries read it when they are loaded, so a fork has the server's
# What is imported where it is needed, beside what the notebooks name.
LATE = """
    ratlip papermill nbformat ipykernel.kernelapp ipykernel.pylab.backend_inline matplotlib.pyplot
    matplotlib_inline.backend_inline
    datasets lightning_fabric torch.utils.tensorboard torch_fidelity scipy.linalg safetensors.torch filelock
    ratlip.cli ratlip.report.notebooks ratlip.scores.evaluation ratlip.training.loop ratlip.clip.small
"""


def main(words: list[str]) -> int:
    """Run `ratlip WORDS`, or the IPython kernel of `kernel -f FILE`, in a fork of the server or here: exit status."""
    found = _ask(words)
    return _work(words) if found is None else found


def _ask(words: list[str]) -> int | None:
    """The exit status of the work in a fork of the server; None where no server takes it."""
    parent = os.getppid()
    if not (address := os.environ.get(ADDRESS)):
        return None
    with socket.socket(socket.AF_UNIX) as line:
        try:
            line.connect(address)
            message = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
            socket.send_fds(line, [len(message).to_bytes(8, "big")], [0, 1, 2])
            line.sendall(message)
            if not (fork := int.from_bytes(line.recv(8), "big")):
                return None
        except OSError:
            return None
        signal.signal(signal.SIGINT, lambda *_: os.kill(fork, signal.SIGINT))
        line.settimeout(1)
        while os.getppid() == parent:  # else nobody waits for this any more
            try:
                if status := line.recv(1):
                    return status[0]
                break
            except TimeoutError:
                continue
            except OSError:
                break
    print(f"ratlip: {' '.join(words[:3])} ... was killed", file=sys.stderr)
    return 1


def _work(words: list[str]) -> int:
    """The work itself, in this process: its exit status."""
    try:
        kernel = words[0] == "kernel"
        sys.argv = ["ipykernel_launcher", *words[1:]] if kernel else ["ratlip", *words]
        module, function = ("ipykernel.kernelapp", "launch_new_instance") if kernel else ("ratlip.cli", "main")
        getattr(import_module(module), function)()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


@contextlib.contextmanager
def server(**environment: str) -> Iterator[int | None]:
    """A server while the block runs, named in `os.environ`: its process id. `environment`: variables of its own.

    None is started where one is there, or where the system has no fork that is safe after these imports.
    """
    if sys.platform != "linux" or os.environ.get(ADDRESS):
        yield None
        return
    folder = tempfile.mkdtemp(prefix="ratlip-")
    address = os.path.join(folder, "warm")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)  # who asks before all is imported, waits
        command, own = [sys.executable, __file__, "serve", str(listening.fileno())], {**os.environ, **environment}
        kept, pipe = [listening.fileno()], subprocess.PIPE
        process = subprocess.Popen(command, env=own, pass_fds=kept, stdin=pipe, start_new_session=True)
    os.environ[ADDRESS] = address
    try:
        yield process.pid
    finally:
        del os.environ[ADDRESS]
        process.kill()  # its forks go on; it ends, too, when this process is killed: see `serve`
        process.communicate()
        shutil.rmtree(folder, ignore_errors=True)


def serve(listening: socket.socket) -> None:
    """Import, then fork for each that asks, until stdin ends."""
    for name in [*LATE.split(), *_imports()]:
        with contextlib.suppress(ImportError):
            import_module(name)
    figure = import_module("matplotlib.figure").Figure()  # the first one loads fonts, and what writes pictures
    figure.suptitle("first")
    figure.savefig(io.BytesIO())
    gc.collect()
    gc.freeze()  # a fork need not copy what is never collected
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    while listening in select.select([listening, sys.stdin], [], [])[0]:
        line = listening.accept()[0]
        if os.fork() == 0:
            listening.close()
            _answer(line)
        line.close()


def _imports() -> list[str]:
    """The modules that the notebooks import, and what may be one."""
    names: list[str] = []
    for path in sorted((Path(__file__).parents[2] / "notebooks").glob("[0-9]*.ipynb")):
        cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
        code = [line for cell in cells for line in [*cell["source"], "\n"] if not line.startswith(("%", "!"))]
        for found in ast.parse("".join(code)).body:
            if isinstance(found, ast.Import):
                names += [each.name for each in found.names]
            elif isinstance(found, ast.ImportFrom):
                names += [found.module or "", *(f"{found.module}.{each.name}" for each in found.names)]
    return names


def _answer(line: socket.socket) -> None:
    """In a fork: take the place of the process at the other end of `line`, do its work, send the exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, files, _, _ = socket.recv_fds(line, 8, 3)
    with line.makefile("rb") as text:
        words, folder, environment = json.loads(text.read(int.from_bytes(size, "big")))
    if environment.get(THREADS) != os.environ.get(THREADS):
        line.sendall(bytes(8))
        os._exit(0)
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    line.sendall(os.getpid().to_bytes(8, "big"))
    threading.Thread(target=_end_with, args=(line,), daemon=True).start()
    status = _work(words)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    line.sendall(bytes([status & 255]))
    os._exit(0)


def _end_with(line: socket.socket) -> None:
    """Kill this process and what it started as soon as the process at the other end is gone."""
    line.recv(1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])  # where ratlip is; this file's folder would hide other modules
    if sys.argv[1:2] == ["serve"]:
        serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        sys.exit(main(sys.argv[1:]))
