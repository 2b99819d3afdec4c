"""The head of a plain POST as WSGI tells it. Strict: what is unusual in any way is not taken for plain."""

import re

LIMIT = 16 << 10
FIRST = re.compile(r"POST (/[A-Za-z0-9_/@-]+)(?:\?([A-Za-z0-9_=&-]*))? HTTP/1\.1")
FIELD = re.compile(r"([A-Za-z0-9-]+):[ \t]*([\x20-\x7e]*)")
USUAL = {"CONNECTION": ("keep-alive", "close"), "EXPECT": ("100-continue",)}
UNUSUAL = frozenset(("HTTP_CONNECTION", "HTTP_EXPECT", "HTTP_UPGRADE"))  # but for what is usual of them
EXPECTS = re.compile(rb"\r\nexpect:[ \t]*100-continue[ \t]*(?:\r\n|\Z)", re.IGNORECASE)
ENDS = re.compile(rb"\r\nconnection:[ \t]*close[ \t]*(?:\r\n|\Z)", re.IGNORECASE)
BEGINNINGS = (b"POST /v1/models/", b"POST /v2/models/")


def may_be_plain(data: bytes) -> bool:
    """Whether the beginning of a head, without its end, may become one that `environ_of` takes."""
    return (len(data) <= LIMIT and b"\n\n" not in data
            and any(data[:len(beginning)] == beginning[:len(data)] for beginning in BEGINNINGS))


def environ_of(head: bytes) -> dict[str, str] | None:
    """A WSGI environ without the body; None for another method, a query with escapes, a field that comes twice or is
    malformed."""
    first, *lines = head.decode("latin-1").split("\r\n")
    if not (asked := FIRST.fullmatch(first)):
        return None
    found: dict[str, str] = {}
    for line in lines:
        field = FIELD.fullmatch(line)
        name = field[1].upper().replace("-", "_") if field else ""
        if field is None or name in found:
            return None
        found[name] = field[2].rstrip()
    environ = {name if name in ("CONTENT_LENGTH", "CONTENT_TYPE") else f"HTTP_{name}": value
               for name, value in found.items() if value.lower() not in USUAL.get(name, ())}
    if "HTTP_HOST" not in environ or not UNUSUAL.isdisjoint(environ):
        return None
    return {**environ, "REQUEST_METHOD": "POST", "PATH_INFO": asked[1], "QUERY_STRING": asked[2] or ""}


def expects(head: bytes) -> bool:
    """Whether a client waits for 100 Continue before it sends the body, as curl does for over 1 MiB."""
    return EXPECTS.search(head) is not None


def ends(head: bytes) -> bool:
    """Whether a client says that the connection is over with this request."""
    return ENDS.search(head) is not None
