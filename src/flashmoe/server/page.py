"""The web page at / and its files below /page/: read once, sent with a strict Content-Security-Policy."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

PREFIX = "/page/"

_KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# Nothing from elsewhere, nothing inline, and the browser itself refuses to turn a text into HTML or script.
_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked again each time, answered by 304: an updated server shows its own page
}

router = APIRouter()


@dataclass(frozen=True)
class File:
    """One file of the page."""

    content: bytes
    kind: str
    tag: str


def _load(folder: Traversable, prefix: str = "") -> dict[str, File]:
    """Path below web/ -> file; 100 kB in all."""
    files: dict[str, File] = {}
    for entry in folder.iterdir():
        name = prefix + entry.name
        if entry.is_dir():
            files |= _load(entry, name + "/")
        elif (kind := _KINDS.get(name.rpartition(".")[2])) is not None:
            content = entry.read_bytes()
            files[name] = File(content, kind, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return files


_FILES = _load(resources.files("flashmoe.server") / "web")


@router.get("/")
async def page(request: Request) -> Response:
    """The page."""
    return _answer(request, "index.html")


@router.get(PREFIX + "{name:path}")
async def file(name: str, request: Request) -> Response:
    """One of its files."""
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    found = _FILES.get(name)
    if found is None:
        raise HTTPException(404)
    headers = _HEADERS | {"ETag": found.tag}
    if request.headers.get("if-none-match") == found.tag:
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.kind, headers=headers)
