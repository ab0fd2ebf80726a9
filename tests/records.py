"""Means and intervals over seeds, accuracy per class: the README's table, and runs of your own.

  python tests/records.py                    the README's table, and that of measured.md
  python tests/records.py all                mean and deviation of every number in records/
  python tests/records.py runs/spatial_kd    runs that differ in seed or split alone: mean of each
                                             number, standard deviation, 95 % interval
  python tests/records.py runs/spatial_kd/RUN      accuracy per class, and what is confused most
  python tests/records.py curves FILE.svg RUN ...  learning curves of runs with --test-every that
                                             differ in seed alone, and how long each variant learns

A record is a command after a $, with its RESULT line below. Intervals are t-intervals over seeds.
Gains are computed seed by seed, in percentage points of top-1.
"""
import collections
import csv
import json
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
COLORS = ("#d55e00", "#0072b2", "#009e73", "#999999", "#56b4e9", "#cc79a7")  # of Okabe and Ito
# 97.5 % quantiles of Student's t for 1 to 10 degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Claim(NamedTuple):
    """A row of the README: what a text claims, the command that tests it, and three of its numbers.
    technique: what the claim is about; baseline: the same without it; control: what must not gain
    as much. why: one clause after the verdict. longer: the command with three times the steps."""
    claim: str
    command: str
    technique: str
    baseline: str
    control: str
    control_words: str
    why: str = ""
    longer: str = ""


def read_records(folder=HERE / "records"):
    """-> {command without its seed: {seed: {name: number}}}. Raises ValueError for a run that is
    recorded twice."""
    runs = {}
    for path in sorted(folder.glob("*.txt")):
        for block in path.read_text().split("$ ")[1:]:
            command, *lines = block.splitlines()
            seed = int(re.search(r" --seed (\d+)", command)[1])
            command = re.sub(r" --seed \d+", "", re.sub(r"-seed\d+-", "-seed0-", command)).strip()
            numbers = re.findall(r"(\S+)=(-?[\d.]+)(?=\s|$)", " ".join(lines))
            numbers = {name: float(x) for name, x in numbers if name not in ("split", "seed")}
            if seed in runs.setdefault(command, {}):
                raise ValueError(f"{path}: {command} --seed {seed} is recorded twice")
            runs[command][seed] = numbers
    return runs


def interval(values):
    """Half the width of the 95 % interval of the mean; infinite for a single value"""
    if len(values) < 2:
        return float("inf")
    t = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
    return t * statistics.stdev(values) / len(values) ** .5


def gains(runs, technique, baseline):
    """technique minus baseline for each seed, in points"""
    return [100 * (runs[seed][technique] - runs[seed][baseline]) for seed in sorted(runs)]


def verdict(values):
    """What the 95 % interval of a gain says"""
    mean, half = statistics.mean(values), interval(values)
    if mean - half > 0:
        return "confirmed"
    if mean + half < 0:
        return "refuted"
    if abs(mean) + half < 1:
        return "equivalent within 1 point"
    return "not shown"


def findings(runs, claims):
    """A table of claims. "longer": the gain after three times the steps"""
    header = ["claim", "gain (95 % interval), points", "longer", "control", "verdict"]
    rows = []
    for claim in claims:
        seeds = runs[claim.command]
        gain = gains(seeds, claim.technique, claim.baseline)
        control = gains(seeds, claim.control, claim.baseline)
        longer = gains(runs.get(claim.longer, {}), claim.technique, claim.baseline)
        rows.append([claim.claim, f"**{statistics.mean(gain):+.1f}** ± {interval(gain):.1f}",
                     f"{statistics.mean(longer):+.1f}" if longer else "-",
                     f"{claim.control_words} {statistics.mean(control):+.1f}",
                     verdict(gain) + claim.why])
    table = [header, ["---"] * len(header), *rows]
    if not any(claim.longer for claim in claims):
        table = [row[:2] + row[3:] for row in table]
    return "\n".join("| " + " | ".join(row) + " |" for row in table).replace(" --- ", "---")


