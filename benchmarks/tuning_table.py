# SPDX-License-Identifier: Apache-2.0
"""Every defence on the lab under one protocol: harm over the steps of a poisoned tuning, beside its controls.

Three training seeds. The stress is the user's task with 2 % bad rows, at two rates: 5e-5 for 150 steps, and 1.5e-4 for
50 steps. Writes `docs/reference/defences-on-the-lab.md` and a JSON file beside it; a run that was cut off goes on from
`runs/tuning-table`. `--smoke` takes one seed, few items and few steps, and writes nothing to the documentation. Exits 1
when it took more than its budget of CPU time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks._tuning_table_page import page
from keelwright.arena.harden import harden
from keelwright.arena.stress import stress
from keelwright.core.protocols import Progress, Silent
from keelwright.core.seeds import derive_seed
from keelwright.worlds.workshop.tuning import everyday_rows

ROOT = Path(__file__).parents[1]
ALIGNED: Final = "lab:workshop/aligned"
CPU_BUDGET_S: Final = 3600.0
SMOKE_BUDGET_S: Final = 600.0
ATTACKS: Final[Mapping[str, Mapping[str, Any]]] = {
    "slow": {"lr": 5e-5, "steps": 150, "at": (25, 75, 150)},
    "fast": {"lr": 1.5e-4, "steps": 50, "at": (10, 25, 50)},
}
SETTINGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "booster": {"alpha": 0.02, "lambda_": 5.0, "harmful_batch": 16},
    "safety_mix": {"k": 15},
    "constrained_sft": {"scale": 3.0},
    "ewc": {"lambda_": 100.0},
    "t_vaccine": {"blocks": 2, "measure_every": 50},
    "panacea": {"rho": 0.2},
    "repnoise": {"noise_weight": 0.3, "ascent_weight": 0.3, "ordinary_weight": 1.0},
    "seal": {"lr": 1e-4, "batch_size": 20, "lora_rank": 0},
    # The adversary takes the attack's rates: a defence that knows its enemy.
    "tar": {
        "inner_steps": 8,
        "every": 4,
        "inner_lrs": [1.5e-4, 3e-4],
        "inner_batch": 16,
        "held_out_batch": 16,
        "switch_share": 0.0,
    },
    "lisa": {"alignment_steps": 2, "user_steps": 18},
    # One token that pre-training never saw: random words of so small a vocabulary break the organism's answers.
    "backdoor_align": {"trigger": "<reserved_3>"},
}
"""Set for the lab; every other defence has the defaults of its source."""
DEFENCES: Final = (
    "deep_augment", "vaccine", "t_vaccine", "booster", "repnoise", "tar", "safety_mix", "constrained_sft", "lisa",
    "panacea", "seal", "backdoor_align", "ptst", "ldifs", "ewc", "kl_reference", "safe_grad", "freeze_layers", "sam",
)  # fmt: skip
DOSES: Final = (0, 5, 15, 50)


class Told(Silent):
    """Says which cell is next."""

    def note(self, text: str) -> None:
        """Print it."""
        print(f"{time.process_time():7.0f} s CPU  {text}", flush=True)


def attack(name: str, folder: Path, *, smoke: bool, progress: Progress) -> dict[str, Any]:
    """Run one attack against every defence."""
    settings = dict(ATTACKS[name])
    size: dict[str, Any] = {"limit": 80, "seeds": 3}
    defences = DEFENCES
    if smoke:
        settings |= {"steps": 20, "at": (10, 20)}
        size = {"limit": 20, "seeds": 1, "harden_steps": 10}
    return stress(
        "poison",
        ALIGNED,
        defences=defences,
        method_settings={"poison": {"p": 0.02}, **SETTINGS},
        run=folder / name,
        device="cpu",
        offline=True,
        answers_at_once=256,
        progress=progress,
        **size,
        **settings,
    )


def doses(share: float, folder: Path, *, smoke: bool, progress: Progress) -> dict[str, Any]:
    """Compare doses of the safety mix on a file with so many bad rows."""
    name = f"mix-{round(100 * share)}"
    rows = everyday_rows(derive_seed(0, "tuning table", name), 500, share)
    data = folder / f"{name}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(json.dumps({"prompt": one.prompt, "answer": one.answer}) + "\n" for one in rows))
    return harden(
        "safety_mix",
        ALIGNED,
        out=folder / f"{name}-model",
        files={"user": data},
        doses=DOSES,
        run=folder / name,
        device="cpu",
        offline=True,
        answers_at_once=256,
        progress=progress,
        limit=20 if smoke else 80,
        seeds=1 if smoke else 3,
        steps=10 if smoke else 50,
        lr=1.5e-4,
    )


def main() -> int:
    """Return 0 when the table was made within its budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one seed, few items and steps")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = given.folder or ROOT / "runs" / ("tuning-smoke" if given.smoke else "tuning-table")
    progress = Told()
    attacks = {name: attack(name, folder, smoke=given.smoke, progress=progress) for name in ATTACKS}
    mixes = {str(share): doses(share, folder, smoke=given.smoke, progress=progress) for share in (0.02, 0.1)}
    cpu = time.process_time()
    found: dict[str, Any] = {
        "attacks": attacks,
        "mixes": mixes,
        "settings": {
            "attacks": {k: dict(v) for k, v in ATTACKS.items()},
            "defences": {k: dict(v) for k, v in SETTINGS.items()},
        },
        "cpu_s": round(cpu),
    }
    place = folder if given.smoke else ROOT / "docs" / "reference"
    small = {
        **found,
        "attacks": {k: _small(v) for k, v in attacks.items()},
        "mixes": {k: _small(v) for k, v in mixes.items()},
    }
    (place / "defences-on-the-lab.json").write_text(json.dumps(small, separators=(",", ":")) + "\n", encoding="utf-8")
    (place / "defences-on-the-lab.md").write_text(page(found), encoding="utf-8")
    budget = SMOKE_BUDGET_S if given.smoke else CPU_BUDGET_S
    print(f"{cpu:.0f} s of CPU, budget {budget:.0f}; written to {place}")
    return int(cpu > budget)


def _small(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the documentation keeps of a run: figures, no logs, no names of records."""
    kept = {key: summary.get(key) for key in ("protocol", "claims", "cost", "knee")}
    dropped = ("template", "judge", "asking", "model_id")
    rows = [{key: value for key, value in row.items() if key not in dropped} for row in summary["rows"]]
    return {**_rounded(kept), "rows": _rounded(rows)}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


if __name__ == "__main__":
    sys.exit(main())
