"""The speed forms: the same networks and the same numbers up to rounding, in less time and memory.

One call each: `accelerate(generator, discriminator)` for the networks, `tower.accelerate_tower(visual)` for CLIP's
image tower. Each plain class has a subclass here with another `forward` and the same parameters, and these calls only
change the class of the modules: keys, checkpoints and copies stay as they are. Beside it lie memory on a CPU
(`memory`), and what a training may choose to trade (`options`).
"""

from torch import nn

from ratlip.fast.networks import FAST, FastToRGB
from ratlip.networks import Generator


def accelerate(*networks: nn.Module, on: bool = True) -> None:
    """Give every module within `networks` its fast form, in place; `on=False`: its plain one."""
    forms = FAST if on else {fast: plain for plain, fast in FAST.items()}
    for network in networks:
        for module in network.modules():
            module.__class__ = forms.get(type(module), type(module))
        if isinstance(network, Generator):  # its class alone does not tell this convolution from others
            network.to_rgb.__class__ = FastToRGB if on else nn.Conv2d
