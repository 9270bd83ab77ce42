"The site: every page is listed, every reference resolves, every published output belongs to the code beside it."

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cxr_book import pages, site
from cxr_book.core import CxrError
from cxr_book.crawl import Page, crawl
from cxr_book.essence import parts

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MADE = {"pages/api.qmd", "pages/changelog.qmd", "pages/_answer.md", "pages/_cite.md", "pages/_gallery.md"}
QUARTO = shutil.which("quarto")
by_name = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda f: f.stem)


def chapters():
    "Files that `_quarto.yml` lists, in order."
    book = yaml.safe_load((ROOT / "_quarto.yml").read_text())["book"]
    entries = book["chapters"] + book.get("appendices", [])
    return [f for e in entries for f in (e["chapters"] if isinstance(e, dict) else [e])]


def prose(path):
    "The Markdown of a page, without code."
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text())["cells"]
        text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    else:
        text = path.read_text()
    return re.sub(r"^```.*?^```|`[^`\n]*`|\$[^$]*\$", "", text, flags=re.M | re.S)


def run(*command, **options):
    "A command with this Python first on the PATH."
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path} | options.pop("env", {})
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, **options)


def test_chapters_are_listed_once_and_exist():
    listed = chapters()
    assert [f for f in listed if f not in MADE and not (ROOT / f).is_file()] == []
    assert len(listed) == len(set(listed))
    assert sorted(f for f in listed if f.startswith("nbs/")) == [f"nbs/{f.name}" for f in NOTEBOOKS]


def labels(page):
    text = page.read_text()
    return re.findall(r"\{#((?:eq|fig|tbl|sec)-[\w-]+)", text) + re.findall(r"#\|\s*label:\s*((?:fig|tbl)-[\w-]+)", text)


def test_references_resolve():
    pages = [ROOT / f for f in chapters() if (ROOT / f).is_file()]
    keys = set(re.findall(r"^@\w+\{([^,]+),", (ROOT / "references.bib").read_text(), re.M))
    defined, wrong = {label for p in pages for label in labels(p)}, []
    for p in pages:
        for key in re.findall(r"(?<![\w.\\])@([A-Za-z][\w-]*)", prose(p)):
            cross = re.match(r"(eq|fig|tbl|sec)-", key)
            if key not in (defined if cross else keys):
                wrong.append(f"{p.name}: @{key}")
    assert wrong == []


def anchors(page):
    "What a page offers to links: labels, headings as pandoc names them, and the names that it exports."
    text = re.sub(r"^```.*?^```", "", prose(page), flags=re.M | re.S)
    found = set(labels(page)) | set(re.findall(r"\{#([\w.-]+)", page.read_text()))
    for heading in re.findall(r"^#+ (.*?)(?:\s*\{.*\})?$", text, re.M):
        kept = re.sub(r"[^\w\s.-]", "", heading.lower())
        found.add(re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", kept.strip())))
    exported = [link.partition("#") for link in pages.links(ROOT).values()]
    return found | {name for file, _, name in exported if file == page.name}


def test_links_in_prose_lead_somewhere():
    texts = [ROOT / f for f in chapters() if (ROOT / f).is_file()]
    offered, wrong = {f: anchors(f) for f in texts}, []
    for f in texts:
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(f)):
            path, _, anchor = link.partition("#")
            target = (f.parent / path).resolve() if path else f
            if "://" in link or path in MADE or path.startswith("pages/"):
                continue
            if not target.exists() or anchor and target in offered and anchor not in offered[target]:
                wrong.append(f"{f.name}: {link}")
    assert wrong == []


def test_includes_and_resources_are_there_or_made():
    book = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    named = [f for f in book["project"]["resources"] if not f.startswith("pages/")]
    for f in chapters():
        if f.endswith(".qmd") and f not in MADE:
            named += re.findall(r"\{\{< include (\S+) >\}\}", (ROOT / f).read_text())
    assert [f for f in named if f not in MADE and not (ROOT / f).exists()] == []


def test_themes_bring_no_font_from_the_network():
    html = yaml.safe_load((ROOT / "_quarto.yml").read_text())["format"]["html"]
    for files in html["theme"].values():  # Bootswatch themes import Google fonts unless told not to
        own = "".join((ROOT / f).read_text() for f in files if f.endswith(".scss"))
        assert "$web-font-path: false;" in own and "http" not in own
    assert html["html-math-method"] == "mathml"


