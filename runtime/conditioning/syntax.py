r"""The syntax of prompts, as Automatic1111's web UI has it.

(cat) counts 1.1 times, (cat:1.3) 1.3 times, [cat] 1/1.1 times; they nest. \( \) \[ \] are
the brackets themselves. BREAK starts a new chunk of tokens. [cat:dog:0.4] becomes another text
after that part of the steps, or after that step where the number has no point; [dog:0.4] appears
then and [cat::0.4] vanishes. [cat|dog] alternates from step to step. `cat AND dog :0.5` is two
prompts in one picture, the second at half its weight.

Any text is a prompt: brackets that fit nothing are text. All of it takes linear time, and no
depth of nesting is too deep.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.errors import RequestError

__all__ = ["Piece", "compose", "compose_all", "escape", "parse", "schedule"]

ROUND, SQUARE = 1.1, 1 / 1.1
MAX_PARTS = 16  # of a composed prompt: each is a row of every batch
MAX_WEIGHT = 1e4  # of either sign; what is beyond makes no picture, and more would overflow

_NUMBER = r"[+-]?(?>[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)"
# Possessive: a long run of digits or blanks is read once.
_ATTENTION = re.compile(rf"\\.?|[(\[\])]|:\s*+({_NUMBER})\s*+\)|[^\\()\[\]:]++|:", re.DOTALL)
_BREAK = re.compile(r"\bBREAK\b")
_SCHEDULE = re.compile(r"(?:\\.?|[^\\()\[\]:|])++|.", re.DOTALL)
_WHEN = re.compile(rf"{_NUMBER}(?:[eE][+-]?[0-9]+)?")
_AND = re.compile(r"\\.|\bAND\b", re.DOTALL)
_SYNTAX = re.compile(rf"[\\()\[\]<{{}}]|__|{_BREAK.pattern}|\bAND\b|(?i:\bembedding:)")
_OPENING = {")": "(", "]": "["}


class Piece(NamedTuple):
    """A part of a prompt, brackets and escapes resolved, and how much it counts."""

    text: str
    weight: float


def escape(text: str) -> str:
    """Return the prompt that means this text itself, whatever syntax is in it."""
    return _SYNTAX.sub(r"\\\g<0>", text)


def compose(text: str) -> list[Piece]:
    """Return the prompts that AND joins, for `schedule`, each with how much it counts.

    A weight is read after a colon at a part's end, where there is an AND at all.
    """
    cuts = [match.span() for match in _AND.finditer(text) if match[0] == "AND"]
    if not cuts:
        return [Piece(text, 1.0)]
    starts, ends = [0, *(end for _, end in cuts)], [*(start for start, _ in cuts), len(text)]
    return [_weighed(text[start:end]) for start, end in zip(starts, ends, strict=True)]


def compose_all(texts: Sequence[str]) -> tuple[list[list[str]], NDArray[np.float64]]:
    """Return the parts of several prompts, (m, P) texts, and what each counts.

    All get as many parts as the longest has; those that a prompt lacks count 0.
    Raises RequestError for more than 16 parts.
    """
    composed = [compose(text) for text in texts]
    parts = max(len(pieces) for pieces in composed)
    if parts > MAX_PARTS:
        raise RequestError(
            f"a prompt joins {parts} parts with AND; up to {MAX_PARTS} can be drawn together"
        )
    filled = [[*p, *[Piece(p[0].text, 0.0)] * (parts - len(p))] for p in composed]
    groups = [[pieces[i].text for pieces in filled] for i in range(parts)]
    return groups, np.array([[pieces[i].weight for pieces in filled] for i in range(parts)])


def _weighed(part: str) -> Piece:
    words, colon, number = part.rpartition(":")
    if colon and _WHEN.fullmatch(number.strip()):
        return Piece(words.strip(), max(-MAX_WEIGHT, min(MAX_WEIGHT, float(number))))
    return Piece(part.strip(), 1.0)


def parse(text: str) -> list[list[Piece]]:
    """Return the pieces of a prompt in the order of the text, a list for every stretch at BREAK.

    Neighbours of one weight are one piece. There is at least one stretch; it may be empty.
    """
    tokens = [(match[0], match[1]) for match in _ATTENTION.finditer(text)]
    opened, closed = _brackets(tokens)
    weights = {"(": [1.0], "[": [1.0]}  # of the open brackets together, the innermost last
    stretches: list[list[Piece]] = [[]]
    for i, (token, _) in enumerate(tokens):
        if i in opened:
            weights[token].append(weights[token][-1] * opened[i])
        elif i in closed:
            weights[closed[i]].pop()
        else:
            weight = weights["("][-1] * weights["["][-1]
            weight = max(-MAX_WEIGHT, min(MAX_WEIGHT, weight))
            for j, part in enumerate(_parts(token)):
                if j:
                    stretches.append([])
                if part:
                    stretches[-1].append(Piece(part, weight))
    return [_merge(stretch) for stretch in stretches]


def _brackets(tokens: Sequence[tuple[str, str | None]]) -> tuple[dict[int, float], dict[int, str]]:
    """Return the multipliers of opening tokens, and for closing tokens what they close.

    Round and square brackets do not see each other; what is never closed counts to the end.
    """
    opened: dict[int, float] = {}
    closed: dict[int, str] = {}
    waiting: dict[str, list[int]] = {"(": [], "[": []}
    for i, (token, number) in enumerate(tokens):
        if token in waiting:
            waiting[token].append(i)
            opened[i] = ROUND if token == "(" else SQUARE
        elif number is not None and waiting["("]:
            opened[waiting["("].pop()] = float(number)
            closed[i] = "("
        elif token in _OPENING and waiting[_OPENING[token]]:
            waiting[_OPENING[token]].pop()
            closed[i] = _OPENING[token]
    return opened, closed


def _parts(token: str) -> list[str]:
    """Split a token at BREAK, without the blanks beside it; of an escape leave what is escaped."""
    if token.startswith("\\"):
        return [token[1:]]
    first, *others = _BREAK.split(token)
    parts = [first, *(part.lstrip() for part in others)]
    return [*(part.rstrip() for part in parts[:-1]), parts[-1]]


def _merge(stretch: Sequence[Piece]) -> list[Piece]:
    """Join neighbours of one weight."""
    merged: list[tuple[list[str], float]] = []
    for text, weight in stretch:
        if merged and merged[-1][1] == weight:
            merged[-1][0].append(text)
        else:
            merged.append(([text], weight))
    return [Piece("".join(texts), weight) for texts, weight in merged]


class _Choice(NamedTuple):
    """What a bracket holds; when: the last step of the first of two options, None to alternate."""

    options: "list[list[_Node]]"
    when: int | None

    def at(self, step: int) -> "list[_Node]":
        """Return the option of a step, which counts from 1."""
        if self.when is None:
            return self.options[(step - 1) % len(self.options)]
        return self.options[step > self.when]


_Node: TypeAlias = "str | list[_Node] | _Choice"  # a list's parts follow each other


@dataclass(slots=True)
class _Bracket:
    """A bracket that is open, split at its colons and bars; the root is opened by nothing."""

    opening: str
    parts: list[list[_Node]] = field(default_factory=lambda: [[]])
    separators: list[str] = field(default_factory=list)

    def literal(self) -> list[_Node]:
        """Return what was read so far as text."""
        nodes: list[_Node] = [self.opening, self.parts[0]]
        for separator, part in zip(self.separators, self.parts[1:], strict=True):
            nodes += [separator, part]
        return nodes


def schedule(text: str, steps: int) -> list[tuple[int, str]]:
    """Return the texts of a prompt, for `parse`, each with the last step that it is for.

    Steps count from 1; a text always differs from the one before it, and the last is for the last
    step. A number with a point is a part of the steps, another is a step. Brackets of either kind
    must be balanced to be seen, as in Automatic1111.
    """
    if "[" not in text:
        return [(steps, text)]
    root, choices = _tree(text, steps)
    if any(choice.when is None for choice in choices):
        ends = list(range(1, steps + 1))
    else:
        ends = sorted({steps, *(choice.when for choice in choices if choice.when)})
    texts: list[tuple[int, str]] = []
    for end in ends:
        shown = "".join(_shown(root, end))
        if texts and texts[-1][1] == shown:
            texts.pop()
        texts.append((end, shown))
    return texts


def _tree(text: str, steps: int) -> tuple[list[_Node], list[_Choice]]:
    """Read the brackets; also return the choices among them."""
    stack, choices = [_Bracket("")], []
    for match in _SCHEDULE.finditer(text):
        token, top = match[0], stack[-1]
        if token in ("(", "["):
            stack.append(_Bracket(token))
        elif token in (":", "|") and top.opening == "[":
            top.separators.append(token)
            top.parts.append([])
        elif token in _OPENING and top.opening == _OPENING[token]:
            stack.pop()
            choice = _choice(top, steps) if token == "]" else None
            if choice:
                choices.append(choice)
            stack[-1].parts[-1].append(choice or [*top.literal(), token])
        else:
            if token in _OPENING:  # it closes nothing, and nothing around it is balanced
                stack = _unwound(stack)
            stack[-1].parts[-1].append(token)
    return _unwound(stack)[0].parts[0], choices


def _unwound(stack: list[_Bracket]) -> list[_Bracket]:
    """Make brackets that are not closed text of the root."""
    root = stack[0]
    for bracket in stack[1:]:
        root.parts[0].append(bracket.literal())
    return [root]


def _choice(bracket: _Bracket, steps: int) -> _Choice | None:
    """Return what a pair of square brackets chooses between, None where it only weakens."""
    *options, last = bracket.parts
    if bracket.separators[-1:] == [":"] and bracket.separators.count(":") <= 2:
        number = "".join(node if isinstance(node, str) else "[" for node in last).strip()
        if _WHEN.fullmatch(number):
            when = float(number) * (steps if "." in number else 1)
            before_after = _joined(options, bracket.separators[:-1])
            return _Choice(before_after, int(max(0, min(steps, when))))
    if "|" in bracket.separators and ":" not in bracket.separators:
        return _Choice(bracket.parts, None)
    return None


def _joined(options: list[list[_Node]], separators: Sequence[str]) -> list[list[_Node]]:
    """Return what is before and what is after, where bars are text."""
    sides: list[list[_Node]] = [[options[0]]]
    for separator, option in zip(separators, options[1:], strict=True):
        if separator == ":":
            sides.append([option])
        else:
            sides[-1] += [separator, option]
    return sides if len(sides) == 2 else [[], *sides]


def _shown(nodes: list[_Node], step: int) -> Iterator[str]:
    """Yield the text of a step; the stack is our own, for brackets nest deeper than calls."""
    stack = [iter(nodes)]
    while stack:
        node = next(stack[-1], None)
        if node is None:
            stack.pop()
        elif isinstance(node, str):
            yield node
        else:
            stack.append(iter(node.at(step) if isinstance(node, _Choice) else node))
