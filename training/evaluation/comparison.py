"""Whether a claim holds: two arms of an experiment over several seeds, as a verdict in words with effect and spread.

    python -m nextflow_hf.training.evaluation.comparison claims.yaml reweight --runs runs/arms --output-dir verdicts

The file has claims: of each, what is claimed, the arm that should be `better`, the one that should be `worse`, and the
`measure` that decides. Run S of an arm is the folder RUNS/ARM-S, with the files of its training and, in `evaluation`,
the report of `nextflow-hf evaluate`. `planted` names the claim of a fault that was planted on purpose: an experiment
that does not see it shows nothing. `worse_measure` is for two measures of the same runs, `paired` for runs that start
from one policy for each seed. Knows neither models nor what the arms differ in.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from ...atomic import write_file, write_json, write_text
from ..common.loss_plot import plot
from ..common.recipe import read_recipe


CONFIRMED, NOT_SEEN, CONTRADICTED = "confirmed", "not seen at this scale", "contradicted"
ALL_ALIKE = "undecided: the seeds give equal values, so that their spread is unknown"
NO_FAULT = "undecided: the planted fault was not seen"
CONFIDENCE, POWER = 0.95, 0.8
LAST_SHARE = 0.1  # of the entries of a log, whose mean is its value unless a measure names another
KEYS = {"claim", "better", "worse", "measure", "worse_measure", "lower_is_better", "paired", "also", "curves"}


@dataclass(frozen=True)
class Effect:
    """
    The difference of the means of two arms.

    Args:
        difference (`float`): Mean of the better arm minus that of the worse.
        low, high (`float`): Its 95% interval (Student's t, pooled variance, or that of the seeds' differences).
        spread (`float`): Standard deviation of one run, pooled over both arms; or of the difference of a seed.
        visible (`float`): The smallest true effect that this number of runs confirms with a probability of 80%.
    """

    difference: float
    low: float
    high: float
    spread: float
    visible: float

    @property
    def verdict(self) -> str:
        """Whether all of the interval is above zero, none of it, or some."""
        if self.spread == 0:
            return ALL_ALIKE
        return CONFIRMED if self.low > 0 else CONTRADICTED if self.high < 0 else NOT_SEEN


def effect_of(better: Sequence[float], worse: Sequence[float], paired: bool = False) -> Effect:
    """
    The effect that the values of two arms show, a value for each seed; each arm needs at least two. With `paired`, the
    spread is that of the differences between runs of the same seed.
    """
    if min(len(better), len(worse)) < 2:
        raise ValueError(f"got {len(better)} and {len(worse)} seeds, expected two or more of each arm: a spread")
    if paired and len(better) != len(worse):
        raise ValueError(f"got {len(better)} and {len(worse)} seeds, expected the same of both arms: they are paired")
    if paired:
        differences = [one - other for one, other in zip(better, worse)]
        degrees, spread = len(differences) - 1, statistics.stdev(differences)
        error = spread / math.sqrt(len(differences))
    else:
        degrees = len(better) + len(worse) - 2
        squares = sum((len(arm) - 1) * statistics.variance(arm) for arm in (better, worse))
        spread = math.sqrt(squares / degrees)
        error = spread * math.sqrt(1 / len(better) + 1 / len(worse))
    half = float(student.ppf((1 + CONFIDENCE) / 2, degrees))
    difference = statistics.mean(better) - statistics.mean(worse)
    # Half the interval, and how far below the true effect four in five experiments stay at most.
    visible = (half + float(student.ppf(POWER, degrees))) * error
    return Effect(difference, difference - half * error, difference + half * error, spread, visible)


# ---- reading runs


def runs_of(folder: Path, arm: str) -> list[Path]:
    """The runs of an arm, by seed."""
    found = [path for path in folder.glob(f"{arm}-*") if path.name[len(arm) + 1 :].isdecimal()]
    if not found:
        raise FileNotFoundError(f"{folder} has no run of the arm {arm!r}, expected {arm}-0, {arm}-1 and so on")
    return sorted(found, key=_seed)


def _seed(run: Path) -> int:
    return int(run.name.rpartition("-")[2])


def read_log(run: Path) -> list[dict[str, float]]:
    """
    The log of a run's training. Where steps are timed, entries also have the `seconds` from the start of the training
    to the end of their steps, and to where these `began`.
    """
    entries, seconds = [], 0.0
    for entry in json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]:
        began, steps = seconds, entry["step"] - (entries[-1]["step"] if entries else 0)
        seconds += entry.get("step_time", 0.0) * steps
        entries.append({**entry, "seconds": seconds, "began": began})
    return entries


def read_measure(runs: Sequence[Path], measure: str, seconds: float = math.inf) -> list[float]:
    """
    The value of each run: `GROUP/NAME` or `GROUP/CATEGORY/NAME` of the report, or `log/KEY`, which is the mean over
    the last tenth of what was logged of steps that began in the first `seconds`. `log/KEY/0.25` is that over the last
    quarter, `log/KEY/-0.25` that over the first.
    """
    kind, *names = measure.split("/")
    if kind == "log":
        key, share = names[0], float(names[1]) if len(names) > 1 else LAST_SHARE
        return [_mean_of_share(read_log(run), key, share, seconds) for run in runs]
    values = []
    for run in runs:
        found: Any = json.loads((run / "evaluation" / "report.json").read_text(encoding="utf-8"))["groups"]
        *categories, name = names
        try:
            found = found[kind]
            for category in categories:
                found = found["categories"][category]
            values.append(float(found["values"][name]))
        except KeyError as error:
            raise ValueError(f"the report of {run} has no {error} of {measure!r}, but {sorted(found)}") from error
    return values


def _mean_of_share(log: list[dict[str, float]], key: str, share: float, seconds: float) -> float:
    values = [entry[key] for entry in log if key in entry and entry["began"] < seconds]
    if not values:
        raise ValueError(f"no entry of the log has {key!r} in the first {seconds:.0f} seconds, but {sorted(log[0])}")
    count = max(1, round(abs(share) * len(values)))
    return statistics.mean(values[:count] if share < 0 else values[-count:])


def _shared_seconds(runs: Sequence[Path]) -> float:
    """The time that every run has."""
    return min(read_log(run)[-1]["seconds"] for run in runs)


# ---- claims


def judge_claim(claim: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the runs say of a claim: the effect on its measure, and the means of the others."""
    if unknown := sorted(set(claim) - KEYS):
        raise ValueError(f"a claim has the keys {unknown}, expected some of {sorted(KEYS)}")
    if lacking := sorted({"claim", "better", "worse", "measure"} - set(claim)):
        raise ValueError(f"a claim lacks {lacking}: it has {sorted(claim)}")
    arms = {side: runs_of(folder, claim[side]) for side in ("better", "worse")}
    seeds = [[_seed(run) for run in runs] for runs in arms.values()]
    if claim.get("paired") and seeds[0] != seeds[1]:
        raise ValueError(f"the arms {claim['better']} and {claim['worse']} have the seeds {seeds}, expected the same")

    def values(measure: str) -> dict[str, list[float]]:
        name, _, at = measure.partition(" at equal ")
        limit = _shared_seconds([*arms["better"], *arms["worse"]]) if at == "time" else math.inf
        return {side: read_measure(runs, name, limit) for side, runs in arms.items()}

    found = values(claim["measure"])
    if "worse_measure" in claim:
        found["worse"] = values(claim["worse_measure"])["worse"]
    sign = -1.0 if claim.get("lower_is_better") else 1.0
    better, worse = ([sign * value for value in found[side]] for side in ("better", "worse"))
    effect = effect_of(better, worse, claim.get("paired", False))
    others = {measure: values(measure) for measure in claim.get("also", ())}
    return {**claim, "values": found, "verdict": effect.verdict, **vars(effect), "others": others}


