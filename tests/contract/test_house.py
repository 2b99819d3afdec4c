"""The house rules that a machine can hold."""

import subprocess
from pathlib import Path

TOP = Path(__file__).parents[2]


def sources():
    folders = ("shared", "services", "client", "tests", "benchmarks")
    return [path for folder in folders for path in (TOP / folder).rglob("*.py")]


def test_no_module_is_longer_than_400_lines():
    assert [p for p in sources() if len(p.read_text().splitlines()) > 400] == []


def test_no_module_has_a_name_that_says_nothing():
    assert [p for p in sources() if p.stem in ("utils", "util", "common", "helpers", "misc", "base")] == []


def test_the_environment_is_read_in_one_module():
    allowed = {"settings.py", "gpu.py", "worker.py", "supervisor.py"}  # the others set it, for libraries and children
    readers = [p for p in (TOP / "shared").rglob("*.py") if "os.environ" in p.read_text()]
    assert {p.name for p in readers} <= allowed
    for room in (TOP / "services").iterdir():
        for path in room.rglob("*.py"):
            assert "os.getenv" not in path.read_text(), path
            assert "os.environ.get" not in path.read_text(), path


def test_services_never_import_one_another():
    done = subprocess.run([TOP / ".venv/bin/lint-imports"], cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
