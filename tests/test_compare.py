"What the pages of the comparison cannot say: who is refused, what is predicted again, and that its figures are the chapters'."

import base64
import json
import os
import shutil
from dataclasses import replace

import matplotlib

matplotlib.use("agg")

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import settings as h_settings
from hypothesis import strategies as st

from cxr_book import compare as P
from cxr_book import contest as C
from cxr_book import contrasts as T
from cxr_book.baselines import BaselineSettings
from cxr_book.catalogue import CHAPTERS
from cxr_book.core import FINDINGS, CxrError, Run, read_json, write_json
from cxr_book.evaluation import heat_of
from cxr_book.layers import save_weights
from cxr_book.limited import LimitedSettings, make_folds, predict_folds
from cxr_book.localization import PAPER_RULES, BoxRule
from cxr_book.phantom import PhantomSettings, draw_dataset
from cxr_book.results import Results
from cxr_book.splits import Split
from cxr_book.study import open_study, predict_parts


def drawn(**change):
    return draw_dataset(PhantomSettings.from_preset("smoke", n_images=48, size=64, **change))


def small(kind, root):
    "Settings of a chapter on a small drawn set."
    return kind.from_preset("smoke", image_size=48, n_boot=20, valid=0.25, data_root=str(root))


def pretend(chapter, settings, out, folders, seed=0, score=True):
    "A chapter's run folder with weights that nobody trained: folder -> the catalogue's name of its network."
    study, nets = open_study(settings, chapter, out), {}
    for i, (folder, name) in enumerate(folders.items()):
        torch.manual_seed(seed + i)
        nets[folder] = CHAPTERS[chapter].methods(settings.but(weights=None))[name]().eval()
        save_weights(nets[folder], out / folder / "weights.safetensors")
        write_json(out / folder / "history.json", [dict(stage="train", epoch=e, seconds=3.0) for e in (1, 2)])
    if not score:
        return out
    if chapter == "13_limited":
        fold = make_folds(study)[:1]
        seen = replace(study, split=Split([], study.split.valid, fold[0].test, study.split.patients))
        views = {"un=0%": "crf", "un=0%, no CRF": "unary"}
        made = {key: predict_folds(seen, fold, [nets["un0-fold0"].view(view)]) for key, view in views.items()}
        Results(seen, made, PAPER_RULES["003"], chapter)
    else:
        made = {name: predict_parts(study, net) for name, net in nets.items()}
        Results(study, made, BoxRule(threshold=0.7), chapter)
    return out


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXR_BOOK_HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def runs(home):
    nets, root = {"dcnn": "dcnn", "chexnet": "chexnet"}, drawn()
    base = pretend("10_baselines", small(BaselineSettings, root), home / "runs" / "10", nets)
    few = pretend("13_limited", small(LimitedSettings, root), home / "runs" / "13", {"un0-fold0": "crf"})
    return [base, few]


@pytest.fixture(scope="module")
def entrants(runs, home):
    return C.enter(runs, home / "compared")


def compared_in(folder, entrants, runs, **how):
    settings = C.CompareSettings.from_preset("smoke", runs=[*map(str, runs)], n_boot=20, **how)
    return C.Comparison(settings, Run(folder, settings), entrants)


@pytest.fixture(scope="module")
def compared(entrants, runs, home):
    return compared_in(home / "compared", entrants, runs)


# ---------------------------------------------------------------- the same figures as the chapters


def test_every_method_has_the_figures_of_its_chapter(compared):
    for key, e in compared.entrants.items():
        theirs, part = e.trained.metrics, "common" if key.startswith("13") else "all"
        for finding in ("Mean", *FINDINGS):
            mine = compared.means("AUROC", part=part, finding=finding).value[key]
            known = theirs["auroc"][finding]["value"]
            assert mine == pytest.approx(np.nan if known is None else known, abs=1e-6, nan_ok=True)
        for mode, found in theirs["modes"].items():
            for metric, cells in found["metrics"].items():
                mine = compared.means(metric, mode, part).loc[key]
                for what in ("value", "low", "high"):
                    assert mine[what] == pytest.approx(cells["Mean"][what], abs=1e-6, nan_ok=True), (key, mode, metric)


def test_the_values_of_boxes_make_the_means(compared):
    for part, rows in compared.parts.items():
        for key in compared.on(part):
            pairs, values = compared.values(key, rows)
            assert np.isin(pairs.row, rows).all() and len(pairs.at)
            for metric in ("IoU", "pointing", "energy"):
                mean = np.nanmean([np.nanmean(values[metric][pairs.finding == k]) for k in np.unique(pairs.finding)])
                assert mean == pytest.approx(compared.means(metric, "validated", part).value[key], abs=1e-9)


