"What the page of the GPU edition cannot say: all chapters are timed, the batch runs and is published, the command line."

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cxr_book import gpu
from cxr_book.core import CxrError
from cxr_book.gpu import GpuSettings, edition_text, make_edition, take_over

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "published" / "gpu"


def call(*arguments):
    done = CliRunner().invoke(gpu.app, [str(a) for a in arguments])
    return done.exit_code, done.output


@pytest.mark.slow
def test_the_edition_in_small_runs_here_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("CXR_BOOK_HOME", str(tmp_path / "home"))
    out, few = tmp_path / "edition", {"10_baselines": dict(n_boot=20)}
    s = GpuSettings.from_preset("smoke", device="cpu")
    training = dict(make_edition(s, out, ("training",)))["training"]["chapters"]
    assert "14 weighted, train" in edition_text(out / "published" / "gpu.json")
    stages = {"10_baselines": 2, "11_equivariant": 3, "12_proposals": 3, "13_limited": 6, "14_weighting": 2}
    assert {name: len(training[name]["rates"]) for name in stages} == stages  # every stage of every method was timed
    assert all(r["fed"]["low"] > 0 and r["ready"]["low"] > 0 for name in stages for r in training[name]["rates"].values())
    with pytest.raises(CxrError, match="drawing, models, chapters missing"):
        take_over(out / "published", tmp_path / "site")

    small, out = s.but(chapters=few), tmp_path / "small"
    found = dict(make_edition(small, out, ("drawing", "models", "chapters")))
    twins = {f.name for f in (out / "published").iterdir()}
    assert {"10_baselines.ipynb", "21_compare.ipynb", "comparison.json", "gpu.json"} <= twins
    assert {line["method"] for line in found["chapters"]["means"]} >= {"10/dcnn", "10/chexnet"}
    assert read_changes(out) == dict(n_boot=20, device="cpu")
    text = edition_text(out / "published" / "gpu.json")
    assert "10/chexnet" in text and "| multires-small-resnet4-pcm |" in text and "Minutes: drawing " in text
    again = dict(make_edition(small, out, ("chapters",)))
    assert again["chapters"] == found["chapters"]


def read_changes(out):
    "The settings that the executed chapter was given."
    (record,) = [json.loads(f.read_text()) for f in (out / "runs").glob("10_baselines-*/run.json")]
    return record["parameters"]["changes"]


def test_the_papers_models_are_not_started_on_a_cpu(tmp_path):
    code, text = call("models", "--device", "cpu", "--out", tmp_path)
    assert code == 1 and "days on a CPU" in text and "Traceback" not in text and not [*tmp_path.iterdir()]
    code, text = call("model", "--preset", "smoke", "--out", tmp_path)
    assert code == 1 and "did you mean 'models'" in text
    code, text = call("models", "--preset", "smoke", "--device", "cpu", "--out", tmp_path, "--take")
    assert code == 1 and "run these parts first" in text.replace("\n", " ")


def test_an_edition_in_small_is_not_taken_for_the_large_one(tmp_path):
    (tmp_path / "gpu.json").write_text(json.dumps(dict(parts=dict.fromkeys(gpu.PARTS), settings=dict(preset="smoke"))))
    with pytest.raises(CxrError, match="preset 'smoke'"):
        take_over(tmp_path, tmp_path / "site")


def test_the_site_says_whether_it_is_there():
    cells = json.loads((ROOT / "published" / "31_gpu.ipynb").read_text())["cells"]
    shown = "".join("".join(o.get("data", {}).get("text/markdown", "")) for c in cells for o in c.get("outputs", []))
    assert edition_text(PUBLISHED / "gpu.json") in shown
    if PUBLISHED.exists():
        found = json.loads((PUBLISHED / "gpu.json").read_text())
        assert [*found["parts"]] == [*gpu.PARTS] and found["settings"]["preset"] == "paper" and "cpu" not in found["stamp"]["device"]
