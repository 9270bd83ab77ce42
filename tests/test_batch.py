"Batches: what is refused, what is run and what is not, and what is left when something is killed."

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml

from cxr_book import execution
from cxr_book.batch import Batch, cuda_devices, latest, pin, plan, results, run_batch
from cxr_book.core import CxrError, read_json

ROOT = Path(__file__).resolve().parents[1]
COMMON = 'preset = "quick"\ndata_root = ""\nout_dir = ""\nseed = 0\n'


def write(folder, name, parameters, *code):
    "A notebook; a string of parameters makes its first cell."
    folder.mkdir(parents=True, exist_ok=True)
    cells = [nbformat.v4.new_code_cell(c) for c in code]
    if parameters:
        cells.insert(0, nbformat.v4.new_code_cell(parameters, metadata=dict(tags=["parameters"])))
    kernel = dict(name="python3", display_name="python3", language="python")
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), folder / f"{name}.ipynb"
    )


@pytest.fixture
def nbs(tmp_path):
    folder = tmp_path / "nbs"
    write(folder, "01_ink", "", "print('ink')")
    more = "lr = 1e-3\ncut = True\nsizes = [1]\nmask_root = ''"
    write(folder, "10_grow", COMMON + more, "open(out_dir + '/size', 'w').write(str(lr))")
    write(folder, "11_dry", COMMON, "1 / 0")
    write(folder, "21_judge", COMMON + "runs = []", "print(runs)")
    write(folder, "22_use", COMMON + "run = ''", "print(run)")
    return folder


@pytest.fixture(scope="session")
def cluster():
    "Two workers that several tests use by their address."
    from distributed import LocalCluster

    size = dict(n_workers=2, threads_per_worker=1, processes=True, memory_limit=0, dashboard_address=None)
    with LocalCluster(**size, silence_logs=60) as cluster:
        yield cluster.scheduler_address


def log_to(path, word):
    return f"open({str(path)!r}, 'a').write({word} + '\\n')"


def lines(path):
    return path.read_text().split() if path.exists() else []


