# SPDX-License-Identifier: Apache-2.0
"""Ray tasks as workers, on a real local cluster."""

import pytest
import torch

ray = pytest.importorskip("ray", reason="the extra ray is not installed")

from keelwright.core.errors import NumericalError  # noqa: E402
from keelwright.models.checkpoint import Checkpoint  # noqa: E402
from keelwright.repair.linear import Linear, LinearConfig  # noqa: E402
from keelwright.weights import workers, write  # noqa: E402
from keelwright.weights.plan import plan_edit  # noqa: E402

pytestmark = pytest.mark.slow  # starting a cluster takes some seconds


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture
def folders(make_folder):
    def tensors(seed):
        draw = torch.Generator().manual_seed(seed)
        return {f"layers.{index}.weight": torch.randn(64, 33, generator=draw).to(torch.bfloat16) for index in range(9)}

    return make_folder("aligned", tensors(0)), make_folder("tuned", tensors(1), files=2)


def go(folders, out, **effort):
    sources = {role: Checkpoint(folder) for role, folder in zip(("aligned", "tuned"), folders, strict=True)}
    plan = plan_edit(Linear(LinearConfig(0.3)), sources, max_shard_bytes=20_000)
    return write.materialise(plan, out, companions_from=folders[1], effort=write.Effort(**effort))


def test_ray_tasks_write_the_same_bytes(cluster, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "TASK_BYTES", 5000)
    alone = go(folders, tmp_path / "alone", workers=1)
    together = go(folders, tmp_path / "ray", workers=2, executor="ray")
    names = [name for name in alone.files if "safetensors" in name]
    assert len(names) > 2
    for name in names:
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
        assert together.files[name] == alone.files[name]


def test_an_error_of_a_task_arrives_as_it_was(cluster, folders, make_folder, tmp_path):
    spoilt = {f"layers.{index}.weight": torch.zeros(64, 33, dtype=torch.bfloat16) for index in range(9)}
    spoilt["layers.4.weight"][1, 0] = float("inf")
    with pytest.raises(NumericalError, match=r"'layers.4.weight', element 33"):
        go((folders[0], make_folder("spoilt", spoilt)), tmp_path / "out", executor="ray")
    assert not list(tmp_path.glob("out*"))


def test_a_cluster_is_begun_and_ended_where_there_is_none(folders, tmp_path):
    ray.shutdown()
    go(folders, tmp_path / "out", workers=1, executor="ray")
    assert (tmp_path / "out" / "merge.lock.json").is_file() and not ray.is_initialized()