# ---------------------------------------------------------------- who is judged on what


def test_no_method_is_judged_on_what_it_has_seen(compared):
    patients = compared.patients
    for key, e in compared.entrants.items():
        for member in e.members:
            assert not set(patients[member.seen]) & set(patients[member.judged])
        assert set(compared.test(key).rows) == set(e.judged) <= set(e.study.split.test)
    few = compared.entrants["13/un=0%"]
    assert set(compared.parts["common"]) == set(few.judged) < set(compared.parts["all"])
    assert not set(compared.scores[compared.scores.part == "all"].method) & {"13/un=0%", "13/un=0%, no CRF"}
    fold = make_folds(few.study)[0]
    assert set(fold.learn) <= set(few.members[0].seen)


def test_a_seen_image_among_the_judged_ones_stops_the_comparison(entrants):
    e = entrants["13/un=0%"]
    bad = replace(e, members=(e.members[0]._replace(judged=np.r_[e.judged, e.members[0].seen[:1]]),))
    with pytest.raises(AssertionError, match="judged on what it has seen"):
        C.judged_on({"bad": bad}, e.judged)


def test_folds_by_image_leave_out_patients_that_leak(entrants, home):
    e = entrants["13/un=0%"]
    study = replace(e.study, settings=e.study.settings.but(by="image"))
    member = C.member_of(replace(e.trained, settings=study.settings), study)
    fold, who = make_folds(study)[0], e.study.radiographs.table["patient"].to_numpy()
    assert set(who[fold.learn]) & set(who[fold.test])  # they do leak
    assert not set(who[member.seen]) & set(who[member.judged]) and set(member.judged) < set(fold.test)


def test_folds_together_are_one_method(entrants, runs, home):
    both = home / "both"
    shutil.copytree(runs[1], both)
    shutil.copytree(both / "un0-fold0", both / "un0-fold1")
    found = C.enter([both], home / "compared")
    e = found["13/un=0%"]
    assert [m.trained.folder.name for m in e.members] == ["un0-fold0", "un0-fold1"] and list(C.parts_of(found)) == ["all"]
    test = C.predictions_of(e, "test", home / "kept-folds")
    assert np.array_equal(test.rows, e.study.split.test) and len(set(test.rows)) == len(test.rows)


# ---------------------------------------------------------------- who is refused


@pytest.mark.parametrize("key, value", [("seed", 7), ("data", "00000000"), ("preset", "quick")])
def test_runs_that_do_not_belong_together_are_refused_by_key(key, value, runs, home, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs[1], other)
    write_json(other / "config.json", read_json(other / "config.json") | {key: value})
    with pytest.raises(CxrError, match=f"{key} = .*compare runs of the same data, seed and preset"):
        C.enter([runs[0], other], home / "compared")


def test_other_refusals(runs, home, tmp_path):
    with pytest.raises(CxrError, match="both of 10_baselines"):
        C.enter([runs[0], runs[0]], home / "compared")
    with pytest.raises(CxrError, match="no finished run"):
        C.enter([], home / "compared")
    with pytest.raises(CxrError, match="config.json"):
        C.enter([tmp_path], home / "compared")
    shutil.copytree(runs[0], tmp_path / "old")
    write_json(tmp_path / "old" / "config.json", read_json(runs[0] / "config.json") | {"data": "00000000"})
    with pytest.raises(CxrError, match="data = .*train it again"):
        C.enter([tmp_path / "old"], home / "compared")


def test_the_newest_finished_run_of_each_chapter(runs, home, tmp_path):
    config = read_json(runs[0] / "config.json")
    for name in ("a", "b", "unfinished", "deep/c"):
        shutil.copytree(runs[0], tmp_path / name)
    (tmp_path / "unfinished" / "metrics.json").unlink()
    for i, name in enumerate(("b", "deep/c", "a")):
        os.utime(tmp_path / name / "metrics.json", (2e9 + i, 2e9 + i))
    assert C.newest_runs(config["data"], "smoke", 0, tmp_path) == [tmp_path / "a"]
    assert C.newest_runs(config["data"], "smoke", 1, tmp_path) == C.newest_runs("other", "smoke", 0, tmp_path) == []
    assert C.newest_runs(config["data"], "smoke") == runs  # models inside a run are no runs


# ---------------------------------------------------------------- predictions that are kept


