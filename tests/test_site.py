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

from cxr_book import site

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
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
    assert [f for f in listed if not (ROOT / f).is_file()] == []
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
    assert code and not re.search(rf"^\s*#\|\s*{site.NBDEV}\b", "\n".join(code), re.M)
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
        and "make book" in page.stderr
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
        and "make publish" in page.stderr
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


def test_twins_can_lie_elsewhere(book):
    assert command(book, "publish", "runs", "--to", "preview").returncode == 0
    assert filter_page(book).returncode and filter_page(book, CXR_BOOK_PUBLISHED="preview").returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not QUARTO, reason="Quarto is not on the PATH: the site is not rendered")
def test_the_site_renders(tmp_path):
    if late := site.check(ROOT):
        pytest.skip(f"not published: {late[0]}")
    for name in ("nbs", "published", "themes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(".*", "*.py"))
    for name in (
        "_quarto.yml",
        "settings.ini",
        "styles.css",
        "references.bib",
        "index.qmd",
        "references.qmd",
    ):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "cxr_book").symlink_to(ROOT / "cxr_book")
    done = run(QUARTO, "render", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for f in chapters():
        html = (tmp_path / "_book" / f).with_suffix(".html").read_text()
        assert "?@" not in html and not re.search(r"#\|", html), f
        assert not re.search(r"<(script|link|img)[^>]*(src|href)=\"https?:", html), f
