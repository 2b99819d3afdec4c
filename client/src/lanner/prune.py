"""What nothing needs any more: uploads that a Dataset was made of, versions that no alias names."""

from lanner.client import Client
from lanner.errors import LannerError

LATEST = 500  # jobs that are looked at: the most that the server lists


def unneeded(client: Client) -> list[str]:
    """Paths for `Client.delete`, uploads first.

    A version stays while an alias points at it, or would go back to it.
    """
    used = {job["job"]["source"] for job in client.jobs(state="succeeded", kind="preprocess", limit=LATEST)}
    found = [f"uploads/{upload['id']}" for upload in client.uploads() if f"upload:{upload['id']}" in used]
    for model in client.models():
        named = {at["version"] for at in model["aliases"].values()}
        named |= {at["previous"]["version"] for at in model["aliases"].values() if at.get("previous")}
        if named:  # a name without any alias may be about to get one
            found += [f"models/{model['name']}/versions/{number}" for number in sorted(map(int, model["versions"]))
                      if number not in named]
    return found


def prune(client: Client, paths: list[str]) -> dict[str, str]:
    """Delete these. Returns those that something still stands on, with what that is."""
    kept = {}
    for path in paths:
        try:
            client.delete(path)
        except LannerError as e:
            if e.code not in ("in_use", "not_found"):
                raise
            kept[path] = str(e)
    return kept
