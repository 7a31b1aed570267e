"""The colours of the drawn pictures, and their counterparts in the dark mode of the site.

A picture is kept as one SVG file in light colours. `hooks.py` makes the dark one from it.
"""

from __future__ import annotations

__all__ = [
    "ACCENT",
    "ACCENT_FILL",
    "BACKGROUND",
    "DARK",
    "FILL",
    "GRID",
    "MUTED",
    "TEXT",
    "in_dark",
]

BACKGROUND, TEXT, GRID, MUTED = "#ffffff", "#2f3542", "#e4e7ed", "#7d8797"
ACCENT, FILL, ACCENT_FILL = "#3949ab", "#f4f5f9", "#e8eafd"
WARM, WARM_FILL = "#b4530a", "#fdf0e3"

DARK = {
    BACKGROUND: "#1e2129",
    TEXT: "#e2e4e9",
    GRID: "#3b404d",
    MUTED: "#98a1b3",
    ACCENT: "#a5b0ff",
    FILL: "#282c37",
    ACCENT_FILL: "#2f3559",
    WARM: "#ffb774",
    WARM_FILL: "#43331f",
}


def in_dark(svg: str) -> str:
    """Returns a picture in dark colours."""
    for light, dark in DARK.items():
        svg = svg.replace(light, dark)
    return svg
