"""The page /docs: what OpenAPI says of every route, as HTML without scripts or other addresses."""

import base64
import hashlib
import html
import json
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.responses import HTMLResponse

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
h2 { border-bottom: 1px solid #ccc; margin-top: 2em; }
h3 { margin-top: 2em; }
code { font: 14px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
table { border-collapse: collapse; }
td, th { text-align: left; vertical-align: top; padding: 0.2em 1em 0.2em 0; }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd; } a { color: #9cf; } }
"""
_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def docs_page(document: Mapping[str, Any]) -> HTMLResponse:
    """Return the page of an OpenAPI document."""
    title = html.escape(f"{document['info']['title']} {document['info']['version']}")
    body = "\n".join(_sections(document))
    return HTMLResponse(
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n<h1>{title}</h1>\n"
        '<p>The same for programs: <a href="/openapi.json">openapi.json</a>.</p>\n'
        f"{body}\n</html>\n",
        headers={"content-security-policy": POLICY},
    )


def _sections(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield a heading for each tag and what is in it, in the order of the document."""
    tags: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            shown = "\n".join(_operation(document, method.upper(), path, operation))
            tags.setdefault(operation.get("tags", ["other"])[0], []).append(shown)
    for tag, operations in tags.items():
        yield f"<h2>{html.escape(tag)}</h2>"
        yield from operations


def _operation(
    document: Mapping[str, Any], method: str, path: str, operation: Mapping[str, Any]
) -> Iterator[str]:
    yield f"<h3><code>{method} {html.escape(path)}</code></h3>"
    yield f"<p>{html.escape(operation.get('description', ''))}</p>"
    rows = [
        (f"{each['name']} ({each['in']})", each["schema"], each.get("required", False))
        for each in operation.get("parameters", ())
    ]
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = _resolved(document, content["schema"])
        yield f"<p>Body: <code>{html.escape(kind)}</code>. {_text(schema)}</p>"
        required = schema.get("required", ())
        rows += [(name, s, name in required) for name, s in schema.get("properties", {}).items()]
    if rows:
        yield "<table><tr><th>field</th><th>type</th><th>default</th></tr>"
        for name, schema, required in rows:
            default = "required" if required else _default(schema)
            cells = (name, _type(document, schema), default)
            yield "<tr>" + "".join(f"<td><code>{html.escape(cell)}</code></td>" for cell in cells)
        yield "</table>"
    answers = (f"<b>{code}</b> {_text(told)}" for code, told in operation["responses"].items())
    yield f"<p>{'<br>'.join(answers)}</p>"


def _type(document: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Write a schema's type in a few words; null, which takes the default, is left out."""
    schema = _resolved(document, schema)
    if choices := schema.get("anyOf"):
        kinds = (_type(document, each) for each in choices if each.get("type") != "null")
        return " or ".join(dict.fromkeys(kinds))
    if "properties" in schema:
        return "object: " + ", ".join(
            f"{name} ({_type(document, each)})" for name, each in schema["properties"].items()
        )
    if items := schema.get("items") or next(iter(schema.get("prefixItems", ())), None):
        return f"list of {_type(document, items)}"
    if isinstance(values := schema.get("additionalProperties"), Mapping):
        return f"{_type(document, values)} by name"
    return str(schema.get("format", schema.get("type", "any")))


def _resolved(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow a reference within the document."""
    found: Any = schema
    if reference := schema.get("$ref"):
        found = document
        for name in reference.removeprefix("#/").split("/"):
            found = found[name]
    return found  # type: ignore[no-any-return]


def _default(schema: Mapping[str, Any]) -> str:
    default = schema.get("default")
    return "" if default is None else json.dumps(default)


def _text(told: Mapping[str, Any]) -> str:
    return html.escape(" ".join(told.get("description", "").split()))