def test_labels_are_unique():
    found = [label for f in chapters() if (ROOT / f).is_file() for label in labels(ROOT / f)]
    assert sorted({label for label in found if found.count(label) > 1}) == []


def test_bibliography_keys_are_unique():
    keys = re.findall(r"^@\w+\{([^,]+),", (ROOT / "references.bib").read_text(), re.M)
    assert len(keys) == len(set(keys)) > 20


@by_name
def test_the_published_twin_is_fresh(notebook):
    assert site.stale(notebook, ROOT, ROOT / "published") == ""


@by_name
def test_a_filtered_page_has_no_directive(notebook):
    if why := site.stale(notebook, ROOT, ROOT / "published"):
        pytest.skip(why)
    page = site.filtered(json.loads(notebook.read_text()), ROOT)
    code = ["".join(c["source"]) for c in page["cells"] if c["cell_type"] == "code"]
    text = "\n".join("".join(c["source"]) for c in page["cells"] if c["cell_type"] == "markdown")
    assert code and not re.search(rf"^\s*#\|\s*{site.NBDEV}\b", "\n".join(code), re.M)
    assert text.count("Run it:") == text.count(f"(../pages/notebooks/{notebook.name})") == 1
    names = {n.lower() for m in pages.modules(ROOT) if m.page == notebook.name for n in m.names}
    assert names - set(re.findall(r"\{#([\w.]+)", text)) == set()  # the page of all names links them
    assert "text/html" not in {
        mime for c in page["cells"] for o in c.get("outputs", []) for mime in o.get("data", {})
    }


def test_every_published_file_has_a_notebook():
    assert {f.name for f in (ROOT / "published").glob("*.ipynb")} <= {f.name for f in NOTEBOOKS}


def cell(i, source, **more):
    return dict(cell_type="code", id=i, metadata={}, source=source, outputs=[], execution_count=None) | more


@pytest.fixture
def book(tmp_path):
    "A project of one module and one notebook, executed."
    (tmp_path / "_quarto.yml").write_text("project:\n  type: book\n")
    (tmp_path / "cxr_book").mkdir()
    (tmp_path / "cxr_book" / "ink.py").write_text("def ink(): return 1\n")
    (tmp_path / "nbs").mkdir()
    cells = [
        cell("c1", "#| hide\nfrom cxr_book.ink import ink"),
        cell("c2", "#| exports\ndef two(): return 2\n"),
        cell("c3", "two()"),
    ]
    notebook = dict(
        cells=cells,
        metadata=dict(kernelspec=dict(name="python3", language="python")),
        nbformat=4,
        nbformat_minor=5,
    )
    (tmp_path / "nbs" / "01_ink.ipynb").write_text(json.dumps(notebook))
    for n, c in enumerate(cells, 1):
        c["execution_count"] = n
    cells[2]["outputs"] = [
        dict(output_type="execute_result", execution_count=3, metadata={}, data={"text/plain": "2"})
    ]
    (tmp_path / "runs" / "01_ink").mkdir(parents=True)
    (tmp_path / "runs" / "01_ink" / "notebook.ipynb").write_text(json.dumps(notebook))
    return tmp_path


def filter_page(book, **env):
    text = (book / "nbs" / "01_ink.ipynb").read_text()
    return run(sys.executable, "-m", "cxr_book.site", "filter", input=text, cwd=book / "nbs", env=env)


def command(book, *args):
    return run(sys.executable, "-m", "cxr_book.site", *args, cwd=book)


def test_publish_check_and_filter_from_the_command_line(book):
    assert command(book, "check").returncode == 1
    assert command(book, "publish", "runs").returncode == 0
    assert command(book, "check").returncode == 0
    page = filter_page(book)
    assert page.returncode == 0, page.stderr
    cells = json.loads(page.stdout)["cells"]
    assert [c["id"] for c in cells] == ["c2-doc", "c2", "c3"] and "#|" not in page.stdout
    assert (
        cells[2]["outputs"][0]["data"]["text/plain"] == ["2"]
        or cells[2]["outputs"][0]["data"]["text/plain"] == "2"
    )


