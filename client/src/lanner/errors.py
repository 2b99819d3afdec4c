"""The one error of this package."""


class LannerError(Exception):
    """What the server, or the way to it, refused. `code` is stable, the message for people; status is HTTP's or 0."""

    def __init__(self, message: str, code: str = "client", status: int = 0):
        super().__init__(message)
        self.code, self.status = code, status