def test_kept_predictions_are_read_and_only_where_nothing_changed(entrants, runs, home, tmp_path, monkeypatch):
    here = tmp_path / "10"
    shutil.copytree(runs[0], here)
    e = C.enter([here], home / "compared")["10/dcnn"]
    first = C.predictions_of(e, "test", tmp_path / "kept")
    calls, real = [], C.predict
    monkeypatch.setattr(C, "predict", lambda *a, **k: calls.append(1) or real(*a, **k))
    again = C.predictions_of(e, "test", tmp_path / "kept")
    assert not calls and all(np.array_equal(a, b) for a, b in zip(vars(first).values(), vars(again).values()))
    net = e.trained.load()
    with torch.no_grad():
        net.classifier.linear.bias.add_(1.0) if hasattr(net.classifier, "linear") else next(net.parameters()).add_(1.0)
    save_weights(net, here / "dcnn" / "weights.safetensors")
    other = C.predictions_of(e, "test", tmp_path / "kept")
    assert len(calls) == 1 and not np.array_equal(other.logits, first.logits)
    C.predictions_of(replace(e, members=(e.members[0]._replace(judged=e.judged[1:]),)), "test", tmp_path / "kept")
    assert len(calls) == 2  # other rows


def test_a_second_comparison_predicts_and_scores_nothing(compared, entrants, runs, home, monkeypatch):
    def never(*_, **__):
        raise AssertionError("predicted or scored again")

    monkeypatch.setattr(C, "predict", never)
    monkeypatch.setattr(C, "evaluate", never)
    again = compared_in(home / "compared", entrants, runs)
    pd.testing.assert_frame_equal(again.scores, compared.scores)
    assert all(np.array_equal(again.cuts[k], compared.cuts[k], equal_nan=True) for k in compared.cuts)


def test_the_runs_are_only_read(runs, compared):
    for run in runs:
        assert {f.name for f in run.iterdir()} <= {"config.json", "metrics.json", "stamp.json", "figures", "state", "dcnn",
                                                   "chexnet", "un0-fold0"}  # fmt: skip


# ---------------------------------------------------------------- tests between methods


def test_holm_by_hand():
    p = [0.01, 0.04, 0.03, 0.005]  # sorted .005 x 4 = .02, .01 x 3 = .03, .03 x 2 = .06, .04 x 1 = .04 -> .06
    assert T.holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@h_settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_the_step_down_procedure(p):
    "Against the procedure itself: reject from the smallest on, at level / (number left), until one is not rejected."
    corrected = T.holm(p)
    for level in (0.01, 0.05, 0.2):
        rejected, order = set(), np.argsort(p, kind="stable")
        for step, i in enumerate(order):
            if p[i] * (len(p) - step) > level:
                break
            rejected.add(int(i))
        assert rejected == set(np.flatnonzero(corrected <= level))
    assert (corrected >= np.asarray(p)).all() and (corrected <= 1).all()


def test_differences_are_those_of_the_means(compared):
    for part in compared.parts:
        tested = compared.paired(part)
        keys = compared.on(part)
        assert len(tested) == 2 * len(keys) * (len(keys) - 1) // 2
        for row in tested.itertuples():
            mean = compared.means(row.metric, "" if row.metric == "AUROC" else "validated", part).value
            assert row.value == pytest.approx(mean[row.a] - mean[row.b], abs=1e-9)
            assert row.low <= row.value + 1e-12 and row.p <= row.holm <= 1


# ---------------------------------------------------------------- costs and kinds


def test_costs(compared):
    costs = compared.costs()
    assert list(costs.index) == list(compared.entrants) and (costs > 0).all(axis=None)
    assert costs.training["10/dcnn"] == 6 and costs.parameters["13/un=0%"] == costs.parameters["13/un=0%, no CRF"]


def test_training_counts_what_a_method_starts_from(compared, runs, tmp_path):
    here = tmp_path / "12"
    for name in ("pretrained-small-resnet", "pretrained-other", "classifier", "mix"):
        write_json(here / name / "history.json", [dict(seconds=1.0)])
    trained = compared.entrants["10/dcnn"].trained
    of = lambda name: [f.name for f in T.starts_from(replace(trained, run=here, folder=here / name), trained.load())]  # noqa: E731
    assert of("mix") == ["pretrained-small-resnet", "classifier", "mix"]
    assert of("classifier") == ["pretrained-small-resnet", "classifier"]