def test_a_missing_twin_fails_the_filter(book):
    page = filter_page(book)
    assert (
        page.returncode
        and not page.stdout
        and "01_ink.ipynb: no executed twin" in page.stderr
        and site.ADVICE in page.stderr
    )


def test_a_stale_cell_fails_the_filter(book):
    assert command(book, "publish", "runs").returncode == 0
    source = book / "nbs" / "01_ink.ipynb"
    source.write_text(source.read_text().replace('"two()"', '"two() + 1"'))
    page = filter_page(book)
    assert (
        page.returncode
        and not page.stdout
        and "01_ink.ipynb: cell c3 changed" in page.stderr
        and "make edition" in page.stderr
    )


def test_a_changed_module_fails_the_filter_and_a_comment_does_not(book):
    assert command(book, "publish", "runs").returncode == 0
    (book / "cxr_book" / "ink.py").write_text("def ink():\n    'One.'\n    return 1  # one\n")
    assert filter_page(book).returncode == 0
    (book / "cxr_book" / "ink.py").write_text("def ink(): return 3\n")
    page = filter_page(book)
    assert page.returncode and "executed before a change in ink" in page.stderr


def test_a_run_older_than_its_code_is_not_published(book):
    os.utime(book / "runs" / "01_ink" / "notebook.ipynb", (1, 1))
    done = command(book, "publish", "runs")
    assert (
        done.returncode and "ink.py was written after" in done.stderr and not list(book.glob("published/*"))
    )


def test_a_run_of_a_batch_says_itself_which_notebook_it_is(book):
    (book / "runs" / "01_ink").rename(book / "runs" / "01_ink-0a1b2c3d")
    made = parts(book / "nbs" / "01_ink.ipynb", book / "cxr_book")
    (book / "runs" / "01_ink-0a1b2c3d" / "run.json").write_text(json.dumps(dict(notebook="01_ink", parts=made)))
    done = command(book, "publish", "runs")
    assert done.returncode == 0 and done.stdout.strip().endswith("01_ink.ipynb"), done.stderr


def test_twins_can_lie_elsewhere(book):
    assert command(book, "publish", "runs", "--to", "preview").returncode == 0
    assert filter_page(book).returncode and filter_page(book, CXR_BOOK_PUBLISHED="preview").returncode == 0


def test_a_filtered_page_is_kept_until_something_behind_it_changes(book):
    assert command(book, "publish", "runs").returncode == 0
    notebook = json.loads((book / "nbs" / "01_ink.ipynb").read_text())
    kept = book / ".quarto" / "filtered" / "01_ink.json"
    first = site.filtered(notebook, book)
    kept.write_text(kept.read_text().replace("nbformat_minor", "from_disk"))
    assert "from_disk" in site.filtered(notebook, book)
    (book / "settings.ini").write_text("[DEFAULT]\nuser = me\nrepo = cxr\nbranch = main\n")
    assert site.filtered(notebook, book) == first  # no heading, no line below it
    twin = book / "published" / "01_ink.ipynb"
    twin.write_text(twin.read_text().replace('"2"', '"two"'))
    assert '"two"' in json.dumps(site.filtered(notebook, book))
    twin.unlink()
    with pytest.raises(CxrError, match="no executed twin"):  # what was kept does not stand for a missing twin
        site.filtered(notebook, book)


# --- pages that are made


def test_all_names_are_listed_with_what_they_give():
    text, found = pages.api(ROOT), pages.modules(ROOT)
    assert [m.page for m in found] == sorted(m.page for m in found) and len(found) > 40
    for m in found:
        source = (ROOT / "cxr_book" / f"{m.name}.py").read_text()
        exported = re.findall(r"'(\w+)'", re.search(r"__all__ = \[(.*?)\]", source, re.S)[1])
        defined = {n for n in exported if re.search(rf"^(?:async )?(?:def|class) {n}\b", source, re.M)}
        assert defined <= set(m.names), m.name
        assert all(f"[`{n}`](../nbs/{m.page}#{n.lower()})" in text for n in m.names)
        assert m.title and m.claim, f"{m.page} has no title or no claim"
    assert not re.search(r"^\|[^|\n]*\|[^|\n]*(?<!\\)\|[^\n]+\|$", text, re.M)  # two columns in each row


