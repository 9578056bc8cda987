"""The pages show every result, link only to what is there, fetch nothing, and let no result file in as markup."""

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from conformance.clause import catalogue
from conformance.errors import UsageError
from conformance.loading import BUILT_IN as SHIPPED
from conformance.report import page
from conformance.report.arrangement import arranged, worst
from conformance.report.findings import Finding, explained, read_findings
from conformance.report.markdown import SIGNS
from conformance.report.page import FINDINGS, Column, read_columns, read_kill_matrix, render
from conformance.report.trend import trends

REPORTS = Path(__file__).parents[2] / "reports"
RESULTS = sorted((REPORTS / "conformance").glob("*.json"))
KILLS = read_kill_matrix(REPORTS / "kill-matrix.json")
HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)> | a\n| b {{ 7 * 7 }}"


class Page(HTMLParser):
    """What a test wants to know about a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = "".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, attribute: str) -> list[str]:
        return [attributes[attribute] for _, attributes in self.tags if attribute in attributes]


def written(tmp_path: Path, *results: Any, findings: Sequence[Finding] = ()) -> list[Column]:
    """Write results to files, read them, and render them to ``pages``."""
    paths = [tmp_path / f"{number}.json" for number in range(len(results))]
    for path, result in zip(paths, results, strict=True):
        path.write_text(json.dumps(result) if isinstance(result, dict) else result, encoding="utf-8")
    reports = read_columns(paths)
    render(reports, KILLS, tmp_path / "pages", findings)
    return reports


@pytest.fixture
def result() -> dict[str, Any]:
    return json.loads(RESULTS[0].read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def columns() -> list[Column]:
    """The committed results."""
    return read_columns(RESULTS)


@pytest.fixture(scope="module")
def pages(columns: list[Column], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages of the committed results and findings."""
    folder = tmp_path_factory.mktemp("pages")
    render(columns, KILLS, folder, read_findings(REPORTS / "findings"))
    return folder


@pytest.fixture(scope="module")
def parsed(pages: Path) -> dict[str, Page]:
    """The same pages, each read once."""
    return {path.name: Page(path) for path in pages.glob("*.html")}


def test_every_cell_is_there_once(parsed: dict[str, Page], columns: list[Column]) -> None:
    cells = [a for tag, a in parsed["index.html"].tags if tag == "td" and "data-clause" in a]
    found = [(a["data-clause"], a["data-column"], a["data-outcome"]) for a in cells]
    clauses = [(c, column) for c in catalogue().values() for column in columns]
    assert sorted(found) == sorted((c.id, column.slug, column.report.verdict(c).outcome) for c, column in clauses)
    assert len(found) == len(RESULTS) * len(catalogue())


def test_the_index_has_one_column_for_each_stack_at_first(parsed: dict[str, Page], columns: list[Column]) -> None:
    kinds, others = arranged(columns)
    first = [column for group in kinds.values() for column in group]
    assert len(first) + len(others) == len(RESULTS)
    assert len({column.report.spec for column in first}) == len(first)
    by_spec = {column.report.spec: column.report for column in first}
    litgpt = by_spec["litgpt"]
    assert litgpt.environment.get("gpu", "none") == "none"
    assert litgpt.version == "0.5.13"
    assert {column.report.version for column in others if column.report.spec == "litgpt"} == {"0.4.12", "0.5.13"}
    assert "tests.captured:Captured" not in by_spec
    assert "nanogpt" in {column.report.spec for column in kinds["Loops"]}
    hidden = [a for tag, a in parsed["index.html"].tags if tag == "td" and "other" in a.get("class", "").split()]
    assert {a["data-column"] for a in hidden if "data-clause" in a} == {column.slug for column in others}


