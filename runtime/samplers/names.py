"""The names that diffusers, Automatic1111 and ComfyUI give to samplers and schedules."""

import difflib
import re
from collections.abc import Mapping, Sequence

from engine.errors import RequestError

# Written as `_key` writes them: lower case, no punctuation, pp for ++.
SAMPLER_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("pndm", "pndmscheduler"), "plms"),
    **dict.fromkeys(("eulerancestral", "eulerancestraldiscretescheduler"), "euler_a"),
    **dict.fromkeys(("kdpm2", "kdpm2discretescheduler"), "dpm2"),
    **dict.fromkeys(("dpm2ancestral", "kdpm2ancestraldiscretescheduler"), "dpm2_a"),
    **dict.fromkeys(("dpmppsdegpu", "dpmsolversdescheduler"), "dpmpp_sde"),
    **dict.fromkeys(("unipcbh2", "unipcmultistepscheduler"), "unipc"),
    **{f"{name}scheduler": name for name in ("ddpm", "ddim", "lcm", "tcd", "ipndm")},
    **{f"{name}discretescheduler": name for name in ("euler", "heun", "lms")},
    **{f"dpmpp{order}msdegpu": f"dpmpp_{order}m_sde" for order in (2, 3)},
    **{"dpmpp2sancestral": "dpmpp_2s_a", "edmeulerscheduler": "edm_euler"},
    **{"dpmsolvermultistepscheduler": "dpmpp_2m", "dpmsolversinglestepscheduler": "dpmpp_2s"},
    "deismultistepscheduler": "deis",
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
