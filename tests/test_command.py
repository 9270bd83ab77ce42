"The command line says what is wrong in one line, and what it prints is there."

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cxr_book.command import app

ROOT = Path(__file__).resolve().parents[1]


def call(*words):
    return CliRunner().invoke(app, [*map(str, words)])


@pytest.mark.parametrize(
    "words, says",
    [
        (("run", "10_baselnes"), "10_baselines"),
        (("run", "10_baselines", "-p", "ablation=true", "--dry"), "ablation"),
        (("run", "11_equivariant", "-p", "ablations=perhaps", "--dry"), "ablations"),
        (("run", "10_baselines", "-p", "lr", "--dry"), "NAME=VALUE"),
        (("run", "10_baselines", "--preset", "quik", "--dry"), "quick"),
        (("run", "10_baselines", "--data-root", "nowhere", "--dry"), "nowhere"),
        (("run", "configs/book.yaml", "10_baselines"), "not both"),
        (("run", "none.yaml"), "none.yaml"),
        (("predict", "nothing.png", "--run", "nowhere"), "config.json"),
        (("export", "nowhere"), "config.json"),
        (("compare", "nowhere"), "config.json"),
    ],
)
def test_what_is_wrong(words, says):
    done = call(*words)
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert says in str(done.exception.code), done.exception.code


def test_a_dry_run_names_every_folder(tmp_path):
    done = call("run", "10_baselines", "--seed", 0, "--seed", 1, "--preset", "smoke", "--out", tmp_path, "--dry")
    lines = done.output.splitlines()
    assert done.exit_code == 0 and len(lines) == len(set(lines)) == 2
    assert all(str(tmp_path) in line and "smoke" in line for line in lines) and not list(tmp_path.iterdir())


def test_the_batches_of_the_book_can_be_planned(tmp_path):
    planned = {}
    for name in ("book", "edition", "seeds"):
        done = call("run", f"configs/{name}.yaml", "--out", tmp_path, "--dry")
        assert done.exit_code == 0, done.output
        planned[name] = {line.split()[0] for line in done.output.splitlines()}
    every = {f.stem for f in (ROOT / "nbs").glob("*.ipynb")}
    assert planned["edition"] == every
    assert planned["book"] == {n for n in every if n[0] == "1" or n in ("21_compare", "22_predict", "22a_export")}


def test_no_runs_yet(tmp_path):
    assert "no runs" in call("runs", tmp_path).output
