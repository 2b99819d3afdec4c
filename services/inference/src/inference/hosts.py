"""By which names the API may be asked for.

Whoever owns a name can let it point at this host, and a browser then takes his page for one of the API's own (DNS
rebinding). Such a name has a dot. An address can't be one, nor a name of one label, as containers and machines have,
nor those below what no public server answers for (RFC 6761, 6762, 8375, ICANN's .internal).
"""

from functools import lru_cache
from ipaddress import ip_address

PRIVATE = (".localhost", ".local", ".internal", ".home.arpa")


@lru_cache(1024)
def is_known(host: str, allowed: str) -> bool:
    """host: a request's Host. allowed: names as ALLOWED_HOSTS lists them, `*` for any."""
    name = (host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]).lower().rstrip(".")
    if "." not in name or name.endswith(PRIVATE):
        return True
    names = [entry.strip().lower().rstrip(".") for entry in allowed.split(",")]
    if "*" in names or name in names:
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