def draw_curves(claim: dict[str, Any], folder: Path, output: Path, name: str) -> list[str]:
    """An image of each curve that a claim names, a line for each arm: the mean over its seeds."""
    files = []
    for curve in claim.get("curves", ()):
        key, _, at = curve.partition(" at equal ")
        axis = "seconds" if at == "time" else "step"
        lines = {}
        for arm in dict.fromkeys((claim["better"], claim["worse"])):
            logs = [[(e[axis], e[key]) for e in read_log(run) if key in e] for run in runs_of(folder, arm)]
            lines[arm] = [tuple(map(statistics.mean, zip(*points))) for points in zip(*logs)]
        lines = {arm: points for arm, points in lines.items() if points}
        if lines:
            files.append(f"{name}-{curve.replace(' ', '_')}.png")
            write_file(output / files[-1], plot(lines).save)
    return files


def in_words(name: str, found: dict[str, Any]) -> str:
    """A claim's verdict as Markdown."""
    better, worse = (found["values"][side] for side in ("better", "worse"))
    spreads = "the difference of one seed spreads" if found.get("paired") else "one run spreads"
    against = found.get("worse_measure", "")  # two measures of one arm
    lines = [
        f"## {name}: {found['verdict']}",
        f"\n{found['claim']}\n",
        f"{found['measure']}: {_numbers(better)} with {found['better']}, {_numbers(worse)} with {found['worse']}"
        f"{against and f' by {against}'}. "
        f"The effect is {found['difference']:+.4f}, 95% interval {found['low']:+.4f} to {found['high']:+.4f}; "
        f"{spreads} by {found['spread']:.4f}. {len(better)} and {len(worse)} seeds confirm effects of "
        f"{found['visible']:.4f} and more four times in five.",
    ]
    if found["others"]:
        lines += [f"\n| measure | {found['better']} | {found['worse']} |", "|---|---:|---:|"]
        lines += [
            f"| {measure} | {_numbers(values['better'])} | {_numbers(values['worse'])} |"
            for measure, values in found["others"].items()
        ]
    lines += [f"\n![{file}]({file})" for file in found["images"]]
    return "\n".join(lines) + "\n"


