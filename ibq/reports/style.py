"""The report's style sheet: light and dark, narrow and wide, screen and paper; its rules are in style.css."""

from pathlib import Path

LIGHT = {
    "page": "#f6f7f9", "card": "#ffffff", "ink": "#1b2230", "soft": "#5c6675", "line": "#dfe3e9", "grid": "#e9ecf0",
    "good": "#14794a", "bad": "#b4391f", "code": "#eef1f5",
    "s0": "#2f6fd0", "s1": "#d9730d", "s2": "#17906a", "s3": "#9a56c4", "s4": "#c43d5f", "s5": "#7b8594",
}  # fmt: skip
DARK = {
    "page": "#11151b", "card": "#191f28", "ink": "#e7ebf1", "soft": "#9aa6b6", "line": "#2c3542", "grid": "#262e39",
    "good": "#58c98f", "bad": "#f08b72", "code": "#222a35",
    "s0": "#76aaf5", "s1": "#f0a355", "s2": "#4dc39c", "s3": "#c493e6", "s4": "#ee8aa2", "s5": "#98a2b1",
}  # fmt: skip
_LIGHT, _DARK = (" ".join(f"--{name}: {color};" for name, color in colors.items()) for colors in (LIGHT, DARK))
COLORS = f"""
:root {{ {_LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
"""
STYLE = COLORS + Path(__file__).with_suffix(".css").read_text("utf-8")
