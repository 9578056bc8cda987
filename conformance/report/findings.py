"""Findings that were reproduced by hand: Markdown files, and scripts beside them, as pages of the site.

The first line of a file may say which results it explains, each by what ``--subject`` was, with a release or for all:
``<!-- subjects: litgpt 0.5.13, litgpt-lora -->``. A heading names the clauses that its section is about:
``## 1. INIT-2, INIT-12 (must): the title``.

HTML in the files is shown as text, images are not loaded, and of the links those remain that lead to another page of
the site, to a place on the same page, or to the web.
"""

import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import OptionsDict
from markupsafe import Markup, escape

from conformance.errors import UsageError
from conformance.reading import read_text
from conformance.report.rendering import slug_of
from conformance.report.result import Report

MOST = 1 << 20
"""Bytes of a finding or a script. The longest that the project has, of seven findings, has 30 kB."""
SUBJECTS = re.compile(r"\A<!-- subjects: (.*?) -->\s*")
CLAUSE = re.compile(r"\b[A-Z]+-[0-9]+\b")
Environment = MutableMapping[str, Any]
"""What markdown-it hands to the functions that draw: here the scripts, and the names of those already shown."""


@dataclass(frozen=True)
class Section:
    """A heading, and what stands below it."""

    level: int
    """Of the heading: 1 to 6; 0 for the first of level 1, which is that of the page, and for what stands before any."""
    anchor: str
    title: str
    heading: Markup
    clauses: tuple[str, ...]
    """Ids that the heading names."""
    body: Markup


@dataclass(frozen=True)
class Finding:
    """A file of findings."""

    slug: str
    title: str
    subjects: tuple[tuple[str, str], ...]
    """What ``--subject`` was, and the release; empty for all releases."""
    sections: tuple[Section, ...]
    named: frozenset[str]
    """Ids of clauses anywhere in the text."""

    @property
    def page(self) -> str:
        """The name of its file."""
        return f"{self.slug}.html"

    @property
    def about(self) -> str:
        """Its title in a list of such pages."""
        return self.title.removeprefix("Findings in ").removesuffix(", reproduced by hand")

    @property
    def numbered(self) -> list[Section]:
        """The sections that are one finding each."""
        return [section for section in self.sections if re.match(r"\d+\. ", section.title)]

    def explains(self, report: Report) -> bool:
        """Return whether it says that it is about a result."""
        release = report.version.partition(",")[0]
        return any(spec == report.spec and of in ("", release) for spec, of in self.subjects)


def read_findings(folder: Path) -> list[Finding]:
    """Return what the Markdown files of a folder hold, with the scripts beside them, in the order of their names.

    Raises:
        UsageError: if there is no such folder, it has no such file, or one cannot be read.
    """
    try:
        paths, beside = (sorted(folder.glob(pattern)) if folder.is_dir() else [] for pattern in ("*.md", "*.py"))
    except (OSError, ValueError) as error:  # a name that is too long; NUL
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"the folder of findings {str(folder)!r} cannot be read: {why}.") from error
    if not paths:
        raise UsageError(f"the folder of findings {folder} has no file *.md: give the folder that holds them.")
    texts = {path.name: read_text(path, "finding", MOST) for path in paths}
    scripts = {path.name: read_text(path, "script", MOST) for path in beside}
    slugs: dict[str, str] = {}
    for name in texts:
        slugs[name] = slug_of(f"finding-{name.removesuffix('.md')}", slugs.values(), "finding")
    return [read_finding(source, slugs[name], slugs, scripts) for name, source in texts.items()]


def read_finding(source: str, slug: str, slugs: Mapping[str, str], scripts: Mapping[str, str]) -> Finding:
    """Return what a file holds.

    Args:
        source: the text of the file.
        slug: the name of its page, without the ending.
        slugs: those of all files, by the name of the file.
        scripts: their texts, by the name of the file.
    """
    subjects = SUBJECTS.match(source)
    source = source[subjects.end() :] if subjects else source
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    for rule in (text, fence, table_open, table_close):
        markdown.add_render_rule(rule.__name__, rule)
    environment: dict[str, Any] = {"scripts": scripts, "shown": set()}
    tokens = markdown.parse(source, environment)
    for token in tokens:
        token.attrs.pop("style", None)  # alignment, which the pages' policy does not let through
        if token.children is not None:
            token.children = with_links(token.children, slugs)
    sections, taken = sections_of(tokens, markdown, environment)
    also = [file for file in dict.fromkeys(re.findall(r"[\w.-]+\.py\b", source)) if file in scripts]
    if rest := Markup("").join(script(file, environment) for file in also):
        heading = "Scripts that are named above"
        sections.append(Section(2, anchor_of(heading, taken), heading, Markup(heading), (), rest))
    title = next((section.title for section in sections if section.level == 0 and section.anchor), slug)
    entries = (entry.split() for entry in (subjects[1] if subjects else "").split(",") if entry.strip())
    return Finding(
        slug,
        title,
        tuple((spec, " ".join(release)) for spec, *release in entries),
        tuple(sections),
        frozenset(CLAUSE.findall(source)),
    )


