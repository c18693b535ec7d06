"""The names that diffusers, Automatic1111 and ComfyUI give to samplers and schedules."""

import difflib
import re
from collections.abc import Mapping, Sequence

from engine.errors import RequestError

# Written as `_key` writes them: lower case, no punctuation, pp for ++.
SAMPLER_NAMES: Mapping[str, str] = {
    "pndm": "plms",
    "eulerancestral": "euler_a",
    "dpm2ancestral": "dpm2_a",
    "kdpm2": "dpm2",
    "kdpm2ancestral": "dpm2_a",
    "dpmpp2sancestral": "dpmpp_2s_a",
    "dpmppsdegpu": "dpmpp_sde",
    "dpmpp2msdegpu": "dpmpp_2m_sde",
    "dpmpp3msdegpu": "dpmpp_3m_sde",
    "unipcbh2": "unipc",
    "ddpmscheduler": "ddpm",
    "ddimscheduler": "ddim",
    "pndmscheduler": "plms",
    "lcmscheduler": "lcm",
    "tcdscheduler": "tcd",
    "eulerdiscretescheduler": "euler",
    "eulerancestraldiscretescheduler": "euler_a",
    "heundiscretescheduler": "heun",
    "kdpm2discretescheduler": "dpm2",
    "kdpm2ancestraldiscretescheduler": "dpm2_a",
    "lmsdiscretescheduler": "lms",
    "ipndmscheduler": "ipndm",
    "dpmsolvermultistepscheduler": "dpmpp_2m",
    "dpmsolversinglestepscheduler": "dpmpp_2s",
    "dpmsolversdescheduler": "dpmpp_sde",
    "deismultistepscheduler": "deis",
    "unipcmultistepscheduler": "unipc",
    "edmeulerscheduler": "edm_euler",
}
SCHEDULE_NAMES: Mapping[str, str | None] = {
    "automatic": None,
    "uniform": "linspace",
    "normal": "linspace",
    "ddimuniform": "leading",
    "ays": "align_your_steps",
    "aysxl": "align_your_steps_xl",
    "alignyoursteps15": "align_your_steps",
    "alignyourstepssdxl": "align_your_steps_xl",
}


def resolve(
    name: str, schedule: str | None, samplers: Sequence[str], schedules: Sequence[str]
) -> tuple[str, str | None]:
    """Return the names that this package uses for a sampler and a schedule.

    Case, spaces, underscores and dashes do not matter. A schedule may follow the sampler's name.

    Raises:
        RequestError: a name is unknown, or a schedule is given twice and differs.
    """
    methods = {_key(known): known for known in samplers} | dict(SAMPLER_NAMES)
    curves: dict[str, str | None] = {_key(known): known for known in schedules}
    curves |= SCHEDULE_NAMES
    chosen = None
    if schedule is not None:
        if _key(schedule) not in curves:
            raise RequestError(_unknown("schedule", schedule, schedules, curves))
        chosen = curves[_key(schedule)]
    key = _key(name)
    if key in methods:
        return methods[key], chosen
    for suffix, curve in sorted(curves.items(), key=lambda item: -len(item[0])):
        if key.endswith(suffix) and key.removesuffix(suffix) in methods:
            if schedule is not None and chosen != curve:
                raise RequestError(
                    f"sampler {name!r} names the schedule {curve!r}, but schedule is {schedule!r}; "
                    f"give one of them"
                )
            return methods[key.removesuffix(suffix)], curve
    raise RequestError(_unknown("sampler", name, samplers, methods))


def _key(name: object) -> str:
    return re.sub(r"[^a-z0-9]", "", str(name).lower().replace("++", "pp"))


def _unknown(what: str, name: object, known: Sequence[str], keys: Mapping[str, str | None]) -> str:
    close = difflib.get_close_matches(_key(name), keys, n=1, cutoff=0.5)
    hint = f" (did you mean {keys[close[0]]!r}?)" if close else ""
    return f"{what} is {name!r}; choose one of {', '.join(known)}{hint}"
