"""Everything public of Latentrt in one import: `from latentrt import Pipeline, Request`."""

from typing import TYPE_CHECKING

import runtime  # noqa: F401, it looks first whether `engine` is ours
from engine.deferred import deferred

if TYPE_CHECKING:
    from latentrt.public import *  # noqa: F403
else:
    __getattr__ = deferred(__name__)
