r"""Alternatives and wildcards in prompts: a template of which every picture's seed chooses a text.

    {red|green|}            one of them, the last of which is empty
    {2::red|green}          red twice as often
    {2$$red|green|blue}     two of them, with ", " between; {1-2$$ and $$red|green}
    __colour__              a line of the file colour.txt; __animals/*__ one of several files

They nest, and lines of files may hold both. Braces without a bar or "$$" are text, and so is what
a backslash stands before. The notation is that of the extension Dynamic Prompts of Automatic1111's
web UI and of ComfyUI's own input fields.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Protocol, TypeAlias

from engine.errors import RequestError

__all__ = ["MARKS", "Lines", "expand"]

MARKS = re.compile(r"\{|__")  # in every text that has alternatives
_TOKEN = re.compile(r"\\.|__(?P<name>[\w.*/-]*[\w.*/-])__|[{}|\[\]]|[^\\{}|\[\]_]++|_", re.DOTALL)
_WEIGHT = re.compile(r"\s*(\d{1,6}(?:\.\d{0,6})?|\.\d{1,6})::")
_COUNT = re.compile(r"\s*(\d{1,3})(?:-(\d{1,3}))?\s*")
JOINER = ", "
MAX_CHARACTERS = 100_000  # of an expanded text
MAX_CHOICES = 10_000  # which bounds lines that name each other
MAX_DEPTH = 64
NO_FOLDER = "no folder of wildcards is given; --wildcard-dir names the one that holds their files"


class Lines(Protocol):
    """Where wildcards come from."""

    def lines(self, name: str) -> list[str]:
        """Return the lines that a name stands for, none where there are none to choose from."""
        ...

    def why_none(self, name: str) -> str:
        """Say why there are none: that no such file is there, or that it holds none."""
        ...


@dataclass(slots=True)
class _Choice:
    """What a pair of braces holds: its options and what each counts, how many, what joins them."""

    options: "list[list[_Node]]"
    weights: list[float]
    low: int = 1
    high: int = 1
    joiner: str = JOINER


@dataclass(frozen=True, slots=True)
class _Wildcard:
    name: str
    written: str


_Node: TypeAlias = "str | _Choice | _Wildcard"


@dataclass(slots=True)
class _Brace:
    """A brace that is open; squares: square brackets open in it, whose bars are their own."""

    parts: list[list[_Node]] = field(default_factory=lambda: [[]])
    squares: int = 0


def expand(text: str, random: Random, wildcards: Lines | None = None) -> tuple[str, list[str]]:
    """Choose a text of a template; also return a note on each wildcard that says nothing.

    random: what chooses, in the order of the text
    Raises RequestError for one that grows too long, or whose lines name each other without end.
    """
    notes: dict[str, None] = {}
    left = MAX_CHOICES

    def shown(nodes: list[_Node], depth: int) -> Iterator[str]:
        nonlocal left
        for node in nodes:
            if isinstance(node, str):
                yield node
                continue
            left -= 1
            if left < 0 or depth > MAX_DEPTH:
                raise RequestError(
                    "the alternatives of the prompt lead to each other without end; look at the "
                    "wildcards' files that name others"
                )
            if isinstance(node, _Choice):
                yield node.joiner.join(
                    "".join(shown(option, depth + 1)) for option in _chosen(node, random)
                )
            elif lines := wildcards.lines(node.name) if wildcards else []:
                yield from shown(_parse(lines[int(random.random() * len(lines))]), depth + 1)
            else:
                why = wildcards.why_none(node.name) if wildcards else NO_FOLDER
                notes.setdefault(f"{node.written} is left out of the text: {why}")

    parts, length = [], 0
    for part in shown(_parse(text), 0):
        length += len(part)
        if length > MAX_CHARACTERS:
            raise RequestError(f"the prompt grows beyond {MAX_CHARACTERS} characters; shorten it")
        parts.append(part)
    return "".join(parts), list(notes)


def _parse(text: str) -> list[_Node]:
    stack = [_Brace()]
    for match in _TOKEN.finditer(text):
        token, top = match[0], stack[-1]
        if match["name"] is not None:
            top.parts[-1].append(_Wildcard(match["name"], token))
        elif token == "{":
            stack.append(_Brace())
        elif token == "}" and len(stack) > 1:
            stack.pop()
            stack[-1].parts[-1] += _closed(top)
        elif token == "|" and len(stack) > 1 and not top.squares:
            top.parts.append([])
        else:
            top.squares = max(0, top.squares + (token == "[") - (token == "]"))
            top.parts[-1].append(token)
    nodes = stack[0].parts[0]
    for brace in stack[1:]:  # never closed: text
        nodes += ["{", *_joined(brace)]
    return nodes


def _closed(brace: _Brace) -> list[_Node]:
    """Return what a pair of braces stands for: a choice, or text."""
    head = brace.parts[0][0] if brace.parts[0] else ""
    count, dollars, rest = head.partition("$$") if isinstance(head, str) else ("", "", "")
    number = _COUNT.fullmatch(count) if dollars else None
    if number is None and len(brace.parts) == 1:
        return ["{", *_joined(brace), "}"]
    choice = _Choice(brace.parts, [1.0] * len(brace.parts))
    if number is not None:
        choice.low = int(number[1])
        choice.high = max(choice.low, int(number[2] or number[1]))
        joiner, more, first = rest.partition("$$")
        choice.joiner = joiner if more else JOINER
        brace.parts[0][0] = first if more else rest
    for i, option in enumerate(choice.options):
        if option and isinstance(option[0], str) and (weight := _WEIGHT.match(option[0])):
            choice.weights[i] = float(weight[1])
            option[0] = option[0][weight.end() :]
    return [choice]


def _joined(brace: _Brace) -> Iterator[_Node]:
    """Yield what a brace holds as text, its bars included."""
    for i, part in enumerate(brace.parts):
        if i:
            yield "|"
        yield from part


def _chosen(choice: _Choice, random: Random) -> Iterator[list[_Node]]:
    """Yield as many options as are wanted, each at most once."""
    left = list(range(len(choice.options)))
    count = choice.low + int(random.random() * (choice.high - choice.low + 1))
    for _ in range(min(count, len(left))):
        weights = [choice.weights[i] for i in left]
        point, total = random.random(), sum(weights)
        if total == 0:
            return
        point *= total
        at = 0
        while at < len(left) - 1 and (point >= weights[at] or not weights[at]):
            point -= weights[at]
            at += 1
        yield choice.options[left.pop(at)]
