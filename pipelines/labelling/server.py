"""The page's server: this machine alone, below a secret path, so that no other page in the browser can read or vote."""

from __future__ import annotations

import hmac
import io
import json
import secrets
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from PIL import Image, UnidentifiedImageError

from model_core.documents import UserError
from pipelines.labelling.session import LabellingSession

ADDRESS = "127.0.0.1"
NAMES = (ADDRESS, "localhost")  # that a browser may call it by; any port, which a tunnel changes
ANY_BYTES = "application/octet-stream"
MAX_VOTE_BYTES = 64 * 1024
PAGE_FILES = {  # by path: package, file, type
    "": ("pipelines.labelling", "page.html", "text/html; charset=utf-8"),
    "page.css": ("pipelines.labelling", "page.css", "text/css; charset=utf-8"),
    "page.js": ("pipelines.labelling", "page.js", "text/javascript; charset=utf-8"),
    "report.css": ("model_core.evaluation", "templates/report.css", "text/css; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",  # the path is the secret
    "X-Content-Type-Options": "nosniff",
}


class LabellingServer(ThreadingHTTPServer):
    """Serves `session`, which is set before `serve_forever`, at `url`. Port 0 takes a free one; raises UserError for one that is taken."""

    daemon_threads = True
    session: LabellingSession

    def __init__(self, *, port: int) -> None:
        self.token = secrets.token_urlsafe(24)
        try:
            super().__init__((ADDRESS, port), Handler)
        except OSError as error:
            raise UserError(f"label: --port: found {port}, which cannot be served on ({error.strerror}); 0 takes a free one") from error

    @property
    def url(self) -> str:
        """The page's address, token included."""
        return f"http://{ADDRESS}:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hung up is nothing to tell of."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Refused(Exception):
    """A request that gets a status and a sentence."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """GET: page, state, pictures. POST: votes."""

    server: LabellingServer
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        """The page and what it shows."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """A vote, as JSON; answered once it is on the disk."""
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: the terminal is the user's."""

    def _answer(self, handle: Callable[[], tuple[bytes, str]]) -> None:
        try:
            content, kind = handle()
            self._send(HTTPStatus.OK, content, kind)
        except Refused as error:
            self._refuse(error.status, str(error))
        except UserError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))

    def _path(self) -> str:
        """What stands behind the token. Only a page that this server gave knows it; a name that was rebound to this machine is refused."""
        host = self.headers.get("Host", "")
        if host.rpartition(":")[0] not in NAMES and host not in NAMES:
            raise Refused(HTTPStatus.FORBIDDEN, f"found host {host!r}; allowed are {' and '.join(NAMES)}")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{host}":
            raise Refused(HTTPStatus.FORBIDDEN, f"found a call from {origin!r}; allowed is this page alone")
        token, slash, path = self.path.removeprefix("/").partition("/")
        if not slash or not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here; the page is at the address that the command printed")
        return path

    def _get(self) -> tuple[bytes, str]:
        path = self._path()
        if path in PAGE_FILES:
            package, name, kind = PAGE_FILES[path]
            return files(package).joinpath(name).read_bytes(), kind
        if path == "state":
            return as_json(self.server.session.state())
        folder, _, place = path.partition("/")
        number, _, name = place.partition("/")
        if folder == "pictures" and number.isascii() and number.isdecimal() and len(number) < 10:
            picture = self.server.session.picture(int(number), name)
            if picture is not None:
                return picture, picture_type(picture)
        raise Refused(HTTPStatus.NOT_FOUND, f"there is no {path!r} here")

    def _post(self) -> tuple[bytes, str]:
        body = self._body()  # before anything is refused: a connection that is closed over unread bytes loses its answer
        path = self._path()
        if path != "votes":
            raise Refused(HTTPStatus.NOT_FOUND, f"there is no {path!r} here")
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"found {self.headers.get_content_type()}; allowed is application/json")
        try:
            document = json.loads(body)
        except ValueError as error:
            raise UserError(f"vote: not JSON ({error})") from error
        try:
            return as_json({"num_labelled": self.server.session.cast(document)})
        except OSError as error:
            raise Refused(HTTPStatus.INSUFFICIENT_STORAGE, f"the vote could not be written ({error.strerror})") from error

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()) or int(length) > MAX_VOTE_BYTES:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"found a body of {length or 'unknown'} bytes; allowed are {MAX_VOTE_BYTES}")
        return self.rfile.read(int(length))

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        self.close_connection = True
        self._send(status, *as_json({"error": sentence}))

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        # A picture stays what it is for as long as its address is known, so the next pair can be fetched ahead.
        cache = "private, max-age=3600" if kind.startswith("image/") else "no-store"
        for name, value in (HEADERS | {"Cache-Control": cache, "Content-Type": kind, "Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)


def as_json(value: Any) -> tuple[bytes, str]:
    """A value as a body and its type."""
    return json.dumps(value, ensure_ascii=False).encode(), "application/json"


def picture_type(picture: bytes) -> str:
    """The media type of a picture file, by its first bytes; that of any bytes where it is none, for the page to say so."""
    try:
        with Image.open(io.BytesIO(picture)) as image:
            return image.get_format_mimetype() or ANY_BYTES
    except UnidentifiedImageError:
        return ANY_BYTES
