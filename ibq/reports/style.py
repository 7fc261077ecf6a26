"""The report's style sheet: light and dark, narrow and wide, screen and paper."""

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
STYLE = (
    f"{COLORS}"
    """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main { max-width: 1080px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 40px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.02em; margin: 0; }
.lead { color: var(--soft); font-size: 17px; margin: 8px 0 0; max-width: 75ch; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 22px 24px 24px;
  margin: 18px 0; scroll-margin-top: 12px; }
section > h2 { font-size: 19px; letter-spacing: -.01em; margin: 0 0 8px; }
section > p { margin: 0 0 16px; max-width: 85ch; }
h3 { font-size: 14px; margin: 20px 0 8px; }
.soft, em { color: var(--soft); font-style: normal; }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 14px; }
nav a { color: var(--s0); text-decoration: none; }
nav a:hover { text-decoration: underline; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 14px; margin: 26px 0 18px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px; }
.card h2 { font-size: 13px; font-weight: 600; color: var(--soft); margin: 0; }
.card p { margin: 0; font-size: 13px; }
.card .value { font-size: 30px; font-weight: 650; letter-spacing: -.02em; line-height: 1.3; white-space: nowrap; }
.card .good, .card .bad { font-weight: 600; }
.value small { font-size: 14px; font-weight: 400; letter-spacing: 0; color: var(--soft); }
.good { color: var(--good); } .bad { color: var(--bad); }
img { display: block; max-width: 100%; height: auto; image-rendering: pixelated; border-radius: 4px; background: #fff; }
img.smooth { image-rendering: auto; }
.rows { display: grid; grid-template-columns: 116px 1fr; gap: 8px 12px; align-items: center; margin: 0;
  break-inside: avoid; }
.rows + .rows { border-top: 1px solid var(--line); margin-top: 18px; padding-top: 18px; }
.rows dt { font-size: 13px; font-weight: 600; }
.rows dd { margin: 0; display: grid; grid-template-columns: repeat(8, minmax(0, max-content)); gap: 8px; }
.keys { white-space: nowrap; font-size: 13px; }
.pairs { list-style: none; margin: 0; padding: 0; display: grid; gap: 12px 10px;
  grid-template-columns: repeat(auto-fill, minmax(218px, 1fr)); }
.pair { display: flex; gap: 4px; padding: 5px; border: 1px solid var(--line); border-radius: 8px; break-inside: avoid;
  justify-self: start; }
.pair img { border: 2px solid var(--s5); box-sizing: content-box; max-width: calc(50% - 6px); }
.pair img:first-child { border-color: var(--s0); }
.classes h3 { break-after: avoid; }
.charts { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 22px 30px; }
.charts.columns2 { grid-template-columns: repeat(2, minmax(0, 1fr)); }
.charts.columns1 { grid-template-columns: minmax(0, 640px); }
figure { margin: 0; break-inside: avoid; }
.chart { display: flex; flex-direction: column; justify-content: space-between; }
figcaption { font-size: 13.5px; margin-bottom: 6px; }
figcaption b .soft { font-weight: 400; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0 16px; margin: 2px 0 0; padding: 0;
  font-size: 12.5px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 11.5px; font-variant-numeric: tabular-nums; }
.bar { display: flex; gap: 2px; height: 26px; border-radius: 5px; overflow: hidden; }
.bar i { background: var(--c); min-width: 1px; }
.key { display: inline-block; width: 16px; border-top: 3px solid var(--c); margin-right: 6px; vertical-align: middle; }
.key.dashed, .key.dashdot { width: 21px; border-top-style: dashed; }
.key.dotted { width: 21px; border-top-style: dotted; }
.key.area, .key.sampled, .key.found { width: 11px; height: 11px; border: 0; background: var(--c); border-radius: 2px; }
.key.sampled, .key.found { border: 2px solid var(--s0); margin-left: 8px; background: none; }
.key.found { border-color: var(--s5); }
.unused { opacity: .14; }
.beside { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 1fr); gap: 30px; align-items: center; }
.facts { list-style: none; margin: 0; padding: 0; color: var(--soft); font-size: 13.5px; }
.facts li { padding: 10px 0; border-bottom: 1px solid var(--line); } .facts li:last-child { border: 0; }
.facts b { display: block; color: var(--ink); font-size: 21px; line-height: 1.3; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 7px 18px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; font-size: 12.5px; }
tbody th { font-weight: 600; white-space: nowrap; } tbody tr:last-child > * { border: 0; }
.better, .number { white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
thead th:nth-child(2) { text-align: right; }
td:last-child { color: var(--soft); }
.commands { margin: 0; padding-left: 22px; } .commands li { margin: 0 0 14px; } .commands li:last-child { margin: 0; }
pre { background: var(--code); border-radius: 8px; padding: 10px 14px; margin: 5px 0 0; white-space: pre-wrap;
  overflow-wrap: anywhere; user-select: all;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font: inherit; }
@media screen and (max-width: 760px) {
  section { padding: 16px; } header { padding-top: 24px; } h1 { font-size: 25px; }
  .rows { grid-template-columns: 1fr; gap: 3px; } .rows dd { gap: 4px; margin-bottom: 6px; }
  .beside, .charts, .charts.columns2 { grid-template-columns: minmax(0, 1fr); }
  .columns2 text { font-size: 15px; } .columns1 text, .beside text { font-size: 19px; }
  .pairs { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px; } }
@media print {
  body { background: #fff; font-size: 11pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  nav { display: none; } section { border: 0; padding: 0; margin: 22px 0; }
  header, main { max-width: none; padding: 0; }
  .cards, .pairs { grid-template-columns: repeat(4, minmax(0, 1fr)); } .card { padding: 10px 12px; }
  .card .value { font-size: 22px; } .value small { font-size: 11px; } .rows { grid-template-columns: 112px 1fr; }
  h2, h3, section > p { break-after: avoid; } .pairs { break-inside: avoid; } tr, .card, pre { break-inside: avoid; } }
"""
)
