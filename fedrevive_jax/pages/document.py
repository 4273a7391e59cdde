"""A page: text, tables, pictures and charts in one HTML file, with the charts' library inside.

What comes from a user is escaped here, and nowhere else. Bokeh is imported when a page is put
together, so that a run's start does not wait for it.
"""

import base64
import html
import json
import urllib.parse
from collections.abc import Iterable, Sequence
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from fedrevive_jax.record import files


def plain(text: str) -> str:
    """A text that Bokeh does not take for TeX, for which it would want a network."""
    for mark in ("$$", r"\(", r"\["):
        text = text.replace(mark, f"{mark[0]}\u2060{mark[1]}")
    return text


# The browser itself sees to it that a page asks nothing of the network but of who serves it.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'"
)


class Page:
    """Put together from top to bottom."""

    def __init__(self, title: str, stamp: str | None = None, pictures: int = 300_000):
        """An empty page.

        Args:
          title: its heading.
          pictures: bytes of pictures that it has room for; those beyond are named, not shown.
          stamp: of a page that is served: what `stamp` of the same server answers as long as the
            page is up to date. It refreshes itself then.
        """
        self._title, self._stamp, self._room = title, stamp, pictures
        self._parts: list[str] = []
        self._charts: list[Any] = []
        self._markup(f"<h1>{html.escape(title)}</h1>")

    def _markup(self, text: str) -> None:
        self._parts.append(text)

    def heading(self, text: str) -> None:
        self._markup(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self._markup(f"<p>{html.escape(text)}</p>")

    def code(self, text: str) -> None:
        self._markup(f"<pre>{html.escape(text)}</pre>")

    def notes(self, notes: Iterable[str]) -> None:
        items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
        self._markup(f"<ul>{items}</ul>")

    def table(self, lines: Sequence[Sequence[str]], folded: str = "") -> None:
        """A table that sorts by the column that is clicked; the first line is its header.

        Args:
          lines: texts.
          folded: if given, what stands in its place until it is opened.
        """

        def row(cells, tag):
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        header, *body = lines
        inside = f"<thead>{row(header, 'th')}</thead><tbody>"
        inside += "".join(row(line, "td") for line in body) + "</tbody>"
        table = f'<div class="wide"><table>{inside}</table></div>'
        if folded:
            summary = f"<summary>{html.escape(folded)}</summary>"
            table = f"<details>{summary}{table}</details>"
        self._markup(table)

    def links(self, name: str, targets: Sequence[tuple[str, str]]) -> None:
        """A line of links.

        Args:
          name: what they are of.
          targets: texts, and the way to each from the folder of the page.
        """
        ways = [
            f'<a href="{html.escape(urllib.parse.quote(way))}">{html.escape(text)}</a>'
            for text, way in targets
        ]
        self._markup(f"<p>{html.escape(name)}: {', '.join(ways)}</p>")

    def picture(self, name: str, data: bytes, caption: str) -> None:
        """What a PNG file holds, or its name where there is no room for more."""
        words = html.escape(caption)
        if len(data) > self._room:
            self._markup(f"<p>{words} It is too large for this page: {html.escape(name)}</p>")
            return
        self._room -= len(data)
        source = "data:image/png;base64," + base64.b64encode(data).decode()
        image = f'<img alt="{html.escape(Path(name).stem)}" src="{source}">'
        self._markup(f"<figure>{image}<figcaption>{words}</figcaption></figure>")

    def switches(self, title: str, kind: str, names: dict[str, tuple[str, bool]]) -> None:
        """Boxes that show and hide what `charts` has tagged with `kind:name`.

        Args:
          title: before them.
          kind: what is switched.
          names: by name, the colour that stands beside it and whether it is on at first.
        """
        boxes = []
        for name, (color, on) in names.items():
            mark = f'<i style="background:{html.escape(color)}"></i>' if color else ""
            tag = html.escape(f"{kind}:{name}")
            checked = " checked" if on else ""
            boxes.append(
                f'<label><input type="checkbox" data-tag="{tag}"{checked}>{mark}'
                f"{html.escape(name)}</label>"
            )
        legend = f"<legend>{html.escape(title)}</legend>"
        self._markup(f'<fieldset class="switches">{legend}{"".join(boxes)}</fieldset>')

    def chart(self, chart: Any, *notes: str, half: bool = False) -> None:
        """A figure of Bokeh and what has to be said of it; two halves stand side by side."""
        place = f"chart{len(self._charts)}"
        self._charts.append(chart)
        words = html.escape(" ".join(note for note in notes if note))
        caption = f"<figcaption>{words}</figcaption>" if words else ""
        kind = ' class="half"' if half else ""
        self._markup(f'<figure{kind}><div class="chart" id="{place}"></div>{caption}</figure>')

    def html(self) -> str:
        """The whole file."""
        stamp = "" if self._stamp is None else f' data-stamp="{html.escape(self._stamp)}"'
        title = html.escape(self._title)
        head = (
            f'<!DOCTYPE html>\n<html lang="en"{stamp}>\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            f'<link rel="icon" href="data:,">\n<title>{title}</title>\n'
            f"<style>\n{_asset('page.css')}</style>\n</head>\n<body>\n"
        )
        return head + "\n".join(self._parts) + self._scripts() + "\n</body>\n</html>\n"

    def _scripts(self) -> str:
        library = data = ""
        if self._charts:
            from bokeh.document import Document
            from bokeh.resources import Resources

            document = Document()
            for chart in self._charts:
                document.add_root(chart)
            shown: Any = {
                "document": document.to_json(deferred=False),
                "roots": {chart.id: f"chart{i}" for i, chart in enumerate(self._charts)},
            }
            document.clear()  # its charts may be asked for again
            # Inside a script nothing but "<" could end it.
            text = json.dumps(shown, allow_nan=False).replace("<", "\\u003c")
            data = f'\n<script type="application/json" id="charts">{text}</script>'
            library = "\n" + Resources(mode="inline", components=["bokeh"]).render_js()
        return f"{data}{library}\n<script>\n{_asset('page.js')}</script>"

    def write(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        data = self.html().encode()
        files.write_whole(path, lambda stream: stream.write(data))


def _asset(name: str) -> str:
    return (resources("fedrevive_jax.pages") / name).read_text(encoding="utf-8")