def test_the_index_begins_with_what_this_is_and_the_worst(
    pages: Path, columns: list[Column], tmp_path: Path, result: dict[str, Any]
) -> None:
    source = (pages / "index.html").read_text(encoding="utf-8")
    head = source[: source.index("<aside")]
    assert "what it really did was recorded and judged by" in head
    kinds, _ = arranged(columns)
    found = worst([column for group in kinds.values() for column in group], catalogue().values())
    assert 0 < len(found) <= 6
    for each in found:
        assert each.clause.level == "must"
        assert f'href="#{each.clause.id}"' in head
        broken = {column.report.verdict(each.clause).outcome for column in each.columns}
        assert broken == {"fail"}
    for clause in result["clauses"]:
        clause["outcome"] = "pass"
    written(tmp_path, result)
    assert "Findings that matter most" not in (tmp_path / "pages" / "index.html").read_text(encoding="utf-8")


def test_subject_page_tells_everything(parsed: dict[str, Page], columns: list[Column]) -> None:
    for column in columns:
        report, shown = column.report, parsed[f"subject-{column.slug}.html"]
        ids = shown.all("data-clause")
        assert sorted(ids) == sorted(catalogue())
        bad = [v.id for v in report.verdicts.values() if v.outcome in FINDINGS]
        assert set(ids[: len(bad)]) == set(bad), "findings come first"
        text = " ".join(shown.text.split())
        for verdict in report.verdicts.values():
            for part in (verdict.requirement, verdict.expected, verdict.seen, verdict.reason):
                assert " ".join(part.replace("`", "").split()) in text
            assert f"--clause {verdict.id}" in text
        parts = dict(zip(ids, shown.all("data-part"), strict=True))
        assert parts == {identity: clause.part for identity, clause in catalogue().items()}


def test_links_work_and_nothing_is_fetched(pages: Path, parsed: dict[str, Page]) -> None:
    for name, shown in parsed.items():
        assert len(shown.all("id")) == len(set(shown.all("id")))
        assert not shown.all("src")
        for link in shown.all("href"):
            file, _, fragment = link.partition("#")
            assert ":" not in link, (name, link)
            assert (pages / (file or name)).is_file(), link
            assert not fragment or fragment in parsed[file or name].all("id"), link
        source = (pages / name).read_text(encoding="utf-8")
        assert not re.search(r"@import|url\(", source)
        policy = next(a["content"] for tag, a in shown.tags if tag == "meta" and "http-equiv" in a)
        for tag in ("style", "script"):  # a digest that does not match would switch the text off in silence
            inlined = re.findall(rf"<{tag}>(.*?)</{tag}>", source, re.DOTALL)
            assert len(inlined) == 1
            digest = base64.b64encode(hashlib.sha256(inlined[0].encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy


def test_hostile_strings_stay_text(tmp_path: Path, result: dict[str, Any]) -> None:
    result["subject"] = {"name": HOSTILE, "version": HOSTILE}
    result["environment"] = {"gpu": HOSTILE, HOSTILE: HOSTILE, "judged as": HOSTILE}
    result["clauses"][0] |= dict.fromkeys(("requirement", "level", "expected", "seen", "reason"), HOSTILE)
    result["clauses"].append(result["clauses"][0] | {"id": "NEW-1"})
    (column,) = written(tmp_path, result)
    assert re.fullmatch(r"[a-z0-9.-]+", column.slug)
    (tmp_path / "pages" / "kill-matrix.html").unlink()  # knows nothing of results
    for path in (tmp_path / "pages").iterdir():
        if path.suffix == ".html":
            shown = Page(path)
            assert [tag for tag, _ in shown.tags if tag in ("script", "img")] == ["script"]
            assert not [name for _, attributes in shown.tags for name in attributes if name.startswith("on")]
            assert HOSTILE in shown.text
        else:
            assert not re.search("<(script|img)", path.read_text(encoding="utf-8"))
    table, _ = (tmp_path / "pages" / "matrix.md").read_text(encoding="utf-8").split("\n\n")
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()} == {4}
    assert shlex.split(column.repeat(catalogue()["INIT-1"]))[5:8] == [HOSTILE, "--clause", "INIT-1"]


def test_markdown_is_the_results(pages: Path, columns: list[Column]) -> None:
    rows = [line.strip("| ").split(" | ") for line in (pages / "matrix.md").read_text(encoding="utf-8").splitlines()]
    found = {row[0]: row[2:] for row in rows if row[0] in catalogue()}
    assert found == {k: [SIGNS[r.report.verdict(c).outcome] for r in columns] for k, c in catalogue().items()}


def test_badges(tmp_path: Path, result: dict[str, Any]) -> None:
    good = result | {"clauses": [clause | {"outcome": "pass"} for clause in result["clauses"]]}
    partial = result | {"partial": True}
    bad, fine, unfinished = written(tmp_path, result, good, partial)
    badges = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "pages").glob("*.svg")}
    assert set(badges) == {f"badge-{bad.slug}.svg", f"badge-{fine.slug}.svg"}
    text = ", ".join(f"{number} {outcome}" for outcome, number in result["summary"].items() if number)
    assert f"<title>gpt-conformance: {text}</title>" in badges[f"badge-{bad.slug}.svg"]
    assert f"<title>gpt-conformance: {len(good['clauses'])} pass</title>" in badges[f"badge-{fine.slug}.svg"]
    render([unfinished], None, tmp_path / "pages")
    assert not list((tmp_path / "pages").glob("*.svg")), "a badge outlives its result"
    assert "Not all clauses were judged" in Page(tmp_path / "pages" / f"subject-{unfinished.slug}.html").text


