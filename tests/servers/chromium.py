"""The browser that the page's tests drive."""

from pathlib import Path

from tests.servers.installation import need_program

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> Path:
    return need_program(NAMES, package="chromium")
