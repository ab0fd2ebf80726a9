"""The shape of the house: one file per method, plain code, texts whose commands run."""
import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import deit_video
import pkd_compressed
import spatial_kd
import tinyclip_swap
import wise_infer

ROOT = Path(__file__).parents[1]
MODULES = (tinyclip_swap, spatial_kd, deit_video, pkd_compressed, wise_infer)
SCRIPTS = [ROOT / f"{module.__name__}.py" for module in MODULES]
FILES = [ROOT / "common.py", *SCRIPTS]
COMPREHENSIONS = ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp
OWN = "main", "train", "evaluate", "parse", "report", "build_model", "benchmark"  # differ by script
each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)


def test_nothing_else_at_the_top_level():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True,
                            capture_output=True).stdout.split()
    assert {name.split("/")[0] for name in listed} <= {
        ".ci", ".gitignore", "LICENSE", "README.md", "pyproject.toml", "requirements.txt", "tests",
        *(path.name for path in FILES)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_code_is_plain(path):
    source = path.read_text()
    lines = source.splitlines()
    code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    assert max(map(len, lines)) <= 100
    assert sum(map(len, code)) / len(code) < 62
    double_assignments = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            double_assignments += isinstance(node.value, ast.Tuple)
        if isinstance(node, COMPREHENSIONS):
            assert len(node.generators) == 1, f"two loops in line {node.lineno}"
        if isinstance(node, ast.JoinedStr):
            inside = [part for part in ast.walk(node) if isinstance(part, COMPREHENSIONS)]
            assert not inside, f"a comprehension in the f-string of line {node.lineno}"
        if isinstance(node, ast.Lambda):
            assert not node.args.defaults, f"a lambda with defaults in line {node.lineno}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & {script.stem for script in SCRIPTS}
    assert double_assignments <= len(lines) / 100


def test_same_function_name_means_the_same_source():
    seen = {}
    for path in FILES:
        source = path.read_text()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in OWN:
                text = ast.get_source_segment(source, node)
                assert seen.setdefault(node.name, text) == text, f"{path.name}: {node.name}"


def test_common_holds_no_method():
    tree = ast.parse((ROOT / "common.py").read_text())
    names = {value for node in ast.walk(tree) for field in ("id", "arg", "attr", "name")
             if isinstance(value := getattr(node, field, None), str)}
    assert not [name for name in names if re.search(r"teacher|student|distill|loss|argparse", name)]
    assert not names & {"args", "cfg", "opt"}


@each_script
def test_docstring_states_claim_method_and_differences(path):
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert re.search(rf"^RESULT {path.stem} data=toy split=1 seed=0 \S+=\d", doc, re.M)
    assert re.search(r"^Differs from", doc, re.M)
    assert path.stem == "wise_infer" or "AdamW" in doc


@each_script
def test_the_method_is_fenced_and_its_lines_have_numbers(path):
    fence = re.search(r"\n# -+ the method: eqs?\. .*?-+\n(.*?)\n# -+ the rest is plumbing",
                      path.read_text(), re.S)[1]
    assert not re.search(r"\bargs\b|device|\.item\(|print\(", fence)
    for node in ast.parse(fence).body:
        lines = fence.splitlines()[node.lineno - 1:node.end_lineno]
        assert [line for line in lines if re.search(r"# +\(", line)], node.name  # shapes are named


@each_script
def test_each_step_of_a_training_loop_has_a_comment(path):
    source = path.read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("train"):
            lines = source.splitlines()[node.lineno - 1:node.end_lineno]
            assert sum(line.strip().startswith("#") for line in lines) >= 6, node.name


def commands():
    texts = {"README.md": (ROOT / "README.md").read_text()}
    texts |= {path.name: ast.get_docstring(ast.parse(path.read_text())) for path in SCRIPTS}
    parsers = {f"{module.__name__}.py": module.parse for module in MODULES}
    for where, text in texts.items():
        for line in re.sub(r"\\\n +", "", text).splitlines():  # three spaces: a remark follows
            for script, flags in re.findall(r'(\w+\.py)((?: (?:"[^"]*"|[^\s|;&`")]+))*)', line):
                if script in parsers and "--" in flags and "--resume" not in flags:
                    name = f"{where}: {line.strip()[:60]}"
                    flags = flags.replace("$s", "1")
                    yield pytest.param(parsers[script], shlex.split(flags), id=name)


@pytest.mark.parametrize(("parse", "flags"), commands())
def test_every_command_in_the_texts_parses(parse, flags):
    parse([flag.rstrip(",") for flag in flags])


def test_ci_runs_the_test_command_of_the_readme():
    lines = (ROOT / "README.md").read_text().splitlines()
    ends = [line.split()[-1] for line in lines if line.startswith("python3 -m venv")]
    assert ends == ["tinyclip_swap.py", "pytest"]
    assert len(lines) <= 160
