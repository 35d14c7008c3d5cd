"""What the tests of the report read out of its page, with the standard library's parser."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "hr", "input"}
SHAPES = {"polyline"}  # of SVG, which close themselves


class Page(HTMLParser):
    """Elements by name with their attributes, ids, the text of each section, and tables as rows of cells' texts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.mistakes: list[str] = []
        self.text: dict[str, str] = {}
        self.tables: dict[str, list[list[list[str]]]] = {}
        self._open: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        self.mistakes += [f"<{name}> is never closed" for name, _ in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if len({name for name, _ in attrs}) < len(attrs):
            self.mistakes.append(f"<{tag}> has an attribute twice")
        if tag not in VOID:
            self._open.append((tag, dict(attrs).get("id")))
        tables = self.tables.setdefault(self.section, [])
        if tag == "table":
            tables.append([])
        elif tag == "tr":
            tables[-1].append([])
        elif tag in ("td", "th"):
            tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in SHAPES:
            self.mistakes.append(f"<{tag}/> closes itself")

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1][0] != tag:
            self.mistakes.append(f"</{tag}> at {self.getpos()} closes {self._open[-1:]}")
        else:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] == "style":
            return
        self.text[self.section] = self.text.get(self.section, "") + data
        if any(name in ("td", "th") for name, _ in self._open):
            self.tables[self.section][-1][-1][-1] += data.strip()

    @property
    def section(self) -> str:
        """The id of the section that is being read."""
        return next((ident or "" for name, ident in reversed(self._open) if name == "section"), "")

    @property
    def ids(self) -> list[str]:
        return [str(attributes["id"]) for _, attributes in self.elements if "id" in attributes]

    @property
    def addresses(self) -> list[str]:
        """Everything that a browser might fetch or lead to."""
        names = ("src", "href", "srcset", "data", "action", "poster", "xlink:href")
        return [str(attributes[name]) for _, attributes in self.elements for name in names if name in attributes]
