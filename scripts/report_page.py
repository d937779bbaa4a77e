"""One HTML page without anything outside itself: tables, flags and inline SVG; no script is needed to read it.

The script sorts tables by a click on a column's head. The page's own policy forbids every request. All text is escaped here.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arms import Flag
    from report_plots import Plot


@dataclass(frozen=True)
class Cell:
    """What is shown, and the number that it sorts by (None: by its text, or last among numbers)."""
    text: str
    number: float | None = None


@dataclass(frozen=True)
class Table:
    """`heads` names the columns; those of `numeric` are set right. `main` is the column that names the row."""
    name: str
    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: frozenset[str]
    main: str


STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2126; --soft: #59626b; --rule: #dde1e5; --panel: #f5f7f8;
  --good: #14703a; --bad: #b3261e; --warn: #8a5300; --warn-panel: #fff5e0; --link: #1f5fa8; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e4e7ea; --soft: #9aa4ad; --rule: #343a40;
  --panel: #1c2024; --good: #6fcf8e; --bad: #ff8a80; --warn: #f2bd63; --warn-panel: #2d2415; --link: #86b8f0; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 76rem; padding: 1.25rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p { margin: .3rem 0 .6rem; max-width: 60rem; }
a { color: var(--link); }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; max-width: 100%; border: 1px solid var(--rule); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: .35rem .7rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { background: var(--panel); font-weight: 600; color: var(--soft); vertical-align: bottom; }
th[scope=row] { font-weight: 600; }
.number { text-align: right; }
.wide { white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
td.empty { color: var(--soft); }
thead button { all: unset; cursor: pointer; }
thead button:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.verdict { font-weight: 700; }
.better { color: var(--good); } .worse { color: var(--bad); } .underpowered { color: var(--warn); }
.flags { list-style: none; margin: 0; padding: 0; }
.flags li { background: var(--warn-panel); border-left: 4px solid var(--warn); border-radius: 3px; padding: .4rem .75rem;
  margin: .4rem 0; }
.flags b { color: var(--warn); }
.badge { display: inline-block; background: var(--warn-panel); color: var(--warn); border-radius: 3px; padding: 0 .5rem;
  font-weight: 600; text-decoration: none; border: 1px solid var(--warn); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.5rem 1.75rem; }
figure { margin: 0; min-width: 0; }
figure h3 { margin-top: 0; }
figure .scroll { border: 0; }
svg { display: block; width: 100%; min-width: 28rem; height: auto; }
svg text { font-family: inherit !important; }
dl { margin: 0; max-width: 60rem; } dt { font-weight: 600; } dd { margin: 0 0 .5rem; }
@media (max-width: 34rem) { th[scope=row] { position: sticky; left: 0; background: var(--paper); max-width: 9rem;
  white-space: normal; overflow-wrap: anywhere; } th, td { padding: .3rem .5rem; } .wide { min-width: 9rem; } }
@media print { .scroll { overflow: visible; } }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const key = row => row.cells[column].dataset.number;
      const order = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x !== undefined && y !== undefined) return sign * (x - y);
        if (x !== undefined || y !== undefined) return x === undefined ? 1 : -1;
        return sign * row_text(a, column).localeCompare(row_text(b, column), undefined, {numeric: true});
      };
      body.append(...[...body.rows].sort(order));
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    });
  });
}
function row_text(row, column) { return row.cells[column].textContent; }
"""

POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none';"
          " form-action 'none'")


@dataclass(frozen=True)
class Page:
    """What the page says, in reading order."""
    title: str
    headline: str
    facts: str
    verdicts: Sequence[Table]
    flags: Sequence[Flag]
    plots: Sequence[Plot]
    runs: Table
    legend: Sequence[tuple[str, str]]       # (term, sentence)


def html_cell(table: Table, head: str, cell: Cell) -> str:
    """One cell; a verdict's word is also its class."""
    kinds = [name for name, wanted in (
        ("number", head in table.numeric), ("empty", cell.text == "-"), ("wide", len(cell.text) > 60),
        (f"verdict {cell.text.replace(' ', '-')}", head == "verdict")) if wanted]
    shape = f' class="{" ".join(kinds)}"' if kinds else ""
    number = "" if cell.number is None else f' data-number="{cell.number!r}"'
    tag, scope = ("th", ' scope="row"') if head == table.main else ("td", "")
    return f"<{tag}{scope}{shape}{number}>{escape(cell.text)}</{tag}>"


def html_table(table: Table) -> str:
    """A table in a box of its own that scrolls."""
    heads = "".join(f'<th scope="col"{" class=number" * (head in table.numeric)}>{escape(head)}</th>'
                    for head in table.heads)
    rows = "\n".join(
        f"<tr>{''.join(html_cell(table, head, cell) for head, cell in zip(table.heads, row, strict=True))}</tr>"
        for row in table.rows)
    title = escape(table.title)
    return (f'<h3>{title}</h3>\n<div class="scroll" tabindex="0" role="region" aria-label="{title}">\n'
            f'<table id="{table.name}"><thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>')


def html_flags(flags: Sequence[Flag]) -> str:
    if not flags:
        return '<p class="soft">None found.</p>'
    rows = joined(f"<li><b>{escape(flag.kind)}</b>: {escape(flag.text)}</li>" for flag in flags)
    return f'<ul class="flags">\n{rows}\n</ul>'


def html_plot(plot: Plot) -> str:
    """A figure that scrolls by itself where the screen is narrower than its text allows."""
    svg = plot.svg.replace("<svg ", f'<svg role="img" aria-label="{escape(plot.alt)}" ', 1)
    return (f'<figure id="plot-{plot.name}"><h3>{escape(plot.title)}</h3>\n<div class="scroll">{svg}</div>\n'
            f"<figcaption>{escape(plot.caption)}</figcaption></figure>")


def joined(pieces: Iterable[str]) -> str:
    return "\n".join(pieces)


def page(content: Page) -> str:
    """The whole document."""
    count = len(content.flags)
    badge = f'<p><a class="badge" href="#flags">{count} flag{"s" * (count != 1)}: read before the numbers</a></p>'
    terms = joined(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in content.legend)
    plots = joined(map(html_plot, content.plots)) or '<p class="soft">No run with a score.</p>'
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(content.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(content.title)}</h1>
<p>{escape(content.headline)}</p>
<p class="soft">{escape(content.facts)}</p>
{badge * bool(count)}
</header>
<main>
<section id="verdicts"><h2>Verdicts</h2>
{joined(map(html_table, content.verdicts))}
</section>
<section id="flags"><h2>Flags</h2>
{html_flags(content.flags)}
</section>
<section id="plots"><h2>Plots</h2>
<div class="plots">
{plots}
</div>
</section>
<section id="all-runs"><h2>Runs</h2>
{html_table(content.runs)}
</section>
<section id="computed"><h2>How it was computed</h2>
<dl>
{terms}
</dl>
</section>
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""
