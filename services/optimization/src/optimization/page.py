"""The release card as a page."""
from html import escape


def render(card):
    return f"<!doctype html><title>{escape(card['name'])}</title>"