def _numbers(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})"


def compare(file: Path, names: Sequence[str], folder: Path, output: Path) -> dict[str, dict]:
    """
    Judge claims of a file and write `NAME.json`, `NAME.md` and the curves.

    "not seen at this scale" is a verdict only where the same experiment sees the planted fault; else the claim is
    "undecided".
    """
    described = read_recipe(file)
    claims, planted = described.get("claims") or {}, described.get("planted")
    if unknown := sorted(set(names) - set(claims)):
        raise ValueError(f"{file} has no claims {unknown}, but {list(claims)}")
    results = {}
    for name in names or claims:
        found = judge_claim(claims[name], folder)
        if found["verdict"] == NOT_SEEN and not _sees(claims, planted, folder):
            found["verdict"] = NO_FAULT
        found["images"] = draw_curves(claims[name], folder, output, name)
        write_json(output / f"{name}.json", found)
        write_text(output / f"{name}.md", in_words(name, found))
        results[name] = found
    return results


def _sees(claims: dict[str, dict], planted: str | None, folder: Path) -> bool:
    """Whether there are runs of the planted fault, and they are worse than those without."""
    if planted is None:
        return False
    if planted not in claims:
        raise ValueError(f"the claim of the planted fault is {planted!r}, expected one of {list(claims)}")
    try:
        return judge_claim(claims[planted], folder)["verdict"] == CONFIRMED
    except FileNotFoundError:
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Print the verdicts; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", type=Path, help="YAML file of claims")
    parser.add_argument("names", nargs="*", metavar="NAME", help="claims to judge; default: all")
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="folder of the runs, ARM-SEED each")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="folder of the verdicts")
    args = parser.parse_args(argv)
    try:
        verdicts = compare(args.claims, args.names, args.runs, args.output_dir)
    except (OSError, ValueError) as error:  # such as a run that has not ended
        parser.exit(2, f"{parser.prog}: {error}\n")
    for name, found in verdicts.items():
        print(in_words(name, found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
