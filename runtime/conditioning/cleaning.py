"""HTML entities and curly quotes, as CLIP's original tokenizer cleans them before it cuts words.

CLIP's `simple_tokenizer.py` (`basic_clean`) has ftfy mend a text and unescapes HTML twice;
transformers' tokenizer does neither, so the two disagree on `&amp;` and on “quotes”. Of what ftfy
mends, these two are what prompts hold.
"""

import html
import re

_SINGLE, _DOUBLE = re.compile("[\u02bc\u2018-\u201b]"), re.compile("[\u201c-\u201f]")
_ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
ROUNDS = 8  # of entities within entities


def clean_text(text: str) -> str:
    """Return a text with its entities resolved and its quotes straight.

    Beside a "<", which ftfy takes for markup, entities are resolved twice and last.
    """
    if "<" not in text:
        for _ in range(ROUNDS):
            mended = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
            if mended == text:
                break
            text = mended
    text = _DOUBLE.sub('"', _SINGLE.sub("'", text))
    return html.unescape(html.unescape(text))