def test_strata_add_up(compared):
    kinds = compared.by_kind("all")
    pairs, values = compared.values("10/dcnn", compared.parts["all"])
    assert set(kinds.by) == {"size", "visible", "severity"}
    for (_, key), rows in kinds.groupby(["by", "method"]):
        mine = compared.values(key, compared.parts["all"])[1]["IoU"]
        assert rows.n.sum() == len(mine) and np.average(rows.value, weights=rows.n) == pytest.approx(mine.mean())
        assert (rows["from"] <= rows["at"]).all() and (rows["at"] <= rows["to"]).all()
    sizes = T.facts_of(compared.data, pairs)["size"]
    truth = pd.read_csv(compared.data.root / "truth.csv").set_index(["Image Index", "Finding"]).Area
    i = len(sizes) // 2
    assert sizes[i] == truth[compared.data.table["image"][pairs.row[i]], FINDINGS[pairs.finding[i]]]
    bare = T.facts_of(replace(compared.data, root=compared.run.folder), pairs)
    assert list(bare) == ["size"] and (bare["size"] >= sizes - 1e-9).all()  # of a box


@h_settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]), min_size=1, max_size=20), st.integers(1, 5))
def test_equal_values_stay_together(x, n):
    part = T.cut_into(np.array(x), n)
    assert part.min() >= 0 and part.max() < n and all(len(set(part[np.array(x) == v])) == 1 for v in x)


# ---------------------------------------------------------------- stress


@pytest.fixture(scope="module")
def stressed(home):
    kinds = {"noise": dict(false_positives=0.05, false_negatives=0.3), "marks": dict(shortcut_tube=0.9, shortcut_marker=0.9)}
    roots = {name: drawn(**change) for name, change in kinds.items()}
    made = {}
    for name, root in roots.items():
        out = home / "stress" / name
        made[name] = pretend("10_baselines", small(BaselineSettings, root), out, {"dcnn": "dcnn"}, score=False)
    return {name: C.enter([run], home / "compared") for name, run in made.items()}


def test_the_same_weights_are_the_same_under_stress(compared, stressed):
    noise = compared.under_stress(stressed["noise"])
    area = noise[noise.metric == "AUROC"].iloc[0]
    assert (area.kind, area.method, area.value, area.p) == ("label noise", "10/dcnn", 0, 1)
    assert area.clean == pytest.approx(compared.means("AUROC").value["10/dcnn"])
    overlap = noise[noise.metric == "IoU"].iloc[0]
    assert overlap.clean == pytest.approx(compared.means("IoU", "validated").value["10/dcnn"])
    assert overlap.value == pytest.approx(overlap.stressed - overlap.clean) and overlap.images == area.images == len(compared.parts["all"])


def test_a_shortcut_is_measured_on_its_findings_with_and_without_the_mark(compared, stressed):
    marks = compared.under_stress(stressed["marks"]).set_index(["metric", "finding"])
    told = {"Pneumothorax", "Infiltration"}
    assert set(marks.index) == {("AUROC", "Mean"), ("IoU", "Mean"), *((m, f) for m in ("AUROC", "reliance") for f in told)}
    for row in marks.itertuples():
        assert np.isnan(row.value) or row.value == pytest.approx(row.stressed - row.clean)
    table = P.stress_table(marks.reset_index(), "shortcut", "reliance")
    assert np.array_equal(table.iloc[:, :2], marks.loc["reliance", ["clean", "stressed"]], equal_nan=True)
    arm = next(compared.arms(stressed["marks"]))
    assert np.array_equal(arm.logits[0], arm.logits[1]) and not np.array_equal(arm.logits[1], arm.logits[2])


def test_the_answer_names_who_relies_on_a_mark():
    line = dict(kind="shortcut", metric="reliance", finding="Mass", clean=0.9, low=-0.1, high=0.3)
    lines = [line | dict(method="a", stressed=0.7, value=0.2), line | dict(method="b", stressed=0.8, value=0.0)]
    (question, text), = P._under_stress(pd.DataFrame(lines))
    assert question == "And if a mark tells the answer?" and "`b` loses least, 0.000" in text and "`a` most, 0.200" in text
    shown = P.stress_table(pd.DataFrame(lines).assign(p=0.01), "shortcut", "reliance")
    assert shown.loc["a, Mass"].tolist() == [0.9, 0.7, "+0.200 [-0.100, +0.300] *"]  # as the columns say, no sum of them
    assert P._under_stress(pd.DataFrame(lines).assign(value=np.nan)) == P._under_stress(pd.DataFrame()) == []


def test_stress_on_other_patients_or_by_other_settings_is_refused(compared, entrants, stressed, home):
    clean, other = entrants["10/dcnn"], stressed["noise"]["10/dcnn"]
    changed = replace(other.trained, settings=other.trained.settings.but(lr=0.5))
    with pytest.raises(CxrError, match="lr = 0.5.*same settings"):
        T._same(clean, replace(other, members=(other.members[0]._replace(trained=changed),)))
    few = replace(other.study, split=replace(other.study.split, test=other.study.split.test[:-1]))
    with pytest.raises(CxrError, match="data_root: other test images"):
        T._same(clean, replace(other, study=few))
    with pytest.raises(CxrError, match="neither"):
        T.stress_of(compared.data.root)
    with pytest.raises(CxrError, match="no drawn.json"):
        T.stress_of(home)


