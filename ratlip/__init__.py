"""ratlip: reproduction suite for RATLIP (Lin, Lu, Chen, 2024), a text-to-image GAN on a frozen CLIP."""

from ratlip import compat as _compat

_compat.apply()

__version__ = "0.1.0"


def load(run, device: str = "auto"):
    """Open a finished or half-trained run for generating: `ratlip.load(run).generate("a red star", n=8)`.

    `run` is a run folder (the one that holds `config.yaml`). See `ratlip.training.generation.Run`.
    """
    from ratlip.training.generation import Run

    return Run(run, device=device)
