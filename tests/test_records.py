"""The README's table follows from tests/records, and docstrings quote what was printed."""
import json
import re
from pathlib import Path

import pytest
import records

ROOT = Path(__file__).parents[1]
SCRIPTS = "tinyclip_swap", "spatial_kd", "deit_video", "pkd_compressed", "wise_infer"


@pytest.fixture(scope="module")
def runs():
    return records.read_records()


def test_a_row_is_computed_from_its_records(tmp_path):
    lines = [f"$ python a.py --seed {seed} --tau 2\nRESULT a seed={seed} x={x} y={y} z=.5 "
             f"seconds=9\n" for seed, x, y in ((0, .5, .3), (1, .7, .3))]
    (tmp_path / "a.txt").write_text("words\n" + "".join(lines))
    runs = records.read_records(tmp_path)
    assert runs == {"python a.py --tau 2": {
        seed: {"x": x, "y": .3, "z": .5, "seconds": 9} for seed, x in ((0, .5), (1, .7))}}
    claim = records.Claim("it helps", "python a.py --tau 2", "x", "y", "z", "the control", "; why")
    # mean of 20 and 40 points, deviation 14.14: 12.706 * 14.14 / sqrt(2)
    assert records.findings(runs, [claim]).splitlines()[-1] == (
        "| it helps | **+30.0** ± 127.1 | the control +20.0 | not shown; why |")
    claim = claim._replace(longer=claim.command)
    assert "| +30.0 | the control" in records.findings(runs, [claim])
    (tmp_path / "a.txt").write_text("".join(lines + lines[:1]))
    with pytest.raises(ValueError, match="recorded twice"):
        records.read_records(tmp_path)


@pytest.mark.parametrize(("gains", "word"), [
    ([1., 2., 1.5], "confirmed"), ([-1., -2., -1.5], "refuted"), ([5., -4., 2.], "not shown"),
    ([.1, -.1, 0.], "equivalent within 1 point"), ([3.], "not shown")])
def test_the_verdict_follows_from_the_interval(gains, word):
    assert records.verdict(gains) == word


@pytest.mark.parametrize(("file", "claims"), [
    ("README.md", records.QUALITY), ("tests/records/measured.md", records.SPEED)])
def test_tables_are_those_of_the_records(runs, file, claims):
    assert records.findings(runs, claims) in (ROOT / file).read_text()
    assert all(len(runs[claim.command]) >= 5 for claim in claims)
    assert all(claim.longer == "" or len(runs[claim.longer]) >= 2 for claim in claims)


def test_no_verdict_changes_with_three_times_the_steps(runs):
    """Two seeds have no useful interval: where a verdict is sure, their mean has its sign."""
    for claim in records.QUALITY:
        gain = records.gains(runs[claim.command], claim.technique, claim.baseline)
        longer = records.gains(runs.get(claim.longer, {}), claim.technique, claim.baseline)
        if longer and records.verdict(gain) in ("confirmed", "refuted"):
            assert sum(gain) * sum(longer) > 0, claim.claim


@pytest.mark.parametrize("script", SCRIPTS)
def test_docstrings_quote_what_the_plain_command_printed(runs, script):
    printed = runs[f"python {script}.py"][0]
    text = (ROOT / f"{script}.py").read_text()
    quoted = re.search(r"^RESULT .*?seconds=", text, re.M | re.S)[0]
    numbers = {name: float(x) for name, x in re.findall(r"(\S+)=([\d.]+)", quoted)}
    del numbers["split"], numbers["seed"]
    assert numbers == {name: x for name, x in printed.items() if name != "seconds"}


def test_runs_are_grouped_by_their_flags(tmp_path):
    for name, tau, seed, x in (("a", 1., 0, .5), ("b", 1., 1, .7), ("c", 2., 0, .75)):
        (tmp_path / name).mkdir()
        record = {"flags": {"tau": tau, "seed": seed, "split": 1},
                  "results": {"scores": {"soft": x}}}
        (tmp_path / name / "results.json").write_text(json.dumps(record))
    text = records.summarize(tmp_path)
    assert re.search(r"--tau 1\.0   split 1 seed 0, split 1 seed 1\n"
                     r"soft +mean 0\.6000  sd 0\.1414  95 % \+-1\.2706  of 0\.5000 0\.7000", text)
    assert "--tau 2.0   split 1 seed 0\n" in text


def test_accuracy_per_class_and_confusion_of_a_run(tmp_path):
    lines = ["a,wave,wave,.9,clap,.1", "b,wave,clap,.6,wave,.4", "c,wave", "d,clap,clap,1."]
    header = "video,truth,class1,p1,class2,p2"
    (tmp_path / "large-predictions.csv").write_text("\n".join([header, *lines]))
    (tmp_path / "large_unseen-predictions.csv").write_text(f"{header}\ne,jump,jump,1.")
    table, mistakes = records.classes_of_run(tmp_path).split("\n\n")[:2]
    assert [line.split() for line in table.splitlines()] == [
        ["class", "large", "large_unseen"], ["clap", "1.0000", "-"], ["wave", "0.3333", "-"],
        ["mean", "of", "the", "classes", "0.6667", "1.0000"], ["top-1", "0.5000", "1.0000"],
        ["jump", "-", "1.0000"]]
    assert mistakes.splitlines() == [
        "most frequent mistakes of large", "  wave, taken for clap: 1 of 3 videos",
        "  wave, cannot be decoded: 1 of 3 videos"]


def test_learning_curves_count_compute_in_epochs_of_the_first_variant(tmp_path, capsys):
    epochs = [{"variant": variant, "epoch": epoch, "top1": top1, "loss": 1.}
              for variant, curve in (("large", (.5, .95, 1.)), ("small", (.2, .8, .9)))
              for epoch, top1 in enumerate(curve, 1)]
    record = {"epochs": [*epochs, {"variant": "small", "epoch": 4, "loss": 1.}],
              "results": {"large": {"GMAC/video": 4.}, "small": {"GMAC/video": 2.}}}
    curves = records.learning_curves(record)
    assert curves == {"large": [(1, .5), (2, .95), (3, 1.)],
                      "small": [(.5, .2), (1., .8), (1.5, .9)]}
    assert records.time_to_learn(curves) == {"large": 2, "small": 1.5}
    exits = [{"variant": "exits", "epoch": 1, "labels": 2., "top1_labels": .5, "top1_self": .4}]
    assert records.learning_curves({"epochs": exits, "results": {}}) == {
        "labels": [(1, .5)], "self": [(1, .4)]}
    (tmp_path / "results.json").write_text(json.dumps(record))
    records.save_curves([tmp_path], tmp_path / "curves.svg")
    assert re.findall(r"after (\S+)", capsys.readouterr().out) == ["2", "1.5"]
    drawing = (tmp_path / "curves.svg").read_text()
    assert len(re.findall(r'<path d="M\S+ \S+L', drawing)) == 2
    assert 'y="16.0" text-anchor="end" dy="4">1.0<' in drawing
