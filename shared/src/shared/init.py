"""`python -m shared.init`: what the Compose stack needs before anything starts: folders, passwords, Redis' users.

Begins as root with the capabilities CHOWN, SETUID and SETGID, gives the volumes to the services' user and does the rest
as that user. Run again, it keeps every password.

/access/<role>/password        read by the one service that has the role
/access/redis/users.acl, health  read by Redis and its health check
"""

import hashlib
import os
import secrets
from pathlib import Path

from shared.artifacts import write_bytes
from shared.settings import load

USER = 10001  # as in services/Dockerfile and compose.yaml
ACCESS, REDIS_DATA = Path("/access"), Path("/data")
FOLDERS = ("raw", "jobs", "aliases", "work", "datasets", "models", "variants", "cards", "predictions", "weights",
           ".staging")
ROLES = ("api", "worker", "keeper")
# INFO is among the dangerous ones, but without it RQ takes the server for an old one and moves jobs by BLPOP, which
# loses the job of a worker that dies right after. Lua stays allowed: RQ's own scripts need it.
RULES = "~rq:* ~lanner:* &rq:pubsub:* +@all -@dangerous -@admin +info +client|setname +client|list"


def become_owner(volumes: list[Path]) -> None:
    """Give the volumes' roots to the services' user and be that user from here on. Needs root."""
    for volume in volumes:
        os.chown(volume, USER, USER)
    os.setgroups([])
    os.setgid(USER)
    os.setuid(USER)


def password(path: Path) -> str:
    """The password in a file, made up and written where there is none yet."""
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_bytes(path, secrets.token_urlsafe(32).encode())
    return path.read_text()


def acl(passwords: dict[str, str], health: str) -> str:
    """Redis' users: the default one off, one a role, and one that can only PING. Passwords as SHA-256."""
    lines = ["user default reset off"]
    for role, secret in passwords.items():
        lines.append(f"user {role} reset on #{hashlib.sha256(secret.encode()).hexdigest()} {RULES}")
    lines.append(f"user health reset on #{hashlib.sha256(health.encode()).hexdigest()} +ping")
    return "\n".join(lines) + "\n"


def main() -> None:
    root = load().artifacts
    become_owner([root, REDIS_DATA, ACCESS])
    for folder in FOLDERS:
        (root / folder).mkdir(exist_ok=True)
    os.umask(0o077)
    passwords = {role: password(ACCESS / role / "password") for role in ROLES}
    users = acl(passwords, password(ACCESS / "redis" / "health"))
    write_bytes(ACCESS / "redis" / "users.acl", users.encode())
    print(f"{len(ROLES)} roles and {len(FOLDERS)} folders are ready")


if __name__ == "__main__":
    main()
