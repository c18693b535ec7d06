"""The names that diffusers, Automatic1111 and ComfyUI give to samplers and schedules."""

import difflib
import re
from collections.abc import Mapping, Sequence

from engine.errors import RequestError

# Written as `_key` writes them.
SAMPLER_NAMES: Mapping[str, str] = {
    **{"pndm": "plms", "kdpm2": "dpm2", "kdpm2a": "dpm2_a", "dpmsolversde": "dpmpp_sde"},
    **{"dpmsolvermultistep": "dpmpp_2m", "dpmsolversinglestep": "dpmpp_2s"},
    **{"deismultistep": "deis", "unipcmultistep": "unipc", "unipcbh2": "unipc"},
}
SCHEDULE_NAMES: Mapping[str, str | None] = {
    **{"automatic": None, "uniform": "linspace", "normal": "linspace", "ddimuniform": "leading"},
    **dict.fromkeys(("ays", "alignyoursteps15"), "align_your_steps"),
    **dict.fromkeys(("aysxl", "alignyourstepssdxl"), "align_your_steps_xl"),
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
    if schedule is not None and _key(schedule) not in curves:
        raise RequestError(_unknown("schedule", schedule, schedules, curves))
    chosen = None if schedule is None else curves[_key(schedule)]
    key = _key(name)
    for suffix in ("", *sorted(filter(key.endswith, curves), key=len, reverse=True)):
        method = methods.get(_key(key.removesuffix(suffix)))
        curve = curves[suffix] if suffix else chosen
        if method is not None:
            if schedule is not None and chosen != curve:
                raise RequestError(
                    f"sampler {name!r} names the schedule {curve!r}, but schedule is {schedule!r}; "
                    f"give one of them"
                )
            return method, curve
    raise RequestError(_unknown("sampler", name, samplers, methods))


def _key(name: object) -> str:
    """Write a name in lower case, without punctuation, pp for ++, a for ancestral."""
    key = str(name).lower().replace("++", "pp").replace("ancestral", "a")
    key = re.sub(r"[^a-z0-9]", "", key).removesuffix("scheduler")
    return key.removesuffix("discrete").removesuffix("gpu")


def _unknown(what: str, name: object, known: Sequence[str], keys: Mapping[str, str | None]) -> str:
    close = difflib.get_close_matches(_key(name), keys, n=1, cutoff=0.5)
    hint = f" (did you mean {keys[close[0]]!r}?)" if close else ""
    return f"{what} is {name!r}; choose one of {', '.join(known)}{hint}"