def comparison(**scores):
    "A comparison of two methods as its page writes it."
    about = [dict(key=k, title=f"Method {k}", chapter="10_baselines", main=True) for k in scores]
    fixed = dict(part="all", rule="own", finding="Mean", mode="", metric="AUROC", low=0.1, high=0.9)
    lines = [fixed | dict(method=k, value=v) for k, v in scores.items()]
    return dict(parts={"all": {}}, methods=about, scores=lines, command="make it")


def test_best_value_is_bold_and_ties_share_it():
    rows = pages.result(comparison(a=0.81249, b=0.8124, c=0.7))
    assert [r["AUROC"].split()[0] for r in rows] == ["**0.812**", "**0.812**", "0.700"]
    assert all(r["IoU"] is None for r in rows) and "| — |" in pages.table(rows)


def test_what_the_first_page_lacks_is_named(book):
    with pytest.raises(CxrError, match="published/21_compare.ipynb is missing"):
        pages.answer(book / "published")
    assert command(book, "publish", "runs").returncode == 0
    done = command(book, "pages")
    assert done.returncode == 1 and "21_compare.ipynb is missing" in done.stderr and "Traceback" not in done.stderr
    drawing = cell("p", f"#| label: {pages.PICTURE}\nfig")
    (book / "published" / "21_compare.ipynb").write_text(json.dumps(dict(cells=[drawing])))
    (book / "published" / "comparison.json").write_text(json.dumps(comparison(a=0.8)))
    with pytest.raises(CxrError, match=f"{pages.PICTURE} shows a picture"):
        pages.answer(book / "published")


def test_a_stale_twin_stops_the_build_before_anything_is_written(book):
    done = command(book, "pages")
    assert done.returncode == 1 and "no executed twin" in done.stderr and not (book / "pages").exists()


def test_results_go_with_their_notebook_and_lose_the_paths(book):
    (book / "runs" / "01_ink" / "comparison.json").write_text(json.dumps(dict(command=f"run {book}/runs")))
    assert command(book, "publish", "runs").returncode == 0
    assert json.loads((book / "published" / "comparison.json").read_text()) == dict(command="run runs")


def test_the_citation_is_that_of_this_version():
    text, cff = pages.citation(ROOT), yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f"version = {{{cff['version']}}}," in text and cff["title"] in text and text.count("{") == text.count("}")


def test_the_published_comparison_fits_the_first_page():
    if not (ROOT / "published" / "comparison.json").is_file():
        pytest.skip("no comparison is published")
    text, png = pages.answer(ROOT / "published")
    assert png[:4] == b"\x89PNG" and len(png) < 200_000
    assert len(re.findall(r"^\| \[", text, re.M)) >= 5 and "**" in text  # the method of each chapter, the best in bold


# --- the crawl


def page(folder, name, body):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"<!DOCTYPE html><html><head></head><body>{body}</body></html>")


@pytest.mark.parametrize(
    "body, link",
    [
        ('<a href="b.html#no">x</a>', "b.html#no"),
        ('<a href="b.html#YES">x</a>', "b.html#YES"),
        ('<a href="c.html">x</a>', "c.html"),
        ('<a href="#no">x</a>', "#no"),
        ('<a href="/b.html">x</a>', "/b.html"),
        ('<a href="../b.html">x</a>', "../b.html"),
        ('<img src="gone.png">', "gone.png"),
        ('<img src="https://a.org/x.png">', "https://a.org/x.png"),
        ('<img srcset="there.png 1x, gone.png 2x">', "gone.png"),
        ('<script src="//a.org/x.js"></script>', "//a.org/x.js"),
        ('<script type="module">import x from "https://a.org/x.js"</script>', "https://a.org/x.js"),
        ('<link rel="stylesheet" href="https://a.org/x.css">', "https://a.org/x.css"),
        ("<style>@import url(https://a.org/f.css);</style>", "https://a.org/f.css"),
        ('<style>a { src: url("https://a.org/f.woff2") }</style>', "https://a.org/f.woff2"),
        ('<p style="background: url(gone.png)">x</p>', "gone.png"),
        ("<p>See <strong>?@fig-one</strong></p>", "?@fig-one"),
        ("<p>See ?eq-two.</p>", "?eq-two"),
        ("<p>See @tbl-three</p>", "@tbl-three"),
        ('<span class="citation">(<strong>smith?</strong>)</span>', "smith?"),
        ('<p>Figure <span class="quarto-unresolved-ref">fig-x</span></p>', "fig-x"),
        ("<p>{{< include x.md >}}</p>".replace("<", "&lt;", 2).replace("&lt;p", "<p", 1), "{{< include x.md >}}"),
        ("<p>\n::: {.note}\n</p>", "::: {.note}"),
        ('<pre class="sourceCode"><code>#| hide\nx = 1</code></pre>', "#| hide"),
    ],
)
def test_the_crawl_finds(tmp_path, body, link):
    page(tmp_path, "b.html", '<h1 id="yes">B</h1>')
    page(tmp_path, "a.html", body)
    (tmp_path / "there.png").touch()
    assert [(f.page, f.link) for f in crawl(tmp_path)] == [("a.html", link)]


