"""`.env.example` against the settings and compose.yaml: what a user reads there is what the code does."""

import dataclasses
import re
from pathlib import Path

from shared.settings import DESCRIPTIONS, Settings

ROOT = Path(__file__).parents[2]
COMPOSE_ONLY = {"TENSORBOARD_PORT", "WORKER_MEMORY", "INFERENCE_MEMORY"}
OTHER_IN_COMPOSE = {"IMPORTS"}  # a folder of the host, where the setting is the mount's place in the container


def documented() -> dict[str, tuple[str, str]]:
    """Variable -> (default, the comment above it)."""
    found = re.findall(r"^# (.*)\n#([A-Z0-9_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    return {name: (default, comment) for comment, name, default in found}


def test_every_setting_and_nothing_else_is_documented():
    assert set(documented()) == {f.name.upper() for f in dataclasses.fields(Settings)} | COMPOSE_ONLY


def test_documented_defaults_and_descriptions_are_the_settings():
    for field in dataclasses.fields(Settings):
        name = field.name.upper()
        if name not in OTHER_IN_COMPOSE:
            assert documented()[name] == (str(field.default), DESCRIPTIONS[field.name])


def test_every_variable_that_compose_reads_is_documented_with_its_default():
    read = re.findall(r"\$\{([A-Z0-9_]+):-([^}]*)\}", (ROOT / "compose.yaml").read_text())
    assert read
    for name, default in read:
        assert default in ("", documented()[name][0]), name


def test_compose_passes_on_or_sets_every_setting():
    text = (ROOT / "compose.yaml").read_text() + (ROOT / "services" / "device.yaml").read_text()
    for field in dataclasses.fields(Settings):
        assert re.search(rf"\b{field.name.upper()}: ", text), field.name