def test_twins_and_missing_clauses(tmp_path: Path, result: dict[str, Any]) -> None:
    first, second = written(tmp_path, result, result | {"clauses": result["clauses"][1:]})
    assert first.title == second.title
    assert first.machine != second.machine
    cells = {(a.get("data-column"), a.get("data-clause")): a for _, a in Page(tmp_path / "pages" / "index.html").tags}
    assert cells[second.slug, "INIT-1"]["data-outcome"] == "not judged"


def test_kill_matrix_has_a_page(pages: Path, parsed: dict[str, Page]) -> None:
    source = (pages / "kill-matrix.html").read_text(encoding="utf-8")
    assert source.count("<b>●</b></td>") == sum(len(row["named"]) for row in KILLS["mutants"])
    fields = [row["killed_by"] for row in KILLS["mutants"]]
    killed = sum(len(names) for names in fields)
    assert source.count("<b>●</b></td>") + source.count("○</td>") == killed
    parts = [row["variant"] for row in KILLS["harmless"]] + [line for row in KILLS["mutants"] for line in row["diff"]]
    text = parsed["kill-matrix.html"].text
    assert not [part for part in parts if part.removeprefix("--- ") not in text]
    assert "each is killed by every clause that it names" in text
    assert "Every clause kills at least one mutant." in text
    assert "none makes a clause fail" in text


def test_a_kill_matrix_with_gaps_says_so(tmp_path: Path) -> None:
    mutant = KILLS["mutants"][0] | {"mutant": "lives on", "named": ["INIT-1"], "killed_by": ["INIT-2"]}
    gaps = KILLS | {"mutants": [mutant], "harmless": [{"variant": "accused", "killed_by": ["INIT-3"]}]}
    render(read_columns(RESULTS[:1]), gaps, tmp_path)
    text = Page(tmp_path / "kill-matrix.html").text
    assert "1 survive a clause that they name: lives on" in text
    assert "No mutant is killed by INIT-1, INIT-3," in text
    assert "✗ INIT-3" in text
    render(read_columns(RESULTS[:1]), None, tmp_path)
    assert not (tmp_path / "kill-matrix.html").exists()
    assert "kill-matrix.html" not in Page(tmp_path / "index.html").all("href")


def test_what_changed_between_two_releases_is_on_the_index_and_on_both_pages(
    pages: Path, columns: list[Column]
) -> None:
    slugs = {id(column.report): column.slug for column in columns}
    found = trends(column.report for column in columns)
    assert {(trend.older.name, trend.older.version, trend.newer.version) for trend in found} >= {
        ("LitGPT", "0.4.12", "0.5.13"),
        ("transformers Trainer", "5.3.0", "5.24.0"),
    }
    for trend in found:
        older, newer = slugs[id(trend.older)], slugs[id(trend.newer)]
        wanted = {f"subject-{older}.html#{name}" for name in trend.mended}
        wanted |= {f"subject-{newer}.html#{name}" for name in (*trend.broken, *trend.failed_by_both)}
        for name in ("index", f"subject-{older}", f"subject-{newer}"):
            source = (pages / f"{name}.html").read_text(encoding="utf-8")
            told = [part.partition("</div>")[0] for part in source.split('<div class="change">')[1:]]
            links = [set(re.findall(r'href="([^"]+#[^"]+)"', part)) for part in told]
            assert wanted in links, name
    once = next(column for column in columns if column.report.name == "nanoGPT")
    assert 'class="change"' not in (pages / f"subject-{once.slug}.html").read_text(encoding="utf-8")


