# SPDX-License-Identifier: Apache-2.0
"""Many models in one command, without processes: what is planned, summed up and refused."""

import multiprocessing

import pytest

from keelwright.core.errors import ConfigError
from keelwright.heal import fleet
from keelwright.heal.fleet import audit_fleet, audit_job

MODELS = ("lab:workshop/base", "some-org/model@v1", "/somewhere/else/model")


def outcome_of(job):
    model, _, place, _ = job
    if model == MODELS[1]:
        return {"failure": {"model": model, "error": "MissingError", "exit_code": 3, "text": "No such model.\n  fix"}}
    return {"metrics": {"harm_rate": None}, "run": place, "sentence": f"{model}: fine.", "figures": []}


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    """Stand in for the processes; return the jobs that they were given."""
    given = []

    def stand_in(wanted, workers):
        given.append((list(wanted), workers))
        for job in reversed(wanted):
            yield job[0], outcome_of(job)

    monkeypatch.setattr(fleet, "_on_processes", stand_in)
    monkeypatch.chdir(tmp_path)
    return given


def test_models_keep_their_order_and_have_folders_of_their_own(jobs):
    summary = audit_fleet(MODELS, run="fleet", workers=2, suite="workshop")
    assert list(summary["models"]) == [MODELS[0], MODELS[2]]
    assert [one["model"] for one in summary["failed"]] == [MODELS[1]]
    assert summary["sentence"] == "2 of 3 models audited; 1 could not be audited."
    ((wanted, workers),) = jobs
    assert workers == 2
    assert [place for _, _, place, _ in wanted] == [
        "fleet/01-lab-workshop-base", "fleet/02-some-org-model-v1", "fleet/03-somewhere-else-model",
    ]  # fmt: skip
    assert all(settings["suite"] == "workshop" for *_, settings in wanted)


def test_no_more_workers_than_models(jobs):
    audit_fleet(MODELS[:1], run="fleet", workers=8)
    assert jobs[0][1] == 1


def test_a_fleet_with_failures_tries_again_and_a_whole_one_does_not(jobs):
    audit_fleet(MODELS, run="fleet")
    audit_fleet(MODELS, run="fleet")
    assert len(jobs) == 2
    first = audit_fleet(MODELS[::2], run="whole")
    assert audit_fleet(MODELS[::2], run="whole") == first
    assert len(jobs) == 3


@pytest.mark.parametrize(
    ("models", "settings", "says"),
    [
        ((), {}, "No model was named"),
        ((*MODELS, MODELS[0]), {}, "A model is named twice"),
        (MODELS, {"workers": 0}, "'workers' is out of range"),
        (MODELS, {"executor": "threads"}, "'executor' is not a known choice"),
        (MODELS, {"suite": "nope"}, "There is no suite 'nope'"),
        (MODELS, {"judges": ("nope",)}, "There is no judge 'nope'"),
    ],
)
def test_what_is_wrong_for_all_is_said_before_any_job(models, settings, says, jobs, tmp_path):
    with pytest.raises(ConfigError, match=says):
        audit_fleet(models, run="fleet", **settings)
    assert jobs == []
    assert not (tmp_path / "fleet").exists()


def test_a_job_that_fails_returns_why(tmp_path):
    outcome = audit_job("lab:workshop/nope", None, str(tmp_path / "run"), {"suite": "workshop"})
    assert outcome["failure"]["error"] == "MissingError"
    assert outcome["failure"]["exit_code"] == 3
    assert "  fix:" in outcome["failure"]["text"]


class Gone:
    """A worker that died."""

    def __init__(self, exitcode):
        self.exitcode = exitcode

    def join(self):
        """Do nothing."""


@pytest.mark.parametrize(("exitcode", "code", "says"), [(1, 1, "a bug of keelwright"), (-9, 3, "died (signal 9)")])
def test_a_worker_that_died_fails_its_own_model(exitcode, code, says):
    receiver, sender = multiprocessing.Pipe(duplex=False)
    sender.close()
    failure = fleet._received(receiver, Gone(exitcode), "m")["failure"]
    assert failure["exit_code"] == code
    assert says in failure["text"]
