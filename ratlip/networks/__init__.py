"""The networks as the equations are written; `ratlip.fast.accelerate` makes them fast without another number."""

from ratlip.networks.affine import ConditionalAffine, OfficialRecurrentAffine, Recurrence
from ratlip.networks.attention import ConvShuffle, ShuffleAttention
from ratlip.networks.discriminator import Discriminator
from ratlip.networks.generator import Generator

__all__ = [
    "ConditionalAffine",
    "ConvShuffle",
    "Discriminator",
    "Generator",
    "OfficialRecurrentAffine",
    "Recurrence",
    "ShuffleAttention",
]
