"""The report's style sheet: light and dark, narrow and wide, screen and paper."""

STYLE = """
:root { --page: #f6f7f9; --card: #fff; --ink: #1b2230; --soft: #5c6675; --line: #dfe3e9; --grid: #e9ecf0;
  --good: #14794a; --bad: #b4391f; --accent: #2f6fd0; --code: #eef1f5;
  --s0: #2f6fd0; --s1: #d9730d; --s2: #17906a; --s3: #9a56c4; --s4: #c43d5f; --s5: #7b8594; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #11151b; --card: #191f28; --ink: #e7ebf1; --soft: #9aa6b6; --line: #2c3542; --grid: #262e39;
    --good: #58c98f; --bad: #f08b72; --accent: #76aaf5; --code: #222a35;
    --s0: #76aaf5; --s1: #f0a355; --s2: #4dc39c; --s3: #c493e6; --s4: #ee8aa2; --s5: #98a2b1; } }
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
nav a { color: var(--accent); text-decoration: none; }
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
svg.wide { height: 26px; border-radius: 5px; }
svg text { font-size: 11.5px; fill: var(--soft); font-family: inherit; font-variant-numeric: tabular-nums; }
svg .on { paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
.middle { text-anchor: middle; } .end { text-anchor: end; }
.grid { stroke: var(--grid); } .axis, .tick { stroke: var(--soft); opacity: .7; fill: none; }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.dot { fill: var(--c); } .fill { fill: var(--c); } .band { fill: var(--c); opacity: .16; }
svg .area { fill: var(--c); opacity: .75; }
.unused { fill: var(--soft); opacity: .14; }
.reference { fill: none; stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 6 4; }
.reference.r1 { stroke-dasharray: 2 3; } .reference.r2 { stroke-dasharray: 10 3 2 3; }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .s3 { --c: var(--s3); } .s4 { --c: var(--s4); }
.s5 { --c: var(--s5); }
.key { display: inline-block; width: 16px; height: 3px; border-radius: 2px; background: var(--c); margin-right: 6px;
  vertical-align: middle; }
.key.area, .key.unused, .key.sampled, .key.found { width: 11px; height: 11px; }
.key.sampled, .key.found { border: 2px solid var(--s0); margin-left: 8px; } .key.found { border-color: var(--s5); }
.key.unused { background: var(--soft); }
.key.reference { background: none; height: 0; width: 21px; border-radius: 0; border-top: 1.5px dashed var(--soft); }
.key.r1 { border-top-style: dotted; }
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
