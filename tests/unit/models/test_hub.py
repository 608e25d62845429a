# SPDX-License-Identifier: Apache-2.0
"""The hub: only safe files are asked for, and each refusal becomes an error that says what to do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors as hub_errors

from keelwright.core.errors import ExitCode, MissingError, OfflineError, StorageError
from keelwright.models import hub


def http_error(kind: type[Exception]) -> Exception:
    """Return an error of the hub's client as a response would raise it."""
    error = kind.__new__(kind)
    error.args = ("the server said no",)
    error.response = SimpleNamespace(status_code=404)  # type: ignore[attr-defined]
    return error


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the last call to the hub; `outcome` in it decides what the call gives back or raises."""
    call: dict[str, Any] = {"outcome": "/cache/snapshots/abc"}
    for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(switch, raising=False)

    def fake(repo: str, **settings: Any) -> str:
        call.update(repo=repo, **settings)
        if isinstance(call["outcome"], Exception):
            raise call["outcome"]
        return str(call["outcome"])

    monkeypatch.setattr(hub, "snapshot_download", fake)
    return call


def test_only_files_that_cannot_run_code_are_asked_for(asked: dict[str, Any]) -> None:
    assert hub.download("org/name", "v1", offline=False) == Path("/cache/snapshots/abc")
    assert (asked["repo"], asked["revision"], asked["local_files_only"]) == ("org/name", "v1", False)
    patterns = asked["allow_patterns"]
    assert "*.safetensors" in patterns
    for name in ("pytorch_model.bin", "modeling_own.py", "x.pkl", "weights.pt"):
        assert not any(Path(name).match(pattern) for pattern in patterns)


@pytest.mark.parametrize(
    ("kind", "problem", "fix"),
    [
        ("RepositoryNotFoundError", "There is no folder and no hub model 'org/nmae@v1'", "check the spelling"),
        ("GatedRepoError", "The model 'org/nmae@v1' is gated", "ask for access at https://huggingface.co/org/nmae"),
        ("RevisionNotFoundError", "The model 'org/nmae' has no revision 'v1'", "leave the revision out"),
        ("DisabledRepoError", "The hub has disabled the model", "choose another model"),
    ],
)
def test_what_the_hub_refuses_is_missing(asked: dict[str, Any], kind: str, problem: str, fix: str) -> None:
    asked["outcome"] = http_error(getattr(hub_errors, kind))
    with pytest.raises(MissingError) as caught:
        hub.download("org/nmae", "v1", offline=False)
    assert problem in caught.value.problem
    assert fix in str(caught.value.fix)
    assert caught.value.expected
    assert caught.value.found
    assert caught.value.exit_code == ExitCode.MACHINE


def test_an_impossible_id_is_missing(asked: dict[str, Any]) -> None:
    asked["outcome"] = hub_errors.HFValidationError("bad id")
    with pytest.raises(MissingError, match="There is no folder and no hub model"):
        hub.download("a..b", None, offline=False)


@pytest.mark.parametrize(
    "error",
    [
        hub_errors.LocalEntryNotFoundError("not cached"),
        hub_errors.OfflineModeIsEnabled("offline"),
        ConnectionError("refused"),
        http_error(hub_errors.HfHubHTTPError),
        http_error(hub.TRANSPORT_ERROR),
    ],
    ids=["not cached", "offline mode", "refused", "server error", "transport error"],
)
def test_an_unreachable_hub_is_offline(asked: dict[str, Any], error: Exception) -> None:
    asked["outcome"] = error
    with pytest.raises(OfflineError) as caught:
        hub.download("org/name", None, offline=False)
    assert caught.value.problem == "There is no folder 'org/name', and the hub cannot be asked for it."
    assert type(error).__name__ in str(caught.value.found)
    assert caught.value.exit_code == ExitCode.MACHINE


def test_offline_is_passed_on_and_named(asked: dict[str, Any]) -> None:
    asked["outcome"] = hub_errors.LocalEntryNotFoundError("not cached")
    with pytest.raises(OfflineError, match="--offline"):
        hub.download("org/name", None, offline=True)
    assert asked["local_files_only"] is True


@pytest.mark.parametrize(("value", "is_set"), [("1", True), ("true", True), ("ON", True), ("0", False), ("", False)])
def test_the_environment_can_forbid_the_network(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, value: str, is_set: bool
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    hub.download("org/name", None, offline=False)
    assert asked["local_files_only"] is is_set


def test_offline_for_real_never_touches_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    with pytest.raises(OfflineError):
        hub.download("some-org/never-downloaded", None, offline=True)


def test_an_incomplete_cached_copy_is_left_to_whoever_opens_it(asked: dict[str, Any]) -> None:
    error = hub_errors.LocalEntryNotFoundError("incomplete")
    error.snapshot_path = "/cache/snapshots/part"  # type: ignore[attr-defined]
    asked["outcome"] = error
    assert hub.download("org/name", None, offline=True) == Path("/cache/snapshots/part")


def test_a_full_disk_is_a_storage_error(asked: dict[str, Any]) -> None:
    asked["outcome"] = OSError(28, "No space left on device")
    with pytest.raises(StorageError, match="is full"):
        hub.download("org/name", None, offline=False)


def test_the_commit_is_read_from_the_cache_folder() -> None:
    assert hub.commit_of(Path("/cache/models--a--b/snapshots/0123abc")) == "0123abc"
    assert hub.commit_of(Path("/home/me/models/tuned")) is None
