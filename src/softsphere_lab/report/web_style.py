"""The style sheet and the script of a page, which stands alone and loads nothing."""

from __future__ import annotations

__all__ = ["COLOURS", "SCRIPT", "STYLE"]

# How many colours the style sheet has; curves beyond them are dashed.
COLOURS = 8

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f5f6fa; --card: #ffffff; --ink: #1f2430; --soft: #565e6f; --line: #dfe3ea;
  --accent: #3949ab; --warn: #8a4200; --warn-card: #fdf0e3;
  --c0: #3949ab; --c1: #c2410c; --c2: #0f7b6c; --c3: #a21caf;
  --c4: #8a6100; --c5: #0b72b5; --c6: #be123c; --c7: #4d7c0f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14161c; --card: #1e2129; --ink: #e6e8ee; --soft: #a3abba; --line: #363c49;
    --accent: #a5b0ff; --warn: #ffb774; --warn-card: #3a2c1c;
    --c0: #a5b0ff; --c1: #ff9a62; --c2: #4fd1bd; --c3: #f08bf7;
    --c4: #e8c04a; --c5: #6cc4ff; --c6: #ff8fa3; --c7: #a7d65c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 3rem; }
header p { margin: 0; color: var(--soft); }
header .kicker {
  color: var(--accent); font-weight: 600; font-size: .85rem; letter-spacing: .04em;
}
h1 { margin: .2rem 0 .3rem; font-size: 2rem; line-height: 1.2; letter-spacing: -.01em; }
h2 { margin: 0 0 .75rem; font-size: 1.15rem; }
section {
  margin-top: 1.25rem; padding: 1.25rem 1.5rem;
  background: var(--card); border: 1px solid var(--line); border-radius: .75rem;
}
section > :last-child { margin-bottom: 0; }
.found { font-size: 1.1rem; }
.unfinished {
  padding: .6rem .9rem; border-radius: .5rem; background: var(--warn-card); color: var(--warn);
}
.note { color: var(--soft); font-size: .875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .875rem; padding-bottom: .5rem; }
th, td {
  padding: .45rem .75rem; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap;
}
thead th { color: var(--soft); font-size: .8125rem; font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; }
.facts th { font-weight: 500; color: var(--soft); width: 14rem; vertical-align: top; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
figure { margin: 0; position: relative; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg .name { fill: var(--ink); font-weight: 600; font-size: 13px; }
svg .grid { stroke: var(--line); }
svg .rule { stroke: var(--soft); stroke-dasharray: 3 3; visibility: hidden; }
svg .curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .range { opacity: .12; stroke: none; }
svg .seed { opacity: .55; }
svg .interval { stroke-width: 2; }
.narrow { display: none; }
@media (max-width: 44rem) {
  main { padding: 1.5rem .75rem 2rem; }
  h1 { font-size: 1.6rem; }
  section { padding: 1rem; }
  .wide { display: none; }
  .narrow { display: block; }
  .facts th { width: 8rem; white-space: normal; }
}
.chart:focus-visible, .scroll:focus-visible, button:focus-visible, summary:focus-visible {
  outline: 2px solid var(--accent); outline-offset: 3px; border-radius: .25rem;
}
.legend { display: flex; flex-wrap: wrap; gap: .4rem; margin: .5rem 0 0; padding: 0; }
.legend button {
  display: flex; align-items: center; gap: .45rem; padding: .25rem .6rem; cursor: pointer;
  font: inherit; font-size: .875rem; color: var(--ink);
  background: none; border: 1px solid var(--line); border-radius: 99px;
}
.legend button[aria-pressed="false"] { color: var(--soft); text-decoration: line-through; }
.legend i { width: 1.1rem; border-top: 3px solid; }
.legend i.dashed { border-top-style: dashed; }
.off { display: none; }
.tip {
  position: absolute; top: 0; z-index: 1; padding: .5rem .7rem; pointer-events: none;
  font-size: .8125rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; box-shadow: 0 4px 16px rgb(0 0 0 / .18);
}
.tip[hidden] { display: none; }
.tip b { display: block; margin-bottom: .15rem; }
.tip span { display: flex; justify-content: space-between; gap: 1.25rem; }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--accent); }
footer { margin-top: 1.5rem; color: var(--soft); font-size: .875rem; }
@media print { section { break-inside: avoid; } .legend, details { display: none; } }
"""

SCRIPT = """
const data = JSON.parse(document.getElementById('curves').textContent);
const figure = document.querySelector('.curves');
const tip = figure.querySelector('.tip');
const hidden = new Set();
let at = -1;

function show(chart, place) {
  at = Math.max(0, Math.min(data.epochs.length - 1, place));
  const { left, right, width } = chart.dataset;
  const few = Math.max(1, data.epochs.at(-1) - data.epochs[0]);
  const share = (data.epochs[at] - data.epochs[0]) / few;
  const x = +left + share * (right - left);
  const rule = chart.querySelector('.rule');
  rule.setAttribute('x1', x);
  rule.setAttribute('x2', x);
  rule.style.visibility = 'visible';
  const rows = data.curves
    .map((curve, i) => ({ name: curve.name, i, value: curve.means[at] }))
    .filter(row => !hidden.has(row.i) && row.value !== null)
    .sort((a, b) => a.value - b.value);
  tip.replaceChildren();
  const head = document.createElement('b');
  head.textContent = `epoch ${data.epochs[at]}`;
  tip.append(head);
  for (const row of rows) {
    const line = document.createElement('span');
    const name = document.createElement('em');
    name.textContent = row.name;
    name.style.color = `var(--c${row.i % data.colours})`;
    name.style.fontStyle = 'normal';
    line.append(name, `${row.value.toFixed(2)} %`);
    tip.append(line);
  }
  tip.hidden = false;
  const middle = x / width * chart.clientWidth;
  const room = figure.clientWidth - tip.offsetWidth;
  const beside = middle < figure.clientWidth / 2 ? middle + 12 : middle - tip.offsetWidth - 12;
  tip.style.left = `${Math.max(0, Math.min(room, beside))}px`;
}

function hide(chart) {
  tip.hidden = true;
  chart.querySelector('.rule').style.visibility = 'hidden';
}

for (const chart of figure.querySelectorAll('.chart')) {
  chart.addEventListener('pointermove', event => {
    const box = chart.getBoundingClientRect();
    const { left, right, width } = chart.dataset;
    const share = ((event.clientX - box.left) / box.width * width - left) / (right - left);
    const epoch = data.epochs[0] + share * (data.epochs.at(-1) - data.epochs[0]);
    const far = data.epochs.map(each => Math.abs(each - epoch));
    show(chart, far.indexOf(Math.min(...far)));
  });
  chart.addEventListener('pointerleave', () => hide(chart));
  chart.addEventListener('blur', () => hide(chart));
  chart.addEventListener('keydown', event => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) { event.preventDefault(); show(chart, at + by); }
    if (event.key === 'Escape') hide(chart);
  });
}

for (const button of figure.querySelectorAll('.legend button')) {
  button.addEventListener('click', () => {
    const on = button.getAttribute('aria-pressed') === 'false';
    const i = +button.dataset.curve;
    button.setAttribute('aria-pressed', on);
    on ? hidden.delete(i) : hidden.add(i);
    const parts = figure.querySelectorAll(`[data-of="${i}"]`);
    parts.forEach(part => part.classList.toggle('off', !on));
  });
}
"""
