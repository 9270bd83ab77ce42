"What keeps the project honest: notebooks and package agree, documents tell the truth, the package stands alone."

import ast
import base64
import bisect
import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from cxr_book.pages import with_results

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
CHAPTERS = [f for f in NOTEBOOKS if re.match(r"1[0-4]_", f.name)]
MODULES = sorted(f for f in (ROOT / "cxr_book").glob("*.py") if f.name[0] != "_")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
by_name = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda f: f.stem)


def run(*command, cwd=ROOT, timeout=600, **env):
    env = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | env
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture
def twin(tmp_path):
    "A copy of what nbdev reads and writes."
    for folder in ("nbs", "cxr_book"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    return tmp_path


# --- notebooks and package


def test_the_package_is_what_the_notebooks_export(twin):
    for f in (twin / "cxr_book").glob("*.py"):
        f.unlink() if f.stem[0] != "_" else None
    done = run(BIN / "nbdev_export", cwd=twin)
    assert done.returncode == 0, done.stderr
    made = {f.name: f.read_bytes() for f in (twin / "cxr_book").glob("*.py")}
    here = {f.name: f.read_bytes() for f in (ROOT / "cxr_book").glob("*.py")}
    assert made.keys() == here.keys()
    assert [name for name in here if made[name] != here[name]] == []


def test_notebooks_are_clean(twin):
    done = run(BIN / "nbdev_clean", "--fname", "nbs", cwd=twin)
    assert done.returncode == 0, done.stderr
    assert [f.name for f in NOTEBOOKS if (twin / "nbs" / f.name).read_bytes() != f.read_bytes()] == []


@by_name
def test_form_of_a_notebook(notebook):
    nb = json.loads(notebook.read_text())
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    ids = [c["id"] for c in nb["cells"]]
    assert nb["metadata"]["kernelspec"]["name"] == "python3"
    assert len(ids) == len(set(ids))
    assert not any(c["outputs"] or c["execution_count"] for c in code)
    sources = ["".join(c["source"]) for c in code]
    assert sources[0].startswith("#| default_exp ")
    colon = r"^\s*#\|\s*(default_exp|exports?|exporti|hide|hide_line|exec_doc|notest|slow)\s*:"
    assert not [s for s in sources if re.search(colon, s, re.M)]


@pytest.mark.parametrize("notebook", CHAPTERS, ids=lambda f: f.stem)
def test_parameters_of_a_chapter(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    names = [
        t.id
        for n in ast.parse("".join(tagged[0]["source"])).body
        if isinstance(n, ast.Assign)
        for t in n.targets
    ]
    assert names[:4] == ["preset", "data_root", "out_dir", "seed"]


def number(module):
    "The number of the notebook that a module comes from, as it sorts: 7b lies between 7 and 8."
    m = re.search(r"File to edit: \.\./nbs/(\d+)([a-z]?)_", module.read_text())
    assert m, f"{module.name} names no notebook"
    return int(m[1]), m[2]


def test_imports_point_backwards():
    numbers, wrong = {m.stem: number(m) for m in MODULES}, []
    for m in MODULES:
        for node in ast.walk(ast.parse(m.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [node.module.split(".")[0]] if node.module else [a.name for a in node.names]
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                full = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
                names = [n.split(".")[1] for n in full if n.startswith("cxr_book.")]
            else:
                continue
            for n in set(names) & numbers.keys():
                chapter = 10 <= numbers[n][0] <= 14 and not 20 <= numbers[m.stem][0] <= 22 and m.stem != "gpu"
                if chapter or numbers[n] >= numbers[m.stem]:
                    wrong.append(f"{m.stem} imports {n}")
    assert wrong == []


def test_one_version():
    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini")
    init = re.search(r'__version__ = "(.+)"', (ROOT / "cxr_book" / "__init__.py").read_text())[1]
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert ini["DEFAULT"]["version"] == init == str(cff)
    assert f"## [{init}]" in (ROOT / "CHANGELOG.md").read_text()


# --- the package alone


def blocked():
    "Import names of the tools that the package does not declare as its own."
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name = re.compile(r"[\w-]+")
    own = {name.match(d)[0] for d in project["dependencies"]} | {"cxr-book"}
    extra = {name.match(d)[0] for extra in project["optional-dependencies"].values() for d in extra}
    return extra - own - {"rich"} | {"IPython", "ipykernel", "nbformat", "distributed"}  # typer brings rich


BLOCK = """
import importlib, sys
for name in {blocked!r}: sys.modules[name] = None  # importing it fails, looking for it finds nothing
import cxr_book
assert cxr_book.__file__.startswith({folder!r}), cxr_book.__file__
for name in {modules!r}: importlib.import_module(f"cxr_book.{{name}}")
from cxr_book.core import reported
assert len(reported("004", 1)) > 0
"""


def test_the_wheel_imports_without_development_tools(tmp_path):
    source, wheels, unpacked = tmp_path / "source", tmp_path / "wheels", tmp_path / "unpacked"
    shutil.copytree(ROOT / "cxr_book", source / "cxr_book", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    isolation = [] if int(version("setuptools").split(".")[0]) < 77 else ["--no-build-isolation"]
    done = run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        *isolation,
        "-w",
        wheels,
        source,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    zipfile.ZipFile(next(wheels.glob("*.whl"))).extractall(unpacked)
    tables = {f.name for f in (ROOT / "cxr_book" / "reported").glob("*.csv")}
    assert {f.name for f in (unpacked / "cxr_book" / "reported").glob("*.csv")} == tables
    script = BLOCK.format(blocked=blocked(), folder=str(unpacked), modules=[m.stem for m in MODULES])
    done = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(unpacked))
    assert done.returncode == 0, done.stderr[-3000:]


# --- documents


def blocks(path, *languages):
    "Fenced blocks of a Markdown file in one of the languages."
    text = path.read_text() if path.is_file() else ""
    return [m[2] for m in re.finditer(r"^ *```(\w+)\n(.*?)^ *```", text, re.M | re.S) if m[1] in languages]


def commands():
    "Every command line of the documents' shell blocks."
    for path in DOCUMENTS:
        for block in blocks(path, "bash", "sh", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(re.sub(r"^\s*\$ ", "", line), comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words:
                    yield pytest.param(words, id=f"{path.stem}: {' '.join(words)}"[:90])


KNOWN = {"git", "cd", "pip", "source", ".", "export", "ls", "open", "jupyter", "quarto"}


@pytest.mark.parametrize("words", list(commands()))
def test_a_documented_command_exists(words):
    if words[0] == "make":
        done = run("make", "-n", *words[1:])
        assert done.returncode == 0, done.stderr
        return
    if Path(words[0]).name in ("torchrun", "srun", "mpirun") and "-m" in words:
        words = ["python", *words[words.index("-m") :]]
    if words[0] == "cxr-book":
        done = run(BIN / "cxr-book", words[1], "--help")
        assert done.returncode == 0 and "Usage" in done.stdout, done.stderr
        assert all(w.split("=")[0] in done.stdout for w in words if w.startswith("-")), words
        assert all((ROOT / w).is_file() for w in words if w.endswith(".yaml")), words
        if words[1] == "run" and not words[2].endswith(".yaml"):
            assert (ROOT / "nbs" / f"{words[2]}.ipynb").is_file()
        return
    if not re.fullmatch(r"(\S*/)?python3?(\.\d+)?", words[0]):
        assert Path(words[0]).name in KNOWN, f"no test knows {words[0]}"
    elif words[1:3] == ["-m", "papermill"]:
        assert (ROOT / words[3]).is_file()
        tagged = next(
            c
            for c in json.loads((ROOT / words[3]).read_text())["cells"]
            if "parameters" in c["metadata"].get("tags", [])
        )
        given = [words[i + 1] for i, w in enumerate(words) if w == "-p"]
        assert all(re.search(rf"^{name}\b", "".join(tagged["source"]), re.M) for name in given), given
        assert words[words.index("-k") + 1] == "python3"
    elif words[1] == "-m" and words[2].startswith("cxr_book."):
        done = run(sys.executable, "-m", words[2], "--help")
        assert done.returncode == 0 and "Usage" in done.stdout, done.stderr
        if len(words) > 3 and re.fullmatch(r"[a-z]+", words[3]):
            assert words[3] in done.stdout
    elif words[1].endswith(".py"):
        assert 'if __name__ == "__main__":' in (ROOT / words[1]).read_text()
    else:
        assert words[1:3] in (["-m", "venv"], ["-m", "pip"], ["-m", "pytest"]), f"no test knows {words}"


def test_python_in_the_readme_runs(tmp_path):
    script = "\n".join(blocks(ROOT / "README.md", "python"))
    done = run(sys.executable, "-c", script, cwd=tmp_path, CXR_BOOK_HOME=str(tmp_path), MPLBACKEND="agg")
    assert done.returncode == 0, done.stderr[-3000:]


def test_files_that_documents_link_exist():
    wrong = []
    for path in [*DOCUMENTS, ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
            if not re.match(r"https?:|mailto:", target) and not (ROOT / target).exists():
                wrong.append(f"{path.name}: {target}")
    assert wrong == []


def files():
    "Text files that are tracked, or would be."
    listed = run("git", "ls-files", "-co", "--exclude-standard", "-z").stdout.split("\0")
    for name in filter(None, listed):
        try:
            yield name, (ROOT / name).read_text()
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue


def test_no_registry_and_no_path_of_a_machine():
    # joined here, so that this file does not name them
    hosts = [
        "".join(p)
        for p in (("py", "pi.org"), ("python", "hosted.org"), ("npm", "js.org"), ("ana", "conda.org"))
    ]
    hosts += ["".join(("down", "load.pytorch.org"))]
    configured = run(sys.executable, "-m", "pip", "config", "list").stdout
    hosts += re.findall(r"https?://(?:[^@/]*@)?([\w.-]+)", configured)
    folders = [rf"(?<![\w.]){s}{name}{s}\w" for s in "/" for name in ("wo" + "rk", "tm" + "p", "ro" + "ot")]
    pattern = re.compile("|".join([*map(re.escape, {*hosts, f"{ROOT}/"}), *folders]))
    found = [f"{name}: {m[0]}" for name, text in files() if (m := pattern.search(text))]
    assert found == []


def test_nothing_large_and_nothing_executed_is_committed():
    assert [n for n, text in files() if len(text) > 1_600_000] == []
    assert not [n for n, _ in files() if n.startswith(("runs/", "data/", "cache/", "_book/"))]


def test_results_in_the_readme_are_those_of_the_edition():
    "Tables and sentences are the ones that the published comparison gives."
    text = (ROOT / "README.md").read_text()
    comparison = json.loads((ROOT / "published" / "comparison.json").read_text())
    assert with_results(text, comparison) == text, "call: python -m cxr_book.site readme"


def test_the_picture_in_the_readme_is_published():
    "It is the figure of the comparison, as it was executed."
    twin = json.loads((ROOT / "published" / "21_compare.ipynb").read_text())
    pictures = [
        o["data"]["image/png"].strip()
        for c in twin["cells"]
        for o in c.get("outputs", [])
        if "#| label: fig-side-by-side" in "".join(c["source"]) and "image/png" in o.get("data", {})
    ]
    (target,) = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert [(ROOT / target).read_bytes()] == [base64.b64decode(p) for p in pictures]


def numbers_of(value):
    "Every number in a results file, without its sign."
    if isinstance(value, dict | list):
        return {n for v in (value.values() if isinstance(value, dict) else value) for n in numbers_of(v)}
    return {abs(value)} if isinstance(value, int | float) else set()


def test_figures_of_the_comparison_are_in_its_results_file():
    "Every figure with three decimals in the tables and sentences of the page, up to the rounding of the file."
    known = sorted(numbers_of(json.loads((ROOT / "published" / "comparison.json").read_text())))
    cells = json.loads((ROOT / "published" / "21_compare.ipynb").read_text())["cells"]
    text = "".join("".join(o.get("data", {}).get("text/markdown", "")) for c in cells for o in c.get("outputs", []))
    figures = {float(f) for f in re.findall(r"\d\.\d{3}\b", text)}
    at = {f: bisect.bisect_left(known, f - 0.00056) for f in figures}
    assert len(figures) > 300 and not [f for f, i in at.items() if i == len(known) or known[i] > f + 0.00056]
