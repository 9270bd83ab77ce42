"What the notebooks of the benchmark cannot say: the command line, missing libraries, a stop in the middle, what is published."

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cxr_book import alternatives, bench, feeding
from cxr_book.core import CxrError
from cxr_book.data import read

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "published"


def call(*arguments):
    done = CliRunner().invoke(bench.app, [str(a) for a in arguments])
    return done.exit_code, done.output


@pytest.mark.slow
def test_the_page_runs_small(tmp_path, run_here):
    notebook = ROOT / "nbs" / "23_performance.ipynb"
    run_here(notebook, tmp_path, preset="smoke", out_dir=tmp_path / "run")
    found = json.loads((tmp_path / "run" / "performance.json").read_text())
    assert [*found["parts"]] == [*bench.PARTS] and found["stamp"]["libraries"]["torch"]
    assert len(bench.promises(found["parts"])) == len(bench.PROMISES)


def test_the_command_goes_on_and_refuses_what_differs(tmp_path):
    out = tmp_path / "figures.json"
    assert call("augmentation", "--preset", "smoke", "--out", out)[0] == 0
    first = json.loads(out.read_text())["parts"]
    code, text = call("starts", "augmentation", "--preset", "smoke", "--out", out)
    assert code == 0 and "one composed warp" in text and "cxr-book --help" in text
    both = json.loads(out.read_text())["parts"]
    assert [*both] == ["augmentation", "starts"] and both["augmentation"] == first["augmentation"]
    assert call("augmentation", "--preset", "smoke", "--out", out, "--again")[0] == 0
    assert json.loads(out.read_text())["parts"]["augmentation"] != first["augmentation"]
    for given, said in ((["start"], "did you mean 'starts'"), (["--preset", "quick"], "choose another file"), (["--device", "gpu"], "gpu")):
        code, text = call(*given, *(() if "--preset" in given else ("--preset", "smoke")), "--out", out)
        assert code == 1 and said in text and "Traceback" not in text


def test_a_data_set_without_png_is_refused(tmp_path):
    folder = feeding.write_pngs(tmp_path / "set", 1, side=64)
    (image,) = (folder / "images").iterdir()
    image.rename(image.with_suffix(".jpg"))
    code, text = call("feeding", "--preset", "smoke", "--data-root", folder, "--out", tmp_path / "x.json")
    assert code == 1 and "no PNG" in text and not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    "part, library, package",
    [
        ("feeding", "torchxrayvision.datasets", "torchxrayvision"),
        ("maps", "pytorch_grad_cam", "grad-cam"),
        ("augmentation", "kornia.augmentation", "kornia"),
    ],
)
def test_a_missing_library_is_named_with_what_to_install(part, library, package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, library, None)
    code, text = call(part, "--preset", "smoke", "--out", tmp_path / "x.json")
    assert code == 1 and f"pip install {package}" in text.replace("\n", " ") and "Traceback" not in text


def test_what_differs_is_not_timed(monkeypatch, tmp_path):
    files = read(feeding.write_pngs(tmp_path, 4, side=64))
    monkeypatch.setattr(feeding, "to_unit", lambda grey: grey)
    with pytest.raises(CxrError, match="torchxrayvision: the results differ"):
        feeding.race_feeding(files, 32, 2, 1, workers=1, n=4)
    monkeypatch.setattr(alternatives, "warp", lambda x, A, size: x)
    with pytest.raises(CxrError, match="Kornia: the results differ"):
        alternatives.race_augmentation(2, 32, 1)


def test_published_figures_are_those_of_the_results_file():
    "Every promise of the page is made of the file beside it, and the file has all parts."
    found = json.loads((PUBLISHED / "performance.json").read_text())
    assert [*found["parts"]] == [*bench.PARTS] and found["settings"]["preset"] == "quick"
    cells = json.loads((PUBLISHED / "23_performance.ipynb").read_text())["cells"]
    shown = "\n".join("".join(o.get("data", {}).get("text/markdown", "")) for c in cells for o in c.get("outputs", []))
    for text, line in bench.promises(found["parts"]).iterrows():
        assert " | ".join([line.asked, line.measured, line.held]) in shown, text
    assert found["parts"]["judging"]["images"] == 25_596
    equal = [v for part in found["parts"].values() for v in part.get("equal", {}).values()]
    assert equal and np.isfinite(equal).all()
