"""What README and docstrings say was printed stands in tests/records."""
import json
import re
from pathlib import Path

import pytest
import records

ROOT = Path(__file__).parents[1]
SCRIPTS = "tinyclip_swap", "spatial_kd", "deit_video", "pkd_compressed", "wise_infer"


@pytest.fixture(scope="module")
def runs():
    return records.read()


def test_a_table_is_computed_as_it_says(tmp_path):
    lines = [f"$ python a.py --seed {seed} --tau 2\nRESULT a seed={seed} x={x} y-1={y} y-2=.5 "
             f"seconds=9\n" for seed, x, y in ((0, .5, .3), (1, .7, .3))]
    (tmp_path / "a.txt").write_text("words\n" + "".join(lines))
    found = records.read(tmp_path)
    assert found == {"python a.py --tau 2": {
        seed: {"x": x, "y-1": .3, "y-2": .5, "seconds": 9} for seed, x in ((0, .5), (1, .7))}}
    claim = records.Claim("said", "python a.py --tau 2", "x", "y-*", "y-2", ("a", "b", "c"), "why")
    assert records.row(claim, found) == (
        "| said | `python a.py --tau 2` | a 60.0 ± 14.1, b 40.0 ± 0.0 | **+20.0 ± 14.1**, 2 of 2 | "
        "c +10.0 ± 0.0 | why |")
    (tmp_path / "a.txt").write_text("".join(lines + lines[:1]))
    with pytest.raises(ValueError, match="stands there twice"):
        records.read(tmp_path)


def test_readme_holds_the_table_of_the_records(runs):
    assert records.findings(runs) in (ROOT / "README.md").read_text()
    assert all(len(runs[claim.command]) == 5 for claim in records.CLAIMS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_docstrings_and_readme_say_what_the_plain_command_printed(runs, script):
    plain = runs[f"python {script}.py"][0]
    text = (ROOT / f"{script}.py").read_text()
    said = re.search(r"^RESULT .*?seconds=", text, re.M | re.S)[0]
    numbers = {name: float(x) for name, x in re.findall(r"(\S+)=([\d.]+)", said)}
    del numbers["split"], numbers["seed"]
    assert numbers == {name: x for name, x in plain.items() if name != "seconds"}
    known = list(plain.values())
    for pattern in ("ce-*", "progressive-*") if script == "pkd_compressed" else ():
        known += [x / 100 for x in records.values({0: plain}, pattern)]
    known = {f"{x + 1e-9:.3f}"[1:] for x in known}
    row = re.search(rf"^\| `{script}\.py`.*$", (ROOT / "README.md").read_text(), re.M)[0]
    assert set(re.findall(r"(?<=\s)\.\d{3}\b", row)) <= known


def test_the_readme_says_what_weizmann_gave(runs):
    folds = {"pkd_compressed": {}, "wise_infer": {}}
    for command, own in runs.items():
        if "--data weizmann" in command:
            folds[command.split()[1].removesuffix(".py")][command] = own[0]
    said = re.search(r"^- Weizmann.*$", (ROOT / "README.md").read_text(), re.M)[0]
    for script, pattern in (("wise_infer", "wise"), ("wise_infer", "fusion"),
                            ("wise_infer", "paper"), ("pkd_compressed", "progressive-*"),
                            ("pkd_compressed", "ce-*")):
        each = records.values(folds[script], pattern)
        assert len(each) == 3
        assert f"{sum(each) / 300 + 1e-9:.3f}"[1:] in said


def test_runs_of_a_folder_are_compared(tmp_path):
    for tau, x in ((1., .5), (2., .75)):
        (tmp_path / f"run{tau:g}").mkdir()
        record = {"flags": {"tau": tau, "seed": 0}, "results": {"soft": {"top1": x, "ms": 3.}}}
        (tmp_path / f"run{tau:g}" / "run.json").write_text(json.dumps(record))
    assert records.compare(tmp_path) == ("run1  --tau 1.0  soft=0.5000\n"
                                         "run2  --tau 2.0  soft=0.7500")