def await_true(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


# --- what is refused


def entry(name="10_grow", **parameters):
    return dict(notebooks=[dict(notebook=name, parameters=parameters)])


@pytest.mark.parametrize(
    "asked, why",
    [
        (dict(notebooks=["01_ink"], sed=1), r"sed = 1: did you mean 'seed'"),
        (dict(notebooks=[dict(notebook="01_ink", parameter={})]), r"did you mean 'parameters'"),
        (dict(notebooks=[]), r"notebooks = \[\].*at least 1"),
        (dict(preset="quick"), r"notebooks.*required"),
        (dict(notebooks="01_ink"), r"a list of notebooks"),
        (dict(notebooks=["10_grwo"]), r"no notebook '10_grwo'; did you mean '10_grow'"),
        (dict(notebooks=["01_ink"], seed=1), r"seed: no notebook of this batch .* none at all"),
        (dict(notebooks=["10_grow"], parameters=dict(lrr=1)), r"lrr: no notebook .* did you mean 'lr'"),
        (entry(lrr=1), r"10_grow: no parameter 'lrr'; did you mean 'lr'"),
        (entry("01_ink", lr=1), r"01_ink: no parameter 'lr'; it has no parameters"),
        (entry(preset="quik"), r"10_grow: preset = 'quik': did you mean 'quick'"),
        (entry(seed=-1), r"seed = -1: 0 or more"),
        (entry(seed=0.5), r"seed = 0.5: a whole number"),
        (entry(seed=None), r"seed = None: its default 0 is of type int"),
        (entry(lr="fast"), r"lr = 'fast': a number"),
        (entry(lr=["1e-3", True]), r"lr = True: its default 0.001 is of type float"),
        (entry(cut=1), r"cut = 1: its default True is of type bool"),
        (entry(sizes=[1, 2]), r"sizes = 1: .* a list is one value when it stands in a list"),
        (entry(lr=[]), r"lr = \[\]: a grid of nothing"),
        (entry(data_root="nowhere"), r"data_root = 'nowhere': no such folder"),
        (entry(mask_root="nowhere"), r"mask_root = 'nowhere': no such folder"),
        (entry(out_dir="x"), r"out_dir is given by the batch"),
        (dict(notebooks=[dict(notebook="21_judge", after=["10_grow"])]), r"21_judge: after '10_grow', which is not"),
        (dict(notebooks=[dict(notebook="01_ink", after=["01_ink"])]), r"wait for each other: 01_ink"),
    ],
)  # fmt: skip
def test_refused(nbs, asked, why):
    with pytest.raises(CxrError, match=f"(?s){why}"):
        plan(Batch(**asked), nbs.parent / "runs", nbs)
    assert not (nbs.parent / "runs").exists()


def test_refused_files(tmp_path):
    for text, why in (("a: [", "no readable YAML"), ("- 1", "has keys"), ("notebook: x", "did you mean 'notebooks'")):
        (tmp_path / "b.yaml").write_text(text)
        with pytest.raises(CxrError, match=why):
            Batch.read(tmp_path / "b.yaml")
    with pytest.raises(CxrError, match="no readable YAML"):
        Batch.read(tmp_path / "absent.yaml")
    with pytest.raises(CxrError, match="checkout"):
        plan(Batch(notebooks=["01_ink"]), nbs=tmp_path)


def test_a_scheduler_that_is_not_there(nbs, monkeypatch):
    with pytest.raises(CxrError, match="no scheduler answers"):
        run_batch(Batch(notebooks=["01_ink"]), nbs.parent / "runs", nbs, address="tcp://127.0.0.1:9", quiet=True)


# --- the plan


def test_grid_and_addresses(nbs, monkeypatch):
    monkeypatch.chdir(nbs.parent)
    text = f"""
    preset: smoke
    seed: [0, 1]
    notebooks:
      - 01_ink
      - notebook: 10_grow
        parameters: {{lr: [1e-4, 2e-3], sizes: [[1, 2]], data_root: nbs}}
      - "10_*"
      - notebook: 21_judge
        after: [10_grow]
    """
    (nbs.parent / "b.yaml").write_text(text)
    jobs = plan(Batch.read("b.yaml"), "runs", nbs)
    assert [j.notebook for j in jobs] == ["01_ink"] + ["10_grow"] * 6 + ["21_judge"] * 2
    assert {j.parameters["lr"] for j in jobs[1:5]} == {1e-4, 2e-3} and jobs[1].parameters["sizes"] == [1, 2]
    assert len({j.address for j in jobs}) == 9 and jobs[1].parameters["data_root"] == str(nbs.resolve())
    for j in jobs:
        assert j.folder == nbs.parent / "runs" / f"{j.notebook}-{j.address}"
        assert j.parameters.get("out_dir", str(j.folder)) == str(j.folder)
    for j in jobs[7:]:
        assert len(j.after) == 3 and [Path(r).name for r in j.parameters["runs"]] == list(j.after)
        assert all(f"-{k.address}" in str(j.after) for k in jobs[1:7] if k.given["seed"] == j.given["seed"])
    turned = dict(sizes=[[1, 2]], data_root=str(nbs), seed=0, lr=0.0001, preset="smoke", cut="true")
    assert plan(Batch(**entry(**turned)), "elsewhere", nbs)[0].address == jobs[1].address
    again = plan(Batch(**entry(**turned), seed=1), "runs", nbs)  # own values come on top
    assert again[0].address == jobs[1].address


def test_the_only_run_that_is_waited_for(nbs):
    entries = ["10_grow", "11_dry", dict(notebook="22_use", after=["10_grow"])]
    grow, _, use = plan(Batch(notebooks=entries), nbs.parent / "runs", nbs)
    assert use.parameters["run"] == str(grow.folder)
    moved = plan(Batch(notebooks=entries), nbs.parent / "elsewhere", nbs)[-1]
    assert moved.address == use.address and moved.parameters["run"] != use.parameters["run"]
    entries[-1]["after"].append("11_dry")
    assert plan(Batch(notebooks=entries), nbs.parent / "runs", nbs)[-1].parameters["run"] == ""


def test_a_changed_default_is_another_run(nbs):
    before = plan(Batch(notebooks=["10_grow"]), nbs=nbs)[0].address
    write(nbs, "10_grow", COMMON + "lr = 2e-3\ncut = True\nsizes = [1]\nmask_root = ''", "1")
    assert plan(Batch(notebooks=["10_grow"]), nbs=nbs)[0].address != before


def test_the_books_own_batches(tmp_path, monkeypatch):
    ablations = {}
    (tmp_path / "settings.ini").write_text("lib_name = cxr-book")
    (tmp_path / "nbs").symlink_to(ROOT / "nbs")
    for name in ("noise", "shortcut"):  # the folders that a batch may name
        (tmp_path / "data" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for f in sorted((ROOT / "configs").glob("*.yaml")):
        jobs = plan(Batch.read(f))
        assert jobs, f.name
        ablations[f.stem] = {j.parameters["ablations"] for j in jobs if "ablations" in j.parameters}
        if f.stem in ("book", "edition"):
            assert [j.notebook for j in jobs].count("21_compare") == 1
            pages = sorted(n.stem for n in (ROOT / "nbs").glob("*.ipynb"))
            chapters = [p for p in pages if p.startswith("1")]
            shown = pages if f.stem == "edition" else [*chapters, "21_compare", "22_predict", "22a_export"]
            assert sorted(j.notebook for j in jobs) == shown
            assert len(next(j for j in jobs if j.notebook == "21_compare").parameters["runs"]) == 5
    assert ablations["book"] == {False} and ablations["edition"] == {True}


# --- what is run, and what is not


def test_done_again_changed_and_reused(nbs, cluster, monkeypatch):
    log, out = nbs.parent / "log", nbs.parent / "runs"
    found = "import os\nfound = '2' if os.path.exists(out_dir + '/w') else '1'\nopen(out_dir + '/w', 'w')\n"
    code = found + log_to(log, "found")
    write(nbs, "10_grow", COMMON, code)
    batch = Batch(notebooks=["10_grow"], preset="smoke")

    def go(**how):
        return [o.status for o in run_batch(batch, out, nbs, address=cluster, quiet=True, **how)]

    assert go() == ["done"] and go() == ["skipped"] and lines(log) == ["1"]
    assert go(again=True) == ["done"] and lines(log) == ["1", "1"]  # afresh: the file of the first run was gone
    write(nbs, "10_grow", COMMON, code, "x = 1")
    assert go(reuse=True) == ["done"] and go() == ["skipped"] and lines(log) == ["1", "1", "2"]
    write(nbs, "10_grow", COMMON, code, "x = 2")
    assert go() == ["done"] and lines(log) == ["1", "1", "2", "1"]
    write(nbs, "10_grow", COMMON, code, "x = 2  # a comment")
    assert go() == ["skipped"]


def test_failures_retries_and_what_waits(nbs, cluster):
    out = nbs.parent / "runs"
    flaky = "import os\nfirst = not os.path.exists(out_dir + '/seen')\nopen(out_dir + '/seen', 'w')\nassert not first"
    write(nbs, "12_flaky", COMMON, flaky)
    entries = ["11_dry", "12_flaky", dict(notebook="21_judge", after=["11_dry"])]
    entries += [dict(notebook="01_ink", after=["21_judge", "12_flaky"])]
    done = run_batch(Batch(notebooks=entries), out, nbs, address=cluster, quiet=True, retries=1)
    assert [o.status for o in done] == ["failed", "done", "blocked", "blocked"]
    assert done[0].error == "ZeroDivisionError: division by zero" and done[0].attempts == done[1].attempts == 2
    assert "ZeroDivisionError" in (done[0].job.folder / "failed.ipynb").read_text()
    assert "waits for what failed: 11_dry-" in done[2].error and not done[2].job.folder.exists()
    assert [f.name for f in done[1].job.folder.glob("*.ipynb")] == ["notebook.ipynb"]
    table = results(out).set_index("notebook")
    assert table.status.to_dict() == {"11_dry": "failed", "12_flaky": "done"}
    write(nbs, "11_dry", COMMON, "1 / 1")
    done = run_batch(Batch(notebooks=entries), out, nbs, address=cluster, quiet=True)
    assert [o.status for o in done] == ["done", "skipped", "done", "done"]
    done = run_batch(Batch(notebooks=["11_dry"]), out, nbs, address=cluster, quiet=True, again=True)
    some = Batch(notebooks=[entries[0], entries[2]])
    done = run_batch(some, out, nbs, address=cluster, quiet=True)
    assert [o.status for o in done] == ["skipped", "done"]  # what it waits for is newer


def test_a_run_that_another_process_is_at_is_waited_for(nbs, cluster, capsys):
    out = nbs.parent / "runs"
    (job,) = plan(Batch(notebooks=["01_ink"]), out, nbs)
    with execution.hold(job.folder):
        found = []
        args = dict(batch=Batch(notebooks=["01_ink"]), out=out, nbs=nbs, address=cluster)
        other = threading.Thread(target=lambda: found.extend(run_batch(**args)))
        other.start()
        time.sleep(2)
        assert not found and not (job.folder / "run.json").exists()
    other.join()
    assert found[0].status == "done" and "another process is executing it" in capsys.readouterr().out


# --- devices


def test_devices_of_workers():
    assert cuda_devices({"CUDA_VISIBLE_DEVICES": "GPU-a,MIG-b, 3"}) == ["GPU-a", "MIG-b", "3"]
    assert cuda_devices({"CUDA_VISIBLE_DEVICES": "1,-1,2"}) == ["1"]
    assert cuda_devices({"CUDA_VISIBLE_DEVICES": ""}) == cuda_devices({"PATH": ""}) == []
    assert [pin(i, ["1", "3"]) for i in (0, 1, 2)] == ["1", "3", "1"] and pin(0, []) is None
    assert pin("tcp://a:1", ["4"]) == "4" and pin("tcp://a:1", ["4", "5"]) == "4,5"


def test_two_notebooks_at_once_use_two_devices(nbs, cluster):
    meet = nbs.parent / "meet"
    meet.mkdir()
    code = f"""
import os, time
from pathlib import Path
Path({str(meet)!r}, str(seed)).write_text(os.environ["CUDA_VISIBLE_DEVICES"] + " " + os.environ["OMP_NUM_THREADS"])
end = time.time() + 60
while len(os.listdir({str(meet)!r})) < 2:
    assert time.time() < end, "alone"
    time.sleep(0.05)
"""
    write(nbs, "10_grow", COMMON, code)
    batch = Batch(notebooks=["10_grow"], seed=[0, 1])
    done = run_batch(batch, nbs.parent / "runs", nbs, address=cluster, devices=["5", "7"], quiet=True)
    assert [o.status for o in done] == ["done", "done"], done
    assert {o.device for o in done} == {"5", "7"} == {f.read_text().split()[0] for f in meet.iterdir()}


# --- kills


def alive(pids):
    return [p for p in map(int, pids) if psutil.pid_exists(p) and psutil.Process(p).status() != "zombie"]


def test_a_killed_worker_gives_its_notebook_to_another(nbs, cluster):
    log = nbs.parent / "log"
    code = f"""
import os, time, psutil
first = not os.path.exists({str(log)!r})
before = [] if first else open({str(log)!r}).read().split()
assert not [p for p in before if psutil.pid_exists(int(p))], "the old kernel is still there"
{log_to(log, "str(os.getpid())")}
time.sleep(300 if first else 0)
"""
    write(nbs, "10_grow", COMMON, code)
    found = []
    args = dict(batch=Batch(notebooks=["10_grow"]), out=nbs.parent / "runs", nbs=nbs, address=cluster, quiet=True)
    runner = threading.Thread(target=lambda: found.extend(run_batch(**args)))
    runner.start()
    await_true(lambda: lines(log))
    kernel = psutil.Process(int(lines(log)[0]))
    worker = kernel.parent().parent()
    folder = next((nbs.parent / "runs").glob("10_grow-*"))
    name = read_json(folder / "run.json")["worker"]
    worker.kill()
    runner.join()
    assert (found[0].status, found[0].attempts) == ("done", 2) and found[0].worker != name, found
    assert len(lines(log)) == 2 and not alive(lines(log))


RUNNER = """
import signal, sys
from cxr_book.batch import Batch, run_batch
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
    out, nbs, n, *address = sys.argv[1:]
    grow = dict(notebook="10_grow", parameters=dict(seed=[*range(int(n))]))
    batch = Batch(notebooks=[grow, dict(notebook="21_judge", after=["10_grow"])])
    done = run_batch(batch, out, nbs, workers=2, address="".join(address))
    sys.exit(not all(o.ok for o in done))
"""


def start_runner(tmp, n, *more):
    (tmp / "runner.py").write_text(RUNNER)
    command = [sys.executable, tmp / "runner.py", tmp / "runs", tmp / "nbs", n, *more]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CXR_BOOK_HOME": str(tmp)}
    with open(tmp / "said", "ab") as said:
        return subprocess.Popen([*map(str, command)], stdout=said, stderr=said, env=env, start_new_session=True)


def write_stages(nbs, log, pause):
    "A chapter in small: two stages, each written once; every start is logged."
    stage = """
import os, time
from pathlib import Path
{log}
for i in (1, 2):
    file = Path(out_dir, f"stage{{i}}")
    if not file.exists():
        time.sleep({pause})
        before = float(Path(out_dir, "stage1").read_text()) if i == 2 else seed
        Path(out_dir, "part").write_text(str(2 * before + 1))
        os.replace(Path(out_dir, "part"), file)
"""
    write(nbs, "10_grow", COMMON, stage.format(log=log_to(log, "f'{os.getpid()}:{seed}'"), pause=pause))
    total = "total = sum(float(open(r + '/stage2').read()) for r in runs)"
    write(nbs, "21_judge", COMMON + "runs = []", total, "open(out_dir + '/total', 'w').write(str(total))")


@pytest.mark.slow
def test_killed_at_ten_moments(tmp_path):
    log, n, rng, ended = tmp_path / "log", 4, random.Random(0), {}
    write_stages(tmp_path / "nbs", log, pause=0.3)
    for i in range(10):
        runner, before = start_runner(tmp_path, n), len(lines(log))
        if i % 3:  # some of the kills come before the first notebook has begun
            await_true(lambda: len(lines(log)) > before or runner.poll() is not None)
        time.sleep(rng.uniform(0, 2))
        runner.kill()
        runner.wait()
        pids = [word.split(":")[0] for word in lines(log)]
        await_true(lambda: not alive(pids), 30)  # kernels end soon
        for f in (tmp_path / "runs").glob("*/run.json"):
            if read_json(f)["status"] == "done":
                ended.setdefault(f.parent.name, (f.read_bytes(), (f.parent / "notebook.ipynb").read_bytes()))
    assert start_runner(tmp_path, n).wait() == 0, (tmp_path / "said").read_text()
    for name, files in ended.items():
        folder = tmp_path / "runs" / name
        assert ((folder / "run.json").read_bytes(), (folder / "notebook.ipynb").read_bytes()) == files, name
    table = results(tmp_path / "runs")
    assert (table.status == "done").all() and len(table) == n + 1
    for folder in map(Path, table.folder[table.notebook == "10_grow"]):
        seed = read_json(folder / "run.json")["parameters"]["seed"]
        assert float((folder / "stage2").read_text()) == 2 * (2 * seed + 1) + 1
    assert float((latest(tmp_path / "runs")["21_judge"] / "total").read_text()) == sum(4 * s + 3 for s in range(n))
    finished = lines(log)
    assert start_runner(tmp_path, n).wait() == 0 and lines(log) == finished  # nothing is run again
    assert len(finished) > n and ended, "no kill hit a notebook"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_runner_stops_its_notebooks_on_a_cluster(tmp_path, cluster, how):
    log = tmp_path / "log"
    write_stages(tmp_path / "nbs", log, pause=300)
    runner = start_runner(tmp_path, 1, cluster)
    await_true(lambda: lines(log))
    runner.send_signal(how)
    runner.wait()
    await_true(lambda: not alive(word.split(":")[0] for word in lines(log)), 30)


@pytest.mark.slow
def test_stopped_from_the_keyboard(tmp_path):
    log = tmp_path / "log"
    write_stages(tmp_path / "nbs", log, pause=300)
    runner = start_runner(tmp_path, 2)
    await_true(lambda: len(lines(log)) == 2)
    os.killpg(runner.pid, signal.SIGINT)
    assert runner.wait(timeout=30) != 0
    said = (tmp_path / "said").read_text()
    assert said.count("Traceback") <= 1 and "3 stopped of 3" in said, said
    await_true(lambda: not alive(word.split(":")[0] for word in lines(log)), 10)


# --- several processes for one training


TRAIN = """
from cxr_book.baselines import BaselineSettings, train_baselines
from cxr_book.study import open_study

settings = BaselineSettings.from_preset("smoke")
if __name__ == "__main__":
    train_baselines(open_study(settings, "10_baselines", "run"))
"""


@pytest.mark.slow
def test_a_chapters_training_in_two_processes(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CXR_BOOK_HOME": str(tmp_path)}
    command = [sys.executable, *launcher, "train.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    for name in ("dcnn", "chexnet"):
        history = json.loads((tmp_path / "run" / name / "history.json").read_text())
        assert len(history) == 1 and (tmp_path / "run" / name / "weights.safetensors").stat().st_size