def spread(name, values):
    deviation = statistics.stdev(values) if len(values) > 1 else 0.
    return (f"{name:28} mean {statistics.mean(values):.4f}  sd {deviation:.4f}  "
            f"95 % +-{interval(values):.4f}  of {' '.join(map('{:.4f}'.format, values))}")


def all_numbers(runs):
    lines = []
    for command, seeds in runs.items():
        lines.append(f"\n$ {command}   seeds {' '.join(map(str, sorted(seeds)))}")
        for name in next(iter(seeds.values())):
            lines.append(spread(name, [seeds[seed][name] for seed in sorted(seeds)]))
    return "\n".join(lines)


def summarize(folder):
    """Runs of a script, grouped by all flags but seed and split -> text"""
    groups = {}
    for path in sorted(Path(folder).glob("*/results.json")):
        record = json.loads(path.read_text())
        if not record["results"]:
            continue  # not finished
        flags = {name: x for name, x in record["flags"].items()
                 if name not in ("out", "resume", "seed", "split", "workers")}
        groups.setdefault(json.dumps(flags), []).append(record)
    if not groups:
        sys.exit(f"{folder} holds no finished run (*/results.json)")
    names = json.loads(next(iter(groups)))
    differing = [name for name in names if len({repr(json.loads(key).get(name))
                                                for key in groups}) > 1]
    lines = []
    for key, records in groups.items():
        flags = [f"--{name.replace('_', '-')} {json.loads(key).get(name)}" for name in differing]
        runs = [f"split {r['flags']['split']} seed {r['flags']['seed']}" for r in records]
        lines.append(f"\n{Path(folder).name} {' '.join(flags)}   {', '.join(runs)}")
        for name in records[0]["results"]["scores"]:
            lines.append(spread(name, [record["results"]["scores"][name] for record in records]))
    return "\n".join(lines)


def classes_of_run(folder):
    """Accuracy per class of each NAME-predictions.csv of a run, and its most confused pairs"""
    columns, confused = {}, []
    for path in sorted(Path(folder).glob("*-predictions.csv")):
        with open(path, newline="") as file:
            pairs = [(row["truth"], row["class1"]) for row in csv.DictReader(file)]
        correct = {}
        for truth, prediction in pairs:
            correct.setdefault(truth, []).append(truth == prediction)
        accuracy = {name: statistics.mean(values) for name, values in sorted(correct.items())}
        mean = statistics.mean(accuracy.values())
        top1 = statistics.mean(truth == prediction for truth, prediction in pairs)
        name = path.name.removesuffix("-predictions.csv")
        columns[name] = accuracy | {"mean of the classes": mean, "top-1": top1}
        confused.append(f"\nmost frequent mistakes of {name}")
        mistakes = collections.Counter(pair for pair in pairs if pair[0] != pair[1])
        for (truth, prediction), count in mistakes.most_common(5):
            mistake = f"taken for {prediction}" if prediction else "cannot be decoded"
            confused.append(f"  {truth}, {mistake}: {count} of {len(correct[truth])} videos")
    lines = [f"{'class':30}" + "".join(f"  {name}" for name in columns)]
    for row in dict.fromkeys(row for column in columns.values() for row in column):
        cells = [f"{column[row]:.4f}" if row in column else "-" for column in columns.values()]
        cells = [cell.rjust(len(name)) for cell, name in zip(cells, columns, strict=True)]
        lines.append(f"{row:30}" + "".join(f"  {cell}" for cell in cells))
    return "\n".join([*lines, *confused])