# ---------------------------------------------------------------- the page


def test_the_answer_is_made_of_the_tables(compared, stressed):
    tested = pd.concat([compared.paired(p) for p in compared.parts], ignore_index=True)
    costs, kinds = compared.costs(), compared.by_kind("all")
    lines = P.verdict(compared, tested, costs, kinds, compared.under_stress(stressed["noise"]))
    text = dict(lines)
    area = compared.means("AUROC").value.reindex(compared.on("all"))
    best = area.idxmax()
    assert text["Is a finding there?"].startswith(f"`{best}`") and f"{area[best]:.3f}" in text["Is a finding there?"]
    assert any("boxes or not" in q for q in text) and "And if labels are wrong?" in text
    assert P.verdict(compared, tested, costs, kinds.iloc[:0], pd.DataFrame())[-1][0] == "And at the lowest cost?"


def test_the_results_file_holds_what_the_page_shows(compared, tmp_path):
    tables = dict(pairs=compared.paired("all"), costs=compared.costs(), kinds=compared.by_kind("all"), stress=pd.DataFrame())
    found = P.write_comparison(compared, [("q", "a")], tables)
    assert read_json(compared.run.folder / "comparison.json") == json.loads(json.dumps(found))
    assert (compared.run.folder / "comparison.json").stat().st_size < 1e6
    assert {m["key"] for m in found["methods"]} == set(compared.entrants) and found["stress"] == []
    long = pd.read_csv(compared.run.folder / "comparison.csv")
    mine = long.query("part == 'all' and rule == 'common' and metric == 'IoU' and mode == 'oracle' and finding == 'Mean'")
    for row in mine.itertuples():
        assert row.value == pytest.approx(compared.means("IoU", "oracle", "all", "common").value[row.method], abs=6e-5)
    assert "/tmp" not in found["command"] and found["command"].count("runs/1") == 2


def test_the_explorer_file(compared, tmp_path):
    path = P.write_explorer(compared, tmp_path / "explorer.json", images=6)
    page = read_json(path)
    assert page["findings"] == list(FINDINGS) and 1 <= len(page["images"]) <= 6 and path.stat().st_size < 1_400_000
    names = [m["name"] for m in page["methods"]]
    assert names[:2] == ["10/dcnn", "13/un=0%"] and len(names) <= 8
    assert all(len(m["thresholds"]) == 14 and m["rule"] in ("largest", "contours", "union") for m in page["methods"])
    common = set(compared.data.table["image"][compared.parts["common"]])
    for image in page["images"]:
        assert image["name"] in common and set(image["maps"]) == set(names)
        there = {str(b["finding"]) for b in image["boxes"]}
        grey = cv2.imdecode(np.frombuffer(base64.b64decode(image["jpeg"]), np.uint8), cv2.IMREAD_UNCHANGED)
        assert grey.shape == (256, 256) and all(0 <= v <= 1 for b in image["boxes"] for v in b["box"])
        for maps in image["maps"].values():
            assert there <= set(maps) and len(set(maps) - there) <= 1
            assert all(len(base64.b64decode(m)) == 32 * 32 for m in maps.values())
            assert not any(FINDINGS[int(k)] in image["labels"] for k in set(maps) - there)
    assert len({i["name"] for i in page["images"]}) == len(page["images"])
    with pytest.raises(AssertionError, match="fewer images"):
        P.write_explorer(compared, tmp_path / "e.json", images=6, most=1000)


def test_the_heat_of_the_explorer_is_that_of_the_evaluation(compared, tmp_path):
    page = read_json(P.write_explorer(compared, tmp_path / "explorer.json", images=1))
    image, key = page["images"][0], "10/dcnn"
    row = int(np.flatnonzero(compared.data.table["image"] == image["name"])[0])
    test = C.subset(compared.test(key), np.array([row]))
    for k, text in image["maps"][key].items():
        heat = heat_of(test, np.zeros(1, int), np.array([int(k)]), compared.entrants[key].trained.rule)[0]
        blocks = heat.reshape(32, 4, 32, 4).mean((1, 3))  # 128 cells to 32
        mine = np.frombuffer(base64.b64decode(text), np.uint8).reshape(32, 32)
        assert np.abs(mine / 255 - blocks).max() <= 0.51 / 255 + 1e-6