def sections_of(
    tokens: Sequence[Token], markdown: MarkdownIt, environment: Environment
) -> tuple[list[Section], set[str]]:
    """Return the sections of a file, and their anchors."""
    heads = [at for at, token in enumerate(tokens) if token.type == "heading_open" and not token.level]
    found: list[Section] = []
    taken: set[str] = set()
    first = True  # of the headings of level 1
    for begin, end in pairwise(dict.fromkeys([0, *heads, len(tokens)])):
        if begin not in heads:
            body = markdown.renderer.render(tokens[begin:end], markdown.options, environment)
            found.append(Section(0, "", "", Markup(""), (), Markup(body)))
            continue
        level, inline = int(tokens[begin].tag[1]), tokens[begin + 1]
        if level == 1 and first:
            level, first = 0, False
        title = re.sub(r"[`*]", "", inline.content)
        heading = markdown.renderer.render([inline], markdown.options, environment)
        body = markdown.renderer.render(tokens[begin + 3 : end], markdown.options, environment)
        clauses = CLAUSE.findall(title.partition(":")[0])
        found.append(Section(level, anchor_of(title, taken), title, Markup(heading), tuple(clauses), Markup(body)))
    return found, taken


def explained(findings: Sequence[Finding], report: Report) -> dict[str, list[tuple[str, str]]]:
    """Return link and title of what explains each clause of a result.

    These are the sections whose headings name the clause. Where there is none, they are the pages whose text does.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    own = [finding for finding in findings if finding.explains(report)]
    for finding in own:
        for section in finding.sections:
            for identity in section.clauses:
                found.setdefault(identity, []).append((f"{finding.page}#{section.anchor}", section.title))
    for identity in report.verdicts:
        if identity not in found:
            found[identity] = [(finding.page, finding.title) for finding in own if identity in finding.named]
    return found


def anchor_of(title: str, taken: set[str]) -> str:
    """Return the anchor that GitHub gives to a heading, and take it."""
    anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") or "section"
    numbers = (f"{anchor}-{number}" for number in range(1, len(taken) + 2))
    anchor = next(name for name in (anchor, *numbers) if name not in taken)
    taken.add(anchor)
    return anchor


def with_links(children: Sequence[Token], slugs: Mapping[str, str]) -> list[Token]:
    """Return the parts of a line, with links to other findings turned into links to their pages, and no dead ones."""
    kept: list[Token] = []
    dropped: list[bool] = []  # of the links that are open
    for token in children:
        if token.type == "link_open":
            file, _, fragment = str(token.attrs.get("href", "")).partition("#")
            page = f"{slugs[file]}.html" if file in slugs else ""
            live = bool(page or not file or re.match(r"https?://", file))
            dropped.append(not live)
            if live and not re.match(r"https?://", file):
                token.attrs = {"href": page + (f"#{fragment}" if fragment else "")}
        if token.type not in ("link_open", "link_close") or not dropped[-1]:
            kept.append(token)
        if token.type == "link_close":
            dropped.pop()
    return kept


# what is drawn otherwise than markdown-it draws it ------------------------------------------------------------------


def text(self: RendererHTML, tokens: Sequence[Token], at: int, options: OptionsDict, environment: Environment) -> str:
    """Return text in which no id of a clause is broken at its hyphen."""
    return CLAUSE.sub(r'<span class="id">\g<0></span>', str(escape(tokens[at].content)))


def fence(self: RendererHTML, tokens: Sequence[Token], at: int, options: OptionsDict, environment: Environment) -> str:
    """Return what a terminal showed, below the scripts that it names."""
    lines = tokens[at].content.splitlines()
    commands = "\n".join(line for line in lines if line.startswith("$ "))
    scripts = [name for name in re.findall(r"[\w.-]+\.py\b", commands) if name in environment["scripts"]]
    shown = Markup("").join(script(name, environment) for name in dict.fromkeys(scripts))
    bold = (Markup("<b>{}</b>" if line.startswith("$ ") else "{}").format(line) for line in lines)
    return shown + Markup("<pre>{}</pre>\n").format(Markup("\n").join(bold))


def script(name: str, environment: Environment) -> Markup:
    """Return a script, folded, and those beside it that it imports; each only once on a page."""
    if name in environment["shown"]:
        return Markup("")
    environment["shown"].add(name)
    source: str = environment["scripts"][name]
    drawn = Markup(
        '<details class="script"><summary>{} <small>{} lines</small></summary><pre>{}</pre></details>\n'
    ).format(name, len(source.splitlines()), source)
    imported = (f"{module}.py" for module in re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE))
    return drawn + Markup("").join(script(other, environment) for other in imported if other in environment["scripts"])


def table_open(
    self: RendererHTML, tokens: Sequence[Token], at: int, options: OptionsDict, environment: Environment
) -> str:
    """Return the beginning of a table that scrolls inside its box."""
    return '<div class="box" role="region" aria-label="Table" tabindex="0"><table class="plain">\n'


def table_close(
    self: RendererHTML, tokens: Sequence[Token], at: int, options: OptionsDict, environment: Environment
) -> str:
    """Return the end of such a table."""
    return "</table></div>\n"
