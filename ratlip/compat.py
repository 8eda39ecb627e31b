"""Let torchvision be imported beside a PyTorch it was not built for: a CPU build next to a CUDA torchvision.

Pip finds both under plain version numbers, so that the pair is easily had. torchvision's compiled extension
then cannot be loaded (it wants CUDA's libraries), which torchvision itself takes calmly: all but its
detection operators is plain Python. Its import fails all the same, for it describes two of the missing
operators to PyTorch: `operator torchvision::nms does not exist`. Declaring those two, without any
implementation, lets it be imported; calling them remains an error. What needs torchvision here (open_clip,
timm, torch-fidelity, grad-cam) calls none of them.
"""

import importlib.util
import sys
from importlib import machinery
from pathlib import Path

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # a declaration lives as long as the Library that made it


def apply(package: str = "torchvision") -> bool:
    """Declare torchvision's `nms` and `qnms` where its import would fail without them.

    Call it before the first import of torchvision. Returns True where it has declared them, False where there
    was nothing to do: PyTorch with CUDA, no torchvision, a torchvision whose own extension loads, a second
    call, or another system than Linux (elsewhere pip finds only matching builds). `package` names the
    Python package and its operator namespace (another one in tests).
    """
    if sys.platform != "linux" or torch.version.cuda is not None:
        return False
    if hasattr(getattr(torch.ops, package), "nms"):
        return False
    spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
    if spec is None or _extension_loads(Path(str(spec.origin)).parent):
        return False
    library = torch.library.Library(package, "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    _libraries.append(library)
    return True


def _extension_loads(folder: Path) -> bool:
    """Load `folder`'s extension `_C` as torchvision is about to do itself, and tell whether that went well.

    Trying is the one sure test: version numbers and file names do not tell the builds apart. Where it loads,
    it has now defined `nms` (torchvision's load of the same file then does nothing, and a declaration of ours
    would clash with it). Where it does not, none of it has run.
    """
    finder = machinery.FileFinder(str(folder), (machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES))
    extension = finder.find_spec("_C")
    if extension is None:
        return False
    try:
        torch.ops.load_library(extension.origin)
    except (ImportError, OSError):
        return False
    return True
