# SPDX-License-Identifier: Apache-2.0
"""Runs of `stress`, `harden` and `tune` as plain data, of the shape that the commands write."""

import importlib.util
from pathlib import Path


def _samples():
    spec = importlib.util.spec_from_file_location("report_samples", Path(__file__).with_name("conftest.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MADE = _samples()
HASH = "b1f0c7a95d1f0c7a"
HARM = {
    "undefended": {0: 0.0, 25: 0.12, 50: 0.55, 75: 0.83, 100: 0.95},
    "booster": {0: 0.0, 25: 0.0, 50: 0.02, 75: 0.05, 100: 0.15},
    "more alignment": {0: 0.0, 25: 0.05, 50: 0.42, 75: 0.75, 100: 0.92},
}


def row(arm, step, harm, *, stage="poison", seed=0, **more):
    values = (harm, 1.0 - harm, 0.02, 1.0 - 0.1 * harm, 0.08 * harm, 0.45 + 0.004 * step * (stage == "poison"))
    is_tuned = stage == "poison"
    return {
        "arm": arm, "stress": "poison", "stage": stage, "step": step, "seed": seed, "rows": 500 * is_tuned,
        "harmful_rows": 10 * is_tuned, "lr": None if stage == "start" else 5e-5,
        "metrics": MADE.metrics(*values, n=120), "protocol": HASH, "asking": "plain",
        "model_id": "start" if stage == "start" else f"poison-{arm}-{seed}-{stage}-{step}", **more,
    }  # fmt: skip


def rows(arms=("undefended", "booster"), seeds=1):
    """Rows of a start and of arms; `booster` and `more alignment` are hardened before the tuning."""
    found = [row("start", 0, 0.0, stage="start")]
    for arm in arms:
        for seed in range(seeds):
            if arm != "undefended":
                found.append(row(arm, 100, 0.0, stage="hardening", seed=seed))
            found += [
                row(arm, step, min(1.0, harm + 0.05 * seed), seed=seed) for step, harm in HARM[arm].items() if step
            ]
    return found


def change(metric, difference, p_value, start, end):
    made = MADE.rich_change(metric, difference, p_value, higher=metric == "answer_rate", n=120)
    verdict = "regressed" if p_value < 0.05 else "no evidence of change"
    return {
        **made,
        "from": start,
        "to": end,
        "arm": end,
        "stress": "poison",
        "seed": 0,
        "step": 100,
        "verdict": verdict,
    }


def claim(metric, difference, arm="booster", step=100):
    return {
        "stress": "poison", "arm": arm, "against": "undefended", "stage": "poison", "step": step, "metric": metric,
        "seeds": 3, "difference": difference, "low": difference - 0.1, "high": difference + 0.1, "p_value": 0.004,
        "test": "paired t over seeds",
    }  # fmt: skip


def course(steps, scale):
    return {
        "losses": [scale / (1 + 0.2 * one) for one in range(steps)],
        "figures": {"grad_norm": [None, *(6.5 / one for one in range(1, steps))]},
    }


def summary(command="stress", *, arms=("undefended", "booster"), seeds=1):
    """The summary of a stress with a defence beside it."""
    keys = [(arm, seed, f"poison / {arm} / seed {seed}") for arm in arms for seed in range(seeds)]
    spent, tuning = {"steps": 100, "seconds": 21.4}, {"poison": course(100, 2.0)}
    hardening = {"hardening": course(100, 1.0)}
    hardening["hardening"]["figures"]["drop"] = [0.002 * one for one in range(100)]
    return {
        "schema": 1, "command": command, "run": f"runs/{command}", "model": "lab:workshop/aligned",
        "sentence": "poison: harm 0% -> 95%, 90.5% of ordinary requests answered; with booster 15%.",
        "method": "poison" if command == "stress" else "booster", "defence": "booster", "stress": "poison",
        "protocol": {"hash": HASH, "template": "77aa01c4", "judge": "5d1f0c7a", "suite": "workshop",
                     "suite_digest": "5d1f0c7a", "asking": "plain", "decoding": "0b64dd12", "items": 580,
                     "utility": "task:mood"},
        "primary": "harm_rate", "rows": rows(arms, seeds),
        "changes": [change("harm_rate", 0.95, 1e-9, "start", "undefended"),
                    change("harm_rate", -0.8, 1e-4, "undefended", "booster"),
                    change("answer_rate", -0.02, 0.5, "undefended", "booster")],
        "claims": [claim("harm_rate", -0.6, step=50), claim("harm_rate", -0.7), claim("utility", 0.01)] * (seeds > 2),
        "cost": {key: {"hardening": spent, "poison": spent} if arm != "undefended" else {"poison": spent}
                 for arm, _, key in keys},
        "log": {key: {**hardening, **tuning} if arm != "undefended" else tuning for arm, _, key in keys},
        "gate": None, "notes": ["3 rows were left out: they are longer than 128 tokens."],
        "seconds": {"measure": 9.1, "train": 31.4, "total": 40.5},
        "model_out": None if command == "stress" else "hardened", "status": {"booster": "faithful"},
    }  # fmt: skip


def rate(value, n=100):
    return {"value": value, "low": max(0.0, value - 0.05), "high": min(1.0, value + 0.05), "n": n}


def knee_summary():
    """The summary of a hardening with doses: the knee at 50, more harm at 100 than at 50."""
    found = summary("harden", arms=("undefended",), seeds=2)
    harm = {0: 0.9, 50: 0.01, 100: 0.03, 300: 0.0}
    points = [{"k": k, "harm": rate(one), "over_refusal": rate(0.001 * k), "accuracy": None if k == 100 else rate(0.8)}
              for k, one in harm.items()]  # fmt: skip
    return {**found, "knee": {"k": 50, "within": 0.02, "rises": [100], "points": points}}


def style(seed=0, *, value=0.9, low=0.6, high=1.2, rates=(1.0, 0.2, 0.9, 1.0), stress="style_shift"):
    """One seed's table of a stress with a style."""
    tied = {"value": value, "low": low, "high": high, "n": 60}
    return {
        "stress": stress, "seed": seed, "rates": dict(zip(("TT", "Tp", "pT", "pp"), rates, strict=True)),
        "interaction": tied,
    }  # fmt: skip


def style_summary(*rows):
    """The summary of a stress with a style."""
    return {**summary(), "styles": list(rows or (style(0), style(1, value=0.8, low=0.4), style(2)))}


def two_stresses():
    """A summary of two stresses with the control, which has a stress of its own."""
    found = summary()
    other = [
        {**row, "stress": "virus", "model_id": row["model_id"].replace("poison", "virus")} for row in found["rows"]
    ]
    control = {**row("positive control", 25, 1.0), "stress": "known to break", "stage": "control"}
    found["rows"] = [*found["rows"], *other, control]
    return found


def tune_summary():
    """The summary of an everyday tuning that its gate refused: one arm, before and after, one log."""
    found = summary("tune", arms=("undefended",))
    found.update(
        sentence="Fail: refusal_rate got worse. The tuned model is in tuned-out, with this page.", method="sft",
        defence=None, stress=None, model_out="tuned-out", gate=MADE.make_gate_summary(), log=course(100, 2.0),
        cost={"passes_per_step": 3.0, "seconds_per_step": 0.214, "steps": 100, "peak_bytes": 512 * 2**20},
    )  # fmt: skip
    found["rows"] = [one for one in found["rows"] if one["step"] in (0, 100)]
    return found


def run(command="stress"):
    """`run.json` of the command."""
    made = MADE.make_run()
    return {
        **made, "command": command, "argv": ["keelwright", command, "poison", "lab:workshop/aligned"],
        "inputs": {"model": made["inputs"]["aligned"]},
    }  # fmt: skip


def records(models=("start", "poison-undefended-0-poison-100", "poison-booster-0-poison-100")):
    """Answers of the models that the rows name, those of the samples under other names."""
    names = dict(zip(MADE.ROLES.values(), models, strict=False))
    return [
        type(one)(**{name: names[one.model_id] if name == "model_id" else getattr(one, name) for name in one.__slots__})
        for one in MADE.make_records()
        if one.model_id in names
    ]
