"""Settings: what a run is made of, checked before anything is computed, and hashed into the run's name.

A profile (`profiles/*.yaml`) names a dataset, sizes and a budget. A profile may extend another one; overrides
(`{"model.conditioning": "rat", "seed": 1}`) are laid over it. Published behaviour that ratlip corrects by default
is one named setting each (`ratlip.published`, profiles `*-published`).
"""

from ratlip.settings.loading import lay, load_settings, merge, profile_names, read_overrides  # noqa: F401
from ratlip.settings.sections import ClipSettings, DataSettings, Settings, TrainingSettings  # noqa: F401
