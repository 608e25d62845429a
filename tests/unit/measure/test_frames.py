# SPDX-License-Identifier: Apache-2.0
"""Frames: slots are filled once, user files are checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from keelwright.core.errors import ConfigError, DataError, MissingError
from keelwright.measure.builders.frames import SHIPPED, parse_frame, read_frame

OWN = "name: mine@1\nQA: 'For {profile}: {instruction}'\n"


def test_the_shipped_frame_has_both_domains_and_both_attacks() -> None:
    frame = read_frame(SHIPPED)
    assert frame.name == SHIPPED
    assert sorted(frame.templates) == ["QA", "autonomous"]
    assert sorted(frame.attacks) == ["prefix-injection", "refusal-suppression"]


@pytest.mark.parametrize("domain", ["QA", "autonomous"])
@pytest.mark.parametrize("attack", ["none", "prefix-injection", "refusal-suppression"])
def test_every_prompt_holds_profile_and_instruction_once(domain: str, attack: str) -> None:
    frame = read_frame(SHIPPED)
    put = frame.fill(domain, profile="I am a PROFILE.", instruction="the INSTRUCTION?", attack=attack)
    assert put.before.endswith("I am a PROFILE.")
    assert put.prompt.count("I am a PROFILE.") == 1
    assert put.prompt.count("the INSTRUCTION?") == 1
    assert "{" not in put.prompt
    plain = frame.fill(domain, profile="I am a PROFILE.", instruction="the INSTRUCTION?").prompt
    assert put.prompt.startswith(plain)
    assert put.prompt == plain if attack == "none" else put.prompt.endswith(frame.attacks[attack])


def test_braces_in_the_texts_are_left_alone() -> None:
    put = parse_frame(OWN, where="mine").fill("QA", profile="{instruction}", instruction="{profile} {x}")
    assert put.prompt == "For {instruction}: {profile} {x}"


def test_a_file_of_the_user_is_read_and_borrows_the_attacks(tmp_path: Path) -> None:
    path = tmp_path / "frame.yaml"
    path.write_text(f"\ufeff{OWN}system: Be brief.\n", encoding="utf-8")
    frame = read_frame(str(path))
    assert frame.name == "mine@1"
    assert frame.system == "Be brief."
    assert frame.attacks == read_frame(SHIPPED).attacks
    assert frame.fill("QA", profile="p", instruction="i").prompt == "For p: i"


def test_a_domain_or_attack_that_the_frame_lacks_is_named() -> None:
    frame = parse_frame(OWN, where="mine")
    with pytest.raises(ConfigError, match="'domain' is not a known choice"):
        frame.fill("autonomous", profile="p", instruction="i")
    with pytest.raises(ConfigError) as caught:
        frame.fill("QA", profile="p", instruction="i", attack="prefix-injektion")
    assert "did you mean 'prefix-injection'?" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("QA: '{profile} {instruction}'", "no mapping with a name"),
        ("name: x", "no template"),
        ("name: x\nQA: '{instruction} {profile}'", "slots instruction, profile in QA"),
        ("name: x\nQA: '{profile}'", "slots profile in QA"),
        ("name: x\nQA: 'no slots'", "slots none in QA"),
        ("name: x\nQA: '{profile} {instruction} {instruction}'", "in QA"),
        ("name: x\nQA: 3", "a template or an attack that is no text"),
        ("name: x\nqa: '{profile} {instruction}'", "the key 'qa'"),
        ("name: x\nQA: '{profile} {instruction}'\nattacks: [a]", "a template or an attack that is no text"),
        ("- a", "no mapping with a name"),
        ("name: [x", "while parsing"),
    ],
)
def test_what_is_no_frame_is_refused(text: str, found: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_frame(text, where="frame.yaml")
    assert "frame.yaml is no frame." in str(caught.value)
    assert found in str(caught.value)


def test_a_missing_file_and_a_file_that_is_no_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"There is no frame 'official.yaml'"):
        read_frame("official.yaml")
    path = tmp_path / "frame.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_frame(str(path))
