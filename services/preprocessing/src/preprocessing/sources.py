"""Where a job's raw images are: the official CIFAR-10, an upload, or the imports folder."""

from pathlib import Path

from preprocessing.download import download
from shared.archives import imported, uploaded
from shared.attempt import Attempt
from shared.errors import Refused
from shared.jobs import check_id

# The official page, https://www.cs.toronto.edu/~kriz/cifar.html, gives its MD5, c32a1d4ab5d03f1284b67883e8d87530. The
# SHA-256 of the file with that MD5 is pinned alike by gomlx/gomlx (examples/cifar/cifar.go) and by
# ankane/torchvision-ruby (lib/torchvision/datasets/cifar10.rb).
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
REMEDY = "upload the archive (`--data PATH` with a file or folder of it), or set CIFAR10_URL to a mirror"


def locate(source: str, ctx: Attempt) -> Path:
    """The file or folder that a job's source names.

    Raises:
        Refused: (source_unavailable) it is not there; (bad_name) it names no place inside the imports folder.
    """
    word, _, rest = source.partition(":")
    match word:
        case "cifar10":
            return download(ctx.settings.cifar10_url, ctx.root / ".downloads" / "cifar-10-binary.tar.gz",
                            CIFAR10_SHA256, REMEDY, ctx)
        case "upload":
            return uploaded(ctx.root, check_id(rest, "upload id"))
        case "import":
            return imported(ctx.settings.imports, rest)
        case _:
            raise Refused(f"source {source!r} is unknown: expected cifar10, upload:<id> or import:<name>", "bad_job")
