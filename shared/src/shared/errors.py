"""The errors that cross rooms. Each carries a stable `code` for clients and a sentence that says what to do."""


class LannerError(Exception):
    code = "error"

    def __init__(self, message: str, code: str | None = None):
        super().__init__(message)
        if code is not None:
            self.code = code


class Refused(LannerError):
    """The input can't work and never will: not retried, shown to the user as it stands."""

    code = "refused"


class NotFound(LannerError):
    code = "not_found"


class Conflict(LannerError):
    code = "conflict"


class Damaged(LannerError):
    """An artifact is missing bytes, has other bytes than its manifest says, or answers other than it did."""

    code = "damaged"


class Unavailable(LannerError):
    """A part that this needs does not answer now; the same call may work later."""

    code = "unavailable"
