"""Pieces of the page as HTML text: sections, tables, figures, and the frame around them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

CSS = """
:root { --ink: #22303c; --muted: #66727d; --line: #e3e7eb; --soft: #f6f8f9; --blue: #2f6690; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 15px/1.5 system-ui, -apple-system,
  "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 44px 0 6px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 22px 0 6px; }
p { margin: 6px 0 12px; max-width: 80ch; }
.muted, figcaption, .note { color: var(--muted); font-size: 13px; }
nav { margin: 14px 0 0; font-size: 13px; }
nav a { color: var(--blue); text-decoration: none; margin-right: 16px; white-space: nowrap; }
.facts { display: flex; flex-wrap: wrap; gap: 10px; margin: 20px 0 0; }
.fact { background: var(--soft); border-radius: 8px; padding: 10px 16px; min-width: 118px; }
.fact b { display: block; font-size: 21px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.fact span { color: var(--muted); font-size: 12.5px; }
.fact.bad b { color: #b3431e; }
table { border-collapse: collapse; font-size: 13.5px; margin: 8px 0 14px; }
th, td { text-align: left; padding: 4px 18px 4px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--muted); font-weight: 600; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font: 12.5px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
img.chart { display: block; width: 100%; height: auto; margin: 8px 0; }
img.chart.narrow { max-width: 720px; }
.strip { display: flex; align-items: center; gap: 14px; padding: 6px 0;
  border-bottom: 1px solid var(--line); break-inside: avoid; }
.strip .name { flex: 0 0 190px; overflow-wrap: anywhere; line-height: 1.3; }
.strip .tiles, .pairs { display: flex; flex-wrap: wrap; gap: 6px; }
.tile { width: 88px; height: 88px; display: block; border-radius: 4px; }
.pairs { gap: 18px 20px; margin: 10px 0; }
.pair { width: 182px; break-inside: avoid; }
.pair div { display: flex; gap: 6px; }
.pair figcaption { line-height: 1.35; margin-top: 4px; overflow-wrap: anywhere; font-size: 12px; }
figure { margin: 0; }
.badge { display: inline-block; border-radius: 9px; padding: 0 8px; font-size: 11.5px;
  color: #fff; vertical-align: 1px; }
.badge.head { background: #2f6690; } .badge.medium { background: #3a9d6e; }
.badge.tail { background: #e07a2f; } .badge.alert { background: #b3431e; }
details summary { cursor: pointer; color: var(--blue); font-size: 13.5px; margin: 8px 0; }
@media print {
  nav { display: none; } main { max-width: none; padding: 0; } h2 { break-after: avoid; }
  img.chart, table { break-inside: avoid; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        anchor: name that links go to.
        title: heading.
        body: HTML below the heading.
    """

    anchor: str
    title: str
    body: str


@dataclass(frozen=True)
class Fact:
    """A figure at the top of the page; `bad` draws the eye."""

    value: str
    label: str
    bad: bool = False


def page(title: str, subtitle: str, facts: Sequence[Fact], sections: Sequence[Section]) -> str:
    """The whole page; it needs no other file and no network."""
    links = " ".join(f'<a href="#{part.anchor}">{escape(part.title)}</a>' for part in sections)
    tiles = "".join(
        f'<div class="fact{" bad" if fact.bad else ""}"><b>{escape(fact.value)}</b>'
        f"<span>{escape(fact.label)}</span></div>"
        for fact in facts
    )
    bodies = "\n".join(
        f'<section id="{part.anchor}"><h2>{escape(part.title)}</h2>\n{part.body}</section>'
        for part in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body><main>"
        f'<h1>{escape(title)}</h1><p class="muted">{escape(subtitle)}</p>'
        f'<nav>{links}</nav><div class="facts">{tiles}</div>\n{bodies}\n</main></body></html>\n'
    )


def paragraph(text: str, note: bool = False) -> str:
    """A paragraph of plain text."""
    return f"<p{' class=note' if note else ''}>{escape(text)}</p>\n"


def table(
    header: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()
) -> str:
    """A table of plain values; `numbers` are the columns set flush right."""

    def cells(tag: str, values: Sequence[object]) -> str:
        return "".join(
            f"<{tag}{' class=n' if index in numbers else ''}>{_text(value)}</{tag}>"
            for index, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return f"<table><thead><tr>{cells('th', header)}</tr></thead><tbody>{body}</tbody></table>\n"


def chart(uri: str, text: str, narrow: bool = False) -> str:
    """A picture over the page's width; `text` says in words what it shows."""
    return f'<img class="chart{" narrow" if narrow else ""}" src="{uri}" alt="{escape(text)}">\n'


def tile(uri: str, text: str) -> str:
    """A small picture whose description shows under the pointer."""
    return f'<img class="tile" src="{uri}" alt="{escape(text)}" title="{escape(text)}">'


def badge(text: str, style: str) -> str:
    """A word on a coloured ground: head, medium, tail or alert."""
    return f'<span class="badge {style}">{escape(text)}</span>'


def pair(tiles: Sequence[str], caption: str, warning: str = "") -> str:
    """Two pictures side by side with a line below."""
    mark = f" {badge(warning, 'alert')}" if warning else ""
    return (
        f'<figure class="pair"><div>{"".join(tiles)}</div>'
        f"<figcaption>{escape(caption)}{mark}</figcaption></figure>"
    )


def folded(summary: str, body: str) -> str:
    """Something that opens with a click."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>\n"


def _text(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else escape(str(value))
