"""Verdicts on claims: the effect and its interval on a hand-worked case, and what an experiment may say of nothing."""

import json
import math

import pytest
import yaml

from nextflow_hf.training.evaluation import comparison
from nextflow_hf.training.evaluation.comparison import ALL_ALIKE, CONFIRMED, CONTRADICTED, NOT_SEEN, effect_of


def test_the_effect_of_three_seeds_by_hand():
    effect = effect_of([0.6, 0.7, 0.8], [0.4, 0.5, 0.6])
    assert effect.difference == pytest.approx(0.2) and effect.spread == pytest.approx(0.1)
    error = 0.1 * math.sqrt(2 / 3)
    # Student's t with four degrees of freedom: 2.776 at 97.5%, 0.941 at 80%.
    assert effect.low == pytest.approx(0.2 - 2.776 * error, abs=1e-4)
    assert effect.visible == pytest.approx((2.776 + 0.941) * error, abs=1e-4)
    assert effect.verdict == NOT_SEEN
    assert effect_of([0.6, 0.61, 0.62], [0.4, 0.41, 0.42]).verdict == CONFIRMED
    assert effect_of([0.4, 0.41, 0.42], [0.6, 0.61, 0.62]).verdict == CONTRADICTED
    assert effect_of([0.6, 0.6], [0.4, 0.4]).verdict == ALL_ALIKE
    with pytest.raises(ValueError, match="two or more"):
        effect_of([0.6], [0.4, 0.5])


def test_what_the_seeds_of_paired_runs_have_in_common_is_no_spread():
    better, worse = [0.9, 0.6, 0.4], [0.8, 0.4, 0.1]  # differences of 0.1, 0.2 and 0.3
    effect = effect_of(better, worse, paired=True)
    assert effect.difference == pytest.approx(0.2) and effect.spread == pytest.approx(0.1)
    # Student's t with two degrees of freedom: 4.303 at 97.5%, 1.061 at 80%.
    assert effect.low == pytest.approx(0.2 - 4.303 * 0.1 / math.sqrt(3), abs=1e-4)
    assert effect.visible == pytest.approx((4.303 + 1.061) * 0.1 / math.sqrt(3), abs=1e-4)
    assert effect_of(better, worse).low < effect.low
    with pytest.raises(ValueError, match="same of both arms"):
        effect_of(better, worse[:2], paired=True)


def write_run(folder, rate, rewards=(), step_time=1.0):
    report = {"groups": {"images": {"values": {"passed": rate}, "categories": {"one": {"values": {"passed": rate}}}}}}
    log = [{"step": number + 1, "reward": value, "step_time": step_time} for number, value in enumerate(rewards)]
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation" / "report.json").write_text(json.dumps(report))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [*log, {"step": len(log)}]}))


@pytest.fixture
def judged(tmp_path):
    """Verdicts on claims about arms of these rates."""

    def compare(claims, planted="fault", *, arms, **options):
        for arm, rates in arms.items():
            for seed, rate in enumerate(rates):
                write_run(tmp_path / "arms" / f"{arm}-{seed}", rate, **options.get(arm, {}))
        file = tmp_path / "claims.yaml"
        file.write_text(yaml.safe_dump({"planted": planted, "claims": claims}))
        output = tmp_path / "verdicts"
        names = [name for name in claims if name != "fault"]
        comparison.main([str(file), *names, "--runs", str(tmp_path / "arms"), "--output-dir", str(output)])
        return {name: json.loads((output / f"{name}.json").read_text()) for name in names}, output

    return compare


CLAIM = {"claim": "new is better", "better": "new", "worse": "old", "measure": "images/passed"}
FAULT = {"claim": "a fault is worse", "better": "old", "worse": "broken", "measure": "images/one/passed"}


@pytest.mark.parametrize(
    ("broken", "verdict"), [([0.1, 0.12, 0.14], NOT_SEEN), ([0.5, 0.52, 0.54], "undecided"), ([], "undecided")]
)
def test_nothing_is_seen_only_where_a_planted_fault_is(judged, broken, verdict):
    arms = {"new": [0.5, 0.53, 0.54], "old": [0.5, 0.52, 0.54], "broken": broken}
    found, output = judged({"new": CLAIM, "fault": FAULT}, arms=arms)
    assert found["new"]["verdict"].startswith(verdict)
    text = (output / "new.md").read_text()
    assert f"## new: {verdict}" in text and f"{found['new']['visible']:.4f}" in text


