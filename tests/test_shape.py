"""The rules of the house: one file per method, common.py for clips in and networks out."""
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
LOOPS = ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp


def functions(path):
    """{name: source} of a file's own functions and classes."""
    source = path.read_text()
    return {node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_nothing_else_stands_at_the_top():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True,
                            capture_output=True).stdout.split()
    assert {name.split("/")[0] for name in listed} <= {
        ".ci", ".gitignore", "LICENSE", "README.md", "pyproject.toml", "requirements.txt", "tests",
        *(path.name for path in FILES)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_code_is_plain(path):
    tree = ast.parse(path.read_text())
    assert max(map(len, path.read_text().splitlines())) <= 100
    for node in ast.walk(tree):
        lines = getattr(node, "end_lineno", 0) - getattr(node, "lineno", 0) + 1
        if isinstance(node, ast.FunctionDef):
            assert lines <= 60, f"{node.name} has {lines} lines"
        if isinstance(node, LOOPS):
            assert len(node.generators) == 1, f"two loops in line {node.lineno}"
        if isinstance(node, ast.JoinedStr):
            inside = [part for part in ast.walk(node) if isinstance(part, LOOPS)]
            assert not inside, f"a comprehension in the f-string of line {node.lineno}"
        if isinstance(node, ast.Lambda):
            assert not node.args.defaults, f"a lambda with defaults in line {node.lineno}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & {script.stem for script in SCRIPTS}


def test_same_function_name_means_the_same_source():
    seen = {}
    for path in FILES:
        for name, source in functions(path).items():
            if name not in ("main", "train", "evaluate", "parse", "report", "classify"):
                assert seen.setdefault(name, source) == source, f"{path.name}: {name}"


def test_common_holds_no_method():
    tree = ast.parse((ROOT / "common.py").read_text())
    names = {value for node in ast.walk(tree) for field in ("id", "arg", "attr", "name")
             if isinstance(value := getattr(node, field, None), str)}
    assert not [name for name in names if re.search(r"teacher|student|distill|loss|argparse", name)]
    assert not names & {"args", "cfg", "opt"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_opens_with_its_claim_and_its_method(path):
    doc, source = ast.get_docstring(ast.parse(path.read_text())), path.read_text()
    assert 35 <= len(doc.splitlines()) <= 55
    assert re.search(rf"^RESULT {path.stem} data=toy split=1 seed=0 \S+=\d", doc, re.M)
    assert "Differs from" in doc
    assert path.stem == "wise_infer" or re.search(r"^Schedule: AdamW, lr", doc, re.M)
    fence = re.search(r"\n# -+ the method: eqs?\. .*?-+\n(.*?)\n# -+ the rest is plumbing",
                      source, re.S)
    assert 20 <= len(fence[1].strip().splitlines()) <= 50
    assert not re.search(r"\bargs\b|device|\.item\(|print\(", fence[1])
    for node in ast.parse(fence[1]).body:
        lines = fence[1].splitlines()[node.lineno - 1:node.end_lineno]
        assert [line for line in lines if re.search(r"# +\(", line)], node.name  # shapes are named


def commands():
    texts = {"README.md": (ROOT / "README.md").read_text()}
    texts |= {path.name: ast.get_docstring(ast.parse(path.read_text())) for path in SCRIPTS}
    parsers = {f"{module.__name__}.py": module.parse for module in MODULES}
    for where, text in texts.items():
        for line in re.sub(r"\\\n +", "", text).splitlines():  # three spaces: a remark follows
            for script, flags in re.findall(r'(\w+\.py)((?: (?:"[^"]*"|[^\s|;&`")]+))*)', line):
                if script in parsers and "--" in flags:
                    name = f"{where}: {line.strip()[:60]}"
                    yield pytest.param(parsers[script], shlex.split(flags), id=name)


@pytest.mark.parametrize(("parse", "flags"), commands())
def test_every_command_in_the_texts_parses(parse, flags):
    parse([flag.rstrip(",") for flag in flags])


def test_the_readme_quotes_the_docstrings():
    readme = (ROOT / "README.md").read_text()
    for module in MODULES:
        result = re.search(r"^RESULT .*?seconds=", module.__doc__, re.M | re.S)[0]
        for value in re.findall(r"(?:large|small|alone|spatial|teacher|i4|wise)=(0\.\d+)", result):
            rounded = f"{float(value) + 1e-9:.3f}".lstrip("0")
            assert rounded in readme, f"{module.__name__}: {value}"


def test_ci_runs_the_readme_test_command():
    lines = (ROOT / "README.md").read_text().splitlines()
    ends = [line.split()[-1] for line in lines if line.startswith("python3 -m venv")]
    assert ends == ["tinyclip_swap.py", "pytest"]