@pytest.mark.parametrize(
    "body",
    [
        '<a href="b.html#yes">x</a> <a href="./b.html?x=1#yes">x</a> <a href="part/">x</a>',
        '<a href="#">x</a> <a href="#top">x</a>',
        '<a href="https://a.org">x</a> <a href="mailto:me@a.org">x</a> <link rel="canonical" href="https://a.org">',
        '<img src="data:image/png;base64,AA=="> <img src="th%65re.png">',
        "<style>/* url(https://a.org) */ a { fill: url(#yes) }</style><script>let a = '?@fig-x, url(no)'</script>",
        "<p><code>?@fig-one</code> and <code>#| hide</code>, a question?@me, one@fig.org</p>",
        '<pre class="sourceCode">x = "#| hide"</pre><pre>#| an output</pre>',
        "<p>Really<strong>?</strong> <strong>Why?</strong></p>",
        "<p>open <b>tags <i>wrongly</b> nested</i> <br/><li>one<li>two",
    ],
)
def test_the_crawl_lets_pass(tmp_path, body):
    page(tmp_path, "b.html", '<h1 id="yes">B</h1>')
    page(tmp_path, "part/index.html", '<a href="../a.html">x</a>')
    page(tmp_path, "a.html", body)
    (tmp_path / "there.png").touch()
    assert crawl(tmp_path) == []


def test_the_crawl_from_the_command_line(tmp_path):
    with pytest.raises(CxrError, match="no pages in it"):
        crawl(tmp_path)
    page(tmp_path, "a.html", '<img src="gone.png">')
    done = run(sys.executable, "-m", "cxr_book.site", "crawl", tmp_path)
    assert done.returncode == 1 and "a.html: gone.png: no such file" in done.stdout


def test_text_after_an_unclosed_listing_is_not_lost():
    found = Page("<div><pre class='sourceCode'>a = 1</div><p>?@fig-x</p>")
    assert found.prose == "?@fig-x" and found.code.strip() == "a = 1"


@pytest.mark.slow
@pytest.mark.skipif(not QUARTO, reason="Quarto is not on the PATH: the site is not rendered")
def test_the_site_renders(tmp_path):
    if late := site.check(ROOT):
        pytest.skip(f"not published: {late[0]}")
    for name in ("nbs", "published", "themes", "assets"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(".*", "*.py"))
    for f in [*ROOT.glob("*.*")]:
        if f.suffix in (".qmd", ".yml", ".ini", ".css", ".bib", ".cff", ".md"):
            shutil.copy(f, tmp_path)
    (tmp_path / "cxr_book").symlink_to(ROOT / "cxr_book")
    made = command(tmp_path, "pages")
    assert made.returncode == 0, made.stderr
    done = run(QUARTO, "render", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    built = [(tmp_path / "_book" / f).with_suffix(".html") for f in chapters()]
    assert [f.name for f in built if not f.is_file()] == []
    assert [str(f) for f in crawl(tmp_path / "_book")] == []
    for name in ("notebooks/10_baselines.ipynb", "executed/10_baselines.ipynb"):
        assert (tmp_path / "_book" / "pages" / name).is_file()
    search = json.loads((tmp_path / "_book" / "search.json").read_text())
    assert {f"nbs/{f.stem}.html" for f in NOTEBOOKS} <= {entry["href"].partition("#")[0] for entry in search}
