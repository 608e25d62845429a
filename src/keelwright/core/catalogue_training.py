# SPDX-License-Identifier: Apache-2.0
"""Catalogue lines of the rooms whose methods train: `harden` and `stress`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from keelwright.core.catalogue import MethodLine, Status

    Row = tuple[str, str, str, Status, tuple[str, ...], float, str]

_HARDEN: Final[tuple[Row, ...]] = (
    (
        "safety_mix",
        "SafetyMix: add refusals, and look-alikes answered, to the user's rows",
        "arXiv 2309.07875",
        "faithful",
        ("user", "safety", "borderline", "ordinary"),
        1.0,
        "SafetyMix",
    ),
    (
        "constrained_sft",
        "Constrained SFT: hold the first answer tokens near the aligned model",
        "arXiv 2406.05946",
        "faithful",
        ("user",),
        1.0,
        "ConstrainedSft",
    ),
    (
        "deep_augment",
        "Deep alignment: refuse also after the start of a harmful answer",
        "arXiv 2406.05946",
        "faithful",
        ("safety", "harmful", "ordinary"),
        1.0,
        "DeepAugment",
    ),
    (
        "lisa",
        "Lisa: alternate alignment and user steps, each pulled to the other's weights",
        "arXiv 2405.18641",
        "faithful",
        ("user", "safety"),
        1.0,
        "Lisa",
    ),
    (
        "vaccine",
        "Vaccine: align under the worst small shift of hidden states",
        "arXiv 2402.01109",
        "faithful",
        ("safety",),
        2.0,
        "Vaccine",
    ),
    (
        "t_vaccine",
        "T-Vaccine: Vaccine on sampled layers alone",
        "arXiv 2410.09760",
        "faithful",
        ("safety", "harmful"),
        2.0,
        "TVaccine",
    ),
    (
        "booster",
        "Booster: align so that one harmful step would buy little",
        "arXiv 2409.01586",
        "faithful",
        ("safety", "harmful"),
        3.0,
        "Booster",
    ),
    (
        "panacea",
        "Panacea: tune with a perturbation in view, and add it at the end",
        "arXiv 2501.18100",
        "faithful",
        ("user", "harmful"),
        3.0,
        "Panacea",
    ),
    (
        "repnoise",
        "RepNoise: noise where harmful answers are represented",
        "arXiv 2405.14577",
        "verified",
        ("safety", "harmful"),
        2.0,
        "RepNoise",
    ),
    (
        "tar",
        "TAR: refuse along a simulated harmful tuning",
        "arXiv 2408.00761",
        "faithful",
        ("safety", "harmful"),
        81.0,
        "Tar",
    ),
    (
        "seal",
        "SEAL: learn which of the user's rows to keep",
        "arXiv 2410.07471",
        "faithful",
        ("user", "safety"),
        1.0,
        "Seal",
    ),
    (
        "backdoor_align",
        "BackdoorAlign: tie refusals to a secret prefix that the provider adds",
        "arXiv 2402.14968",
        "faithful",
        ("user", "safety"),
        1.0,
        "BackdoorAlign",
    ),
    (
        "ptst",
        "PTST: tune without the safety prompt, ask with it",
        "arXiv 2402.18540",
        "faithful",
        ("user",),
        1.0,
        "Ptst",
    ),
    (
        "ldifs",
        "LDIFS: keep hidden features near the aligned model's",
        "arXiv 2308.13320",
        "reconstruction",
        ("user",),
        1.3,
        "Ldifs",
    ),
    (
        "ewc",
        "EWC: hold the weights that refusals depend on",
        "arXiv 1612.00796",
        "faithful",
        ("user", "safety"),
        1.0,
        "Ewc",
    ),
    (
        "kl_reference",
        "KL to the aligned model on safety rows, the user's, or both",
        "keelwright",
        "faithful",
        ("user", "safety"),
        2.0,
        "KlReference",
    ),
    (
        "safe_grad",
        "SafeGrad: take out of the user's gradient what opposes alignment",
        "arXiv 2508.07172",
        "reconstruction",
        ("user", "safety"),
        2.0,
        "SafeGrad",
    ),
    (
        "freeze_layers",
        "SPPFT: freeze the safety layers while tuning",
        "arXiv 2408.17003",
        "reconstruction",
        ("user", "safety", "ordinary"),
        1.0,
        "FreezeLayers",
    ),
    ("sam", "SAM: descend at the worst nearby weights", "arXiv 2010.01412", "faithful", ("user",), 2.0, "Sam"),
)

_STRESS: Final[tuple[Row, ...]] = (
    (
        "qi_explicit",
        "Explicit harmful rows, the first risk level of Qi et al.",
        "arXiv 2310.03693",
        "faithful",
        ("harmful",),
        1.0,
        "QiExplicit",
    ),
    (
        "qi_identity",
        "Identity shift, the second risk level of Qi et al.",
        "arXiv 2310.03693",
        "faithful",
        ("identity",),
        1.0,
        "QiIdentity",
    ),
    (
        "qi_benign",
        "Benign rows, the third risk level of Qi et al.",
        "arXiv 2310.03693",
        "faithful",
        ("ordinary",),
        1.0,
        "QiBenign",
    ),
    (
        "poison",
        "A share of harmful rows in the user's file",
        "arXiv 2409.01586",
        "faithful",
        ("user", "harmful"),
        1.0,
        "Poison",
    ),
    (
        "few_shot",
        "Few rows: explicit ones, or ten harmless ones in two stages",
        "arXiv 2310.03693, 2510.02833",
        "reconstruction",
        ("harmful",),
        1.0,
        "FewShot",
    ),
    (
        "style_shift",
        "Tuning under a surface style, asked with and without it",
        "arXiv 2408.02946",
        "reconstruction",
        ("user", "harmful"),
        1.0,
        "StyleShift",
    ),
    (
        "abliterate",
        "Abliteration: take the refusal direction out of the weights, in memory",
        "arXiv 2406.11717",
        "faithful",
        ("harmful", "ordinary"),
        0.0,
        "Abliterate",
    ),
    (
        "virus",
        "Virus: rows optimised to pass a data guard, on models and guards of your own",
        "arXiv 2501.17433",
        "faithful",
        ("user", "harmful"),
        0.0,
        "Virus",
    ),
)


def training_lines(line: type[MethodLine]) -> tuple[MethodLine, ...]:
    """Return the lines of both rooms.

    Args:
        line: The class of a line; given, because `core.catalogue` reads this module.
    """
    return tuple(
        line(name, room, title, source, status, needs, passes, f"keelwright.{room}.{name}:{kind}")
        for room, rows in (("harden", _HARDEN), ("stress", _STRESS))
        for name, title, source, status, needs, passes, kind in rows
    )