def test_a_badge_is_shown_with_the_line_to_paste(pages: Path, parsed: dict[str, Page], columns: list[Column]) -> None:
    for column in columns:
        shown = parsed[f"subject-{column.slug}.html"]
        (line,) = re.findall(r"!\[(gpt-conformance: [^\]]+)\]\((badge-[^)]+)\)", shown.text)
        drawn = (pages / line[1]).read_text(encoding="utf-8")
        assert f"<title>{line[0]}</title>" in drawn
        assert drawn in (pages / f"subject-{column.slug}.html").read_text(encoding="utf-8")


# findings ------------------------------------------------------------------------------------------------------------


def test_a_failure_links_to_its_finding_and_back(parsed: dict[str, Page], columns: list[Column]) -> None:
    findings = read_findings(REPORTS / "findings")
    linked = 0
    for column in columns:
        page_of = f"subject-{column.slug}.html"
        links = parsed[page_of].all("href")
        found = explained(findings, column.report)
        for verdict in column.report.verdicts.values():
            if verdict.outcome not in FINDINGS:
                continue
            assert found[verdict.id], f"{column.slug}: nothing in reports/findings reproduces {verdict.id}"
            for link, _ in found[verdict.id]:
                assert link in links
                back = parsed[link.partition("#")[0]].all("href")
                assert f"{page_of}#{verdict.id}" in back or page_of in back
                linked += 1
    assert linked > 60


def test_a_finding_has_its_scripts_and_what_they_printed(parsed: dict[str, Page]) -> None:
    for path in (REPORTS / "findings").glob("*.md"):
        text = parsed[f"finding-{path.stem.lower()}.html"].text
        source = path.read_text(encoding="utf-8")
        for printed in re.findall(r"^```\w*\n(.*?)^```$", source, re.DOTALL | re.MULTILINE):
            assert printed.rstrip("\n") in text
        for name in set(re.findall(r"[\w.-]+\.py", source)):
            if (path.parent / name).is_file():
                assert text.count((path.parent / name).read_text(encoding="utf-8").rstrip()) == 1, name


def test_no_finding_gets_in_as_markup(tmp_path: Path, result: dict[str, Any]) -> None:
    folder = tmp_path / "findings"
    folder.mkdir()
    spec = result["environment"]["judged as"]
    parts = [
        f"<!-- subjects: {spec}, other 1.0 -->",
        f"# {HOSTILE}",
        f"## 1. INIT-1 (must): {HOSTILE}",
        "<b onclick=alert(3)>x</b> [a](javascript:alert(4)) ![i](http://x/y.png) [b](../../secret.md) [c](<d e.md>)",
        "[w](https://example.org/x) [r](other.md#top) [h](#1-x)",
        "| a |",
        "|--:|",
        f"| {HOSTILE.partition('|')[0]} |",
        "",
        "```",
        "$ python x.py",
        HOSTILE,
        "```",
    ]
    (folder / "x.md").write_text("\n".join(parts), encoding="utf-8")
    (folder / "other.md").write_text("no heading", encoding="utf-8")
    (folder / "x.py").write_text(HOSTILE, encoding="utf-8")
    result["clauses"][0]["outcome"] = "fail"
    (column,) = written(tmp_path, result, findings=read_findings(folder))
    shown = Page(tmp_path / "pages" / "finding-x.html")
    assert [tag for tag, _ in shown.tags if tag in ("script", "img")] == ["script"]
    assert not [name for _, attributes in shown.tags for name in attributes if name.startswith("on") or name == "style"]
    assert HOSTILE in shown.text
    links = [link for link in shown.all("href") if not link.startswith(("index.html", f"subject-{column.slug}.html"))]
    assert {"https://example.org/x", "finding-other.html#top", "#1-x"} <= set(links)
    assert {link.partition("#")[0] for link in links} == {
        "https://example.org/x",
        "http://x/y.png",
        "finding-other.html",
        "",
    }
    assert "finding-x.html" in (tmp_path / "pages" / f"subject-{column.slug}.html").read_text(encoding="utf-8")
    written(tmp_path, result)
    assert not list((tmp_path / "pages").glob("finding-*")), "a finding outlives its folder"


