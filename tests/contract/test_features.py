"""docs/features.md is true: every route, recipe, setting and variant has a row, and every row's test exists."""

import dataclasses
import re
from pathlib import Path

import pytest

from inference.app import create_app
from shared.jobs import VARIANTS
from shared.settings import Settings
from training.recipes import RECIPES

TOP = Path(__file__).parents[2]
ROWS = [[cell.strip() for cell in line.strip("|\n ").split("|")]
        for line in (TOP / "docs" / "features.md").read_text().splitlines()
        if line.startswith("|") and not line.startswith(("|---", "| feature"))]
NAMED = {word for row in ROWS for word in re.findall(r"`([^`]+)`", row[0])}


def routes():
    app = create_app(Settings(artifacts=Path("/nonexistent"), device="cpu"))
    return sorted(f"{method} {rule.rule}" for rule in app.url_map.iter_rules()
                  for method in rule.methods - {"HEAD", "OPTIONS"})


@pytest.mark.parametrize("route", routes())
def test_every_route_has_a_row(route):
    assert route in NAMED


@pytest.mark.parametrize("name", [*RECIPES, *VARIANTS, *(f.name.upper() for f in dataclasses.fields(Settings))])
def test_every_recipe_variant_and_setting_has_a_row(name):
    assert name in NAMED


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_every_row_names_a_test_that_exists(row):
    feature, test = row
    path, _, name = test.strip("`").partition("::")
    assert (TOP / path).is_file(), f"{feature}: no file {path}"
    assert re.search(rf"^def {name}\(", (TOP / path).read_text(), re.M), f"{feature}: no {name} in {path}"