def test_a_loss_is_better_when_it_is_lower_and_two_measures_of_one_arm_are_compared(judged):
    arms = {"new": [0.1, 0.12, 0.11], "old": [0.5, 0.52, 0.54]}
    claims = {"lower": {**CLAIM, "lower_is_better": True}, "higher": CLAIM}
    claims["same"] = {**CLAIM, "worse": "new", "worse_measure": "images/one/passed"}
    found, output = judged(claims, planted=None, arms=arms)
    assert [found[name]["verdict"] for name in ("lower", "higher")] == [CONFIRMED, CONTRADICTED]
    assert found["same"]["difference"] == 0
    assert "with new by images/one/passed." in (output / "same.md").read_text()


def test_at_equal_time_what_came_later_does_not_count(judged):
    arms = {"fast": [0, 0, 0], "slow": [0, 0, 0]}
    fast = {"rewards": [0.1, 0.2, 0.3, 0.4], "step_time": 1.0}
    slow = {"rewards": [0.2, 0.4, 0.6, 0.8], "step_time": 2.0}
    claim = {"claim": "fast", "better": "fast", "worse": "slow", "measure": "log/reward"}
    claims = {"images": {**claim, "curves": ["reward"]}, "time": {**claim, "measure": "log/reward at equal time"}}
    claims["time"]["curves"] = ["reward at equal time"]
    found, output = judged(claims, planted=None, arms=arms, fast=fast, slow=slow)
    assert found["images"]["values"] == {"better": [0.4] * 3, "worse": [0.8] * 3}
    assert found["time"]["values"] == {"better": [0.4] * 3, "worse": [0.4] * 3}
    late = {"rewards": [0.5], "step_time": 9.0}  # its only step began in time
    found, _ = judged({"time": {**claims["time"], "worse": "late"}}, planted=None, arms={"late": [0, 0]}, late=late)
    assert found["time"]["values"]["worse"] == [0.5, 0.5]
    assert (output / found["time"]["images"][0]).is_file() and "](images-reward.png)" in (
        output / "images.md"
    ).read_text()


def test_a_log_is_read_at_its_end_or_at_its_beginning(judged):
    claim = {**CLAIM, "worse": "new", "measure": "log/reward/0.5", "worse_measure": "log/reward/-0.25"}
    new = {"rewards": [0.1, 0.2, 0.3, 0.5]}
    found, _ = judged({"gain": claim}, planted=None, arms={"new": [0, 0]}, new=new)
    assert found["gain"]["values"] == {"better": [0.4, 0.4], "worse": [0.1, 0.1]}


def test_what_is_missing_is_named(judged, tmp_path, capsys):
    def refused(claims, **options) -> str:
        with pytest.raises(SystemExit, match="2"):
            judged(claims, **options)
        return capsys.readouterr().err

    assert "no run of the arm 'old', expected old-0" in refused({"new": CLAIM}, arms={"new": [0.5, 0.6]})
    missed = {"new": {**CLAIM, "measure": "images/missed"}}
    assert "has no 'missed'" in refused(missed, arms={"old": [0.5, 0.6]})
    assert "lacks ['measure']" in refused({"new": {"claim": "", "better": "new", "worse": "old"}}, arms={})
    assert "planted fault is 'fault', expected one of ['new']" in refused({"new": CLAIM}, arms={})
    write_run(tmp_path / "arms" / "old-3", 0.5)  # as many seeds, but others
    write_run(tmp_path / "arms" / "new-2", 0.5)
    assert "have the seeds [[0, 1, 2], [0, 1, 3]]" in refused({"new": {**CLAIM, "paired": True}}, arms={})
    assert "keys ['wrong']" in refused({"new": {**CLAIM, "wrong": 1}}, arms={})
    (tmp_path / "arms" / "old-1" / "evaluation" / "report.json").unlink()
    assert "old-1/evaluation/report.json" in refused({"new": CLAIM}, arms={})
    (tmp_path / "claims.yaml").write_text("claims: {new: [}")
    with pytest.raises(SystemExit, match="2"):
        comparison.main([str(tmp_path / "claims.yaml"), "--runs", str(tmp_path), "--output-dir", str(tmp_path)])
    assert "claims.yaml: this is no YAML" in capsys.readouterr().err