def test_a_finding_is_of_the_release_that_it_names(tmp_path: Path, result: dict[str, Any]) -> None:
    name, version = result["environment"]["judged as"], result["subject"]["version"]
    for number, subjects in enumerate((f"{name} {version}", name, f"{name} 0.0", "somebody", "")):
        (tmp_path / f"{number}.md").write_text(f"<!-- subjects: {subjects} -->\n# T\n## 1. INIT-1: x", encoding="utf-8")
    (tmp_path / "5.md").write_text("# T\n\nINIT-1, INIT-2", encoding="utf-8")
    (tmp_path / "6.md").write_text(f"<!-- subjects: {name} -->\n# All\n\nINIT-1, INIT-2", encoding="utf-8")
    found = explained(read_findings(tmp_path), written(tmp_path, result)[0].report)
    assert [link for link, _ in found["INIT-1"]] == ["finding-0.html#1-init-1-x", "finding-1.html#1-init-1-x"]
    assert found["INIT-2"] == [("finding-6.html", "All")], "no heading names it: the page as a whole"
    assert found["INIT-3"] == []


def test_folders_without_findings_are_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none", REPORTS / "kill-matrix.json", Path("a\0b")):
        with pytest.raises(UsageError, match="the folder of findings"):
            read_findings(folder)
    (tmp_path / "x.md").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        read_findings(tmp_path)


@pytest.mark.parametrize("scheme", [0, 1])
def test_contrast(scheme: int) -> None:
    """WCAG AA, 4.5 to 1, for every sign and text, in both schemes."""

    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    css = (Path(page.__file__).parent / "templates" / "page.css").read_text(encoding="utf-8")
    colors = dict(re.findall(r"--([\w-]+): (#\w{6})", css.split(":root {")[1 + scheme]))
    pairs = [(name.removesuffix("-back"), name) for name in colors if name.endswith("-back")]
    assert len(pairs) == 6
    for front, back in [
        *pairs,
        *((text, back) for text in ("ink", "dim", "link", "bad", "pass") for back in ("page", "raised")),
    ]:
        dark, light = sorted((luminance(colors[front]), luminance(colors[back])))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)


def test_usage_errors(tmp_path: Path, result: dict[str, Any]) -> None:
    clause = result["clauses"][0]
    rows = [clause | wrong for wrong in ({"outcome": "good"}, {"seen": None}, {"id": 'x"'}, {"seconds": "1"})]
    fields = ({"schema": 2}, {"partial": None}, {"subject": {"name": "x"}}, {"clauses": [clause, clause]})
    for wrong in ("{", "[]", *(result | field for field in fields), *(result | {"clauses": [row]} for row in rows)):
        with pytest.raises(UsageError, match=r"the result file .*0\.json.*\.$"):
            written(tmp_path, wrong)
    with pytest.raises(UsageError, match="cannot be read"):
        read_columns([tmp_path / "none.json"])
    with pytest.raises(UsageError, match="no list 'mutants'"):
        read_kill_matrix(RESULTS[0])
    with pytest.raises(UsageError, match="given to --out, is a file: give a folder"):
        render(read_columns(RESULTS[:1]), None, tmp_path / "0.json")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_committed_result_is_of_the_release_that_its_file_names(path: Path) -> None:
    version = json.loads(path.read_text(encoding="utf-8"))["subject"]["version"]
    assert f"-{version.partition(',')[0]}-" in path.name


def test_every_shipped_stack_has_its_place_on_the_page() -> None:
    """The index puts a subject that is not named among the kinds under "Others"."""
    kinds, _ = arranged([column for column in read_columns(RESULTS) if column.report.spec in SHIPPED])
    assert "Others" not in kinds