def learning_curves(record):
    """The results.json of a run with --test-every -> {variant: [(training compute, top-1), ...]}.
    Compute counts the student's passes through its video network, and its unit is an epoch of the
    first variant."""
    curves = {}
    for epoch in record["epochs"]:
        for name, top1 in epoch.items():
            if name == "top1":
                curves.setdefault(epoch["variant"], []).append((epoch["epoch"], top1))
            elif name.startswith("top1_"):
                curves.setdefault(name.removeprefix("top1_"), []).append((epoch["epoch"], top1))
    gmacs = {name: record["results"].get(name, {}).get("GMAC/video", 1) for name in curves}
    unit = next(iter(gmacs.values()), 1)
    return {name: [(epoch * gmacs[name] / unit, top1) for epoch, top1 in curve]
            for name, curve in curves.items()}


def time_to_learn(curves):
    """{variant: compute until it has 90 % of the last top-1 of the first variant, or None}"""
    goal = .9 * next(iter(curves.values()))[-1][1]
    return {name: next((x for x, top1 in curve if top1 >= goal), None)
            for name, curve in curves.items()}


def save_curves(folders, path, width=760, height=400):
    """Draw top-1 over training compute, a line for each variant and run, and print time_to_learn"""
    records = [json.loads(Path(folder, "results.json").read_text()) for folder in folders]
    runs = [learning_curves(record) for record in records]
    if not all(runs):
        sys.exit("train with --test-every to get learning curves")
    all_curves = [curve for curves in runs for curve in curves.values()]
    x_max = max(curve[-1][0] for curve in all_curves)
    y_min = min(curve[-1][1] for curve in all_curves) - .2  # lower points are left out
    left, right, top, bottom = 60, width - 170, 16, height - 48

    def place(x, y):
        return (round(left + (right - left) * x / x_max, 1),
                round(bottom - (bottom - top) * (y - y_min) / (1 - y_min), 1))

    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
           'font-family="sans-serif" font-size="13">',
           '<rect width="100%" height="100%" fill="white"/>']
    for twentieths in range(int(20 * y_min) + 1, 21):
        _, y = place(0, twentieths / 20)
        svg.append(f'<path d="M{left} {y}H{right}" stroke="#ddd"/><text x="{left - 8}" y="{y}" '
                   f'text-anchor="end" dy="4">{twentieths / 20}</text>')
    distance = max(1, int(round(x_max / 4, 1 - len(str(int(x_max / 4))))))  # to one digit
    for tick in range(0, int(x_max) + 1, distance):
        x, _ = place(tick, 0)
        svg.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{tick}</text>')
    first = next(iter(runs[0]))
    svg.append(f'<text x="{(left + right) / 2}" y="{height - 8}" text-anchor="middle">training '
               f'compute, in epochs of {first}</text>'
               f'<text transform="translate(16 {height / 2}) rotate(-90)">top-1</text>')
    for n, (name, color) in enumerate(zip(runs[0], COLORS, strict=False)):
        for curves in runs:
            points = [place(x, y) for x, y in curves[name] if y >= y_min]
            corners = "L".join(f"{x} {y}" for x, y in points)
            svg.append(f'<path d="M{corners}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        svg.append(f'<text x="{right + 12}" y="{top + 20 * n + 12}" fill="{color}">{name}</text>')
        times = [time_to_learn(curves)[name] for curves in runs]
        print(f"{name:24} reaches 90 % of {first}'s last top-1 after "
              f"{', '.join('-' if x is None else f'{x:.4g}' for x in times)}")
    Path(path).write_text("\n".join([*svg, "</svg>"]))


PKD = "python pkd_compressed.py"
WISE = "&& python wise_infer.py"
ALL = "--schedules all"
NOISE = f"{PKD} --label-noise .4"
LONGER = "--epochs 42 --exit-epochs 54"  # of networks and exits
TINYCLIP = "python tinyclip_swap.py --data toy-crowded --epochs {} --affinity"
SPATIAL = "python spatial_kd.py --data toy-crowded --epochs {}"
DEIT = ("python deit_video.py --data toy-crowded --epochs {} --variants one_head two_heads "
        "two_heads_soft one_head_soft second_one_head --teacher-checkpoint "
        "runs/tinyclip_swap/toy-crowded-large-s1-seed0-*/large-last.pt")

QUALITY = [
    Claim("TinyCLIP costs accuracy", TINYCLIP.format(150), "large", "small", "small_affinity",
          "TinyCLIP with affinity loss", ", at half the parameters and compute",
          TINYCLIP.format(450)),
    Claim("Spatial objectives help", SPATIAL.format(150), "spatial", "baseline", "shuffled",
          "targets of other videos", "", SPATIAL.format(450)),
    Claim("Two heads help, even without a teacher", DEIT.format(150), "two_heads", "one_head",
          "ensemble", "two networks, averaged", "", DEIT.format(450)),
    Claim("A teacher that has seen more helps", DEIT.format(150), "one_head_soft", "one_head",
          "two_heads_soft", "through the token", "", DEIT.format(450)),
    Claim("PKD beats labels, once its networks have learned (42 epochs)", f"{PKD} {LONGER}",
          "progressive_mean", "labels_mean", "self_mean", "own network as the only teacher",
          "; soft targets help"),
    Claim("PKD beats labels, 40 % of which are wrong", f"{NOISE} {ALL}", "progressive_mean",
          "labels_mean", "self_mean", "own network as the only teacher", ", for the same reason",
          f"{NOISE} {LONGER}"),
    Claim("The order of PKD's teachers matters", f"{NOISE} {ALL}", "progressive_mean", "self_mean",
          "anti_mean", "in reverse", "", f"{NOISE} {LONGER}"),
    Claim("The I-frame network is a better last teacher, if it alone has right labels",
          f"{NOISE} --clean-iframe {ALL}", "progressive_iframe_mean", "self_mean", "iframe_mean",
          "I-frames all along", "", f"{NOISE} --clean-iframe --schedules progressive_iframe iframe "
          f"self {LONGER}"),
    Claim("WISE beats late fusion", f"{PKD} {WISE}", "wise", "late_fusion", "uniform",
          "mean of all exits", "; the gain shrinks as the networks learn",
          f"{PKD} {LONGER} {WISE}"),
    Claim("WISE beats late fusion, both exiting early at equal cost", f"{PKD} {WISE}",
          "wise_early", "late_fusion_early", "last_exit", "I-frames alone", "",
          f"{PKD} {LONGER} {WISE}"),
]
SPEED = [
    Claim("TinyCLIP learns more slowly", "python tinyclip_swap.py --affinity", "large", "small",
          "small_affinity", "TinyCLIP with affinity loss", " after 222 steps"),
    Claim("Spatial objectives make learning faster",
          "python spatial_kd.py --variants baseline spatial shuffled oracle", "spatial", "baseline",
          "shuffled", "targets of other videos", " after 185 steps"),
    Claim("the same, larger student", "python spatial_kd.py --student toy-large", "spatial",
          "baseline", "shuffled", "targets of other videos", " after 185 steps"),
    Claim("Two heads make learning faster", "python deit_video.py --variants one_head two_heads "
          "two_heads_soft two_frame_heads one_head_soft", "two_heads", "one_head",
          "two_frame_heads", "a linear layer for the token", " after 222 steps"),
    Claim("All three together learn faster than the swap alone", "python deit_video.py --grid",
          "all_three", "swap", "swap_spatial", "swap and spatial",
          " after 222 steps, due to the spatial objectives"),
    Claim("PKD learns faster than from labels", f"{PKD} {ALL}", "progressive_mean", "labels_mean",
          "self_mean", "own network as the only teacher",
          " after 308 steps of the networks, 396 of the exits: such teachers know little"),
]

if __name__ == "__main__":
    if len(sys.argv) < 2:
        print("\n\n".join(findings(read_records(), claims) for claims in (QUALITY, SPEED)))
    elif sys.argv[1] == "all":
        print(all_numbers(read_records()))
    elif sys.argv[1] == "curves":
        save_curves(sys.argv[3:], sys.argv[2])
    elif any(Path(sys.argv[1]).glob("*-predictions.csv")):
        print(classes_of_run(sys.argv[1]))
    else:
        print(summarize(sys.argv[1]))
