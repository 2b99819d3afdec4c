"""GET /: the page for people. Its script talks to the same routes as every other client."""

from flask import Blueprint, render_template

bp = Blueprint("page", __name__)


@bp.get("/")
def index() -> str:
    return render_template("index.html")
