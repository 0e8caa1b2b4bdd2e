"""The page at ``/ui``: plain HTML, CSS and modules of JavaScript that lie in this package.

They hold no data and ask for no key. What the page shows it asks of the routes that any client may
use, with the key that its user gives.
"""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from crosspool.server.errors import RequestError

FOLDER = Path(__file__).parent / "ui"
_INDEX = "index.html"
_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    # Nothing from elsewhere, no inline script or style, and no other page around this one.
    "content-security-policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class UIRoutes:
    """Answers with the files of the page, which are read once; a path names one of them."""

    def __init__(self) -> None:
        self._files = {file.name: file.read_bytes() for file in FOLDER.iterdir()}
        self.routes = [Route("/ui", self._index), Route("/ui/{file}", self._file)]

    async def _index(self, request: Request) -> Response:
        del request
        return self._answer(_INDEX)

    async def _file(self, request: Request) -> Response:
        name: str = request.path_params["file"]
        if name not in self._files or name == _INDEX:
            raise RequestError(404, f"the page at /ui has no file {name[:200]!r}", "no_such_route")
        return self._answer(name)

    def _answer(self, name: str) -> Response:
        media_type = _TYPES[Path(name).suffix]
        return Response(self._files[name], media_type=media_type, headers=_HEADERS)
