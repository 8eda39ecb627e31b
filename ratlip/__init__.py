"""ratlip: reproduction suite for RATLIP (Lin, Lu, Chen, 2024), a text-to-image GAN on a frozen CLIP."""

import sys

__version__ = "0.1.0"


class _BeforeTorchvision:
    """Applies `ratlip.compat` when torchvision is first imported: torch is not loaded for `ratlip --help`."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(cls)
            from ratlip import compat

            compat.apply()
        return None


if "torchvision" not in sys.modules:
    sys.meta_path.insert(0, _BeforeTorchvision)


def load(run, device: str = "auto"):
    """Open a finished or half-trained run for generating: `ratlip.load(run).generate("a red star", n=8)`.

    `run` is a run folder (the one that holds `config.yaml`), a folder made by `ratlip export`, or `hf://owner/name`.
    See `ratlip.training.generation.Run`.
    """
    from ratlip.training.generation import Run

    return Run(run, device=device)
