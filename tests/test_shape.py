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
NAMES = ("tinyclip_swap", "spatial_kd", "deit_video", "pkd_compressed", "wise_infer")
SCRIPTS = [path for name in NAMES if (path := ROOT / f"{name}.py").exists()]
FILES = [ROOT / "common.py", *SCRIPTS]
PARSERS = {f"{script.__name__}.py": script.parse for script in (
    tinyclip_swap, spatial_kd, deit_video, pkd_compressed, wise_infer)}


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
        "common.py", *(f"{name}.py" for name in NAMES)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_lines_are_a_hundred_wide_and_no_script_imports_another(path):
    assert max(map(len, path.read_text().splitlines())) <= 100
    imported = {alias.name for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, ast.ImportFrom)}
    assert not imported & {script.stem for script in SCRIPTS}


def test_same_function_name_means_the_same_source():
    seen = {}
    for path in FILES:
        for name, source in functions(path).items():
            if name not in ("main", "train", "evaluate", "parse", "table"):
                assert seen.setdefault(name, source) == source, f"{path.name}: {name}"


def test_common_holds_no_method():
    tree = ast.parse((ROOT / "common.py").read_text())
    names = {value for node in ast.walk(tree) for field in ("id", "arg", "attr", "name")
             if isinstance(value := getattr(node, field, None), str)}
    assert not [name for name in names if re.search(r"teacher|student|distill|loss|argparse", name)]
    assert not names & {"args", "cfg", "opt"}


def test_common_holds_only_what_scripts_use():
    inside_only = {  # used by common.py itself, by tests, or by scripts still to come
        "BadVideo", "toy_truth", "toy_caption", "draw_toys", "toy_clip", "write_video",
        "make_toy_folder", "cached", "VideoData", "words", "segment_indices", "dense_indices",
        "open_video", "VideoIndex", "video_index", "read_frames", "to_picture", "Sample",
        "ClipOrder", "build_clip", "load_strictly", "FusionHead", "MeanHead", "ActionCLIP",
        "p_frames", "Coded", "read_compressed", "warp", "modalities", "compressed_view",
        "reencode_video", "reencode", "ExitNet", "ExitHead", "exit_heads", "exit_logits"}
    public = {name for name in functions(ROOT / "common.py") if not name.startswith("_")}
    unused = {name for name in public - inside_only
              if len([p for p in SCRIPTS if re.search(rf"\b{name}\b", p.read_text())])
              < min(2, len(SCRIPTS))}
    assert not unused


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_opens_with_its_claim_and_its_method(path):
    doc, source = ast.get_docstring(ast.parse(path.read_text())), path.read_text()
    assert 40 <= len(doc.splitlines()) <= 60
    assert re.search(rf"^RESULT {path.stem} data=toy split=1 seed=0 \S+=\d", doc, re.M)
    assert "Differs from" in doc
    fence = re.search(r"\n# -+ the method: eqs?\. .*?-+\n(.*?)\n# -+ the rest is plumbing",
                      source, re.S)
    assert 20 <= len(fence[1].splitlines()) <= 45
    assert not re.search(r"\bargs\b|device|\.item\(|print\(", fence[1])
    for function in ast.parse(fence[1]).body:
        assert re.search(r"# \(", ast.get_source_segment(fence[1], function))  # shapes are named


def commands():
    texts = {"README.md": (ROOT / "README.md").read_text()}
    texts |= {path.name: ast.get_docstring(ast.parse(path.read_text())) for path in SCRIPTS}
    for where, text in texts.items():
        for line in re.sub(r"\\\n +", "", text).splitlines():  # three spaces: a remark follows
            for script, flags in re.findall(r'(\w+\.py)((?: (?:"[^"]*"|[^\s|;&`"]+))*)', line):
                if script in PARSERS and "--" in flags and "--help" not in flags:
                    yield pytest.param(script, shlex.split(flags),
                                       id=f"{where}: {line.strip()[:60]}")


@pytest.mark.parametrize(("script", "flags"), commands())
def test_every_command_in_the_texts_parses(script, flags):
    PARSERS[script](flags)


def test_ci_runs_the_readme_test_command():
    lines = [line for line in (ROOT / "README.md").read_text().splitlines()
             if line.startswith("python3 -m venv")]
    assert len(lines) == 2
    assert [line.split()[-1] for line in lines] == ["tinyclip_swap.py", "pytest"]
