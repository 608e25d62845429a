# SPDX-License-Identifier: Apache-2.0
"""Memory: what is left, within a container's limit, and the error with its figures."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from keelwright.core.errors import ResourceError
from keelwright.models import memory


def container(folder: Path, limit: str, used: int, cache: int) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")
    return folder


def test_a_containers_limit_counts_and_its_cache_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", container(tmp_path, "1000000", 400_000, 100_000))
    assert memory.available_bytes() == 700_000


@pytest.mark.parametrize("limit", ["max", "nonsense"])
def test_without_a_limit_the_machines_memory_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(memory, "_CGROUP", container(tmp_path, limit, 0, 0))
    assert 0 < memory.available_bytes() <= psutil.virtual_memory().total


def test_too_much_is_an_error_with_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", container(tmp_path, "3000000", 1_000_000, 0))
    memory.require_memory(2_000_000, "Loading 'x'")
    with pytest.raises(ResourceError) as caught:
        memory.require_memory(2_200_000, "Loading 'x'")
    assert caught.value.problem == "Loading 'x' needs more memory than there is."
    assert caught.value.expected == "2.20 MB free on cpu"
    assert caught.value.found == "2.00 MB free"
    assert caught.value.fix


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (20_500, "20.5 kB"),
        (2_200_000_000, "2.20 GB"),
        (10**14, "100 TB"),
    ],
)
def test_bytes_are_shown_with_three_digits(count: int, text: str) -> None:
    assert memory.shown_bytes(count) == text
