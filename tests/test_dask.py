"""The crop stage on a cluster of two worker processes.

The bytes of a serial run, also when one of them is killed.
"""

import os
import shutil
import signal
import threading
import time

import pytest
from test_datasets import QUICK, digest, facecaption_row, make_facecaption, photo

from mefem.crop import crop_dataset
from mefem.shards import SUCCESS, ClusterAbsent, ShardError, on_cluster

distributed = pytest.importorskip("distributed")
SHARDS, EACH = 12, 12


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    rows = [facecaption_row(number) for number in range(SHARDS * EACH)]
    shards = [
        [(row, SUCCESS, photo(number), {}) for number, row in enumerate(rows[start : start + EACH])]
        for start in range(0, len(rows), EACH)
    ]
    make_facecaption(root, rows, shards)
    crop_dataset("facecaption", root, root.parent / "serial", **QUICK)
    return root


@pytest.fixture(scope="module")
def cluster():
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        yield cluster


def test_a_cluster_with_a_killed_worker_gives_the_bytes_of_a_serial_run(raw, cluster, tmp_path):
    out, killed = tmp_path / "faces", []

    def kill_one():
        while not list(out.glob("*_stats.json")):  # in the middle: some shards are whole, others under way
            time.sleep(0.01)
        killed.append(next(iter(cluster.workers.values())).pid)
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    with on_cluster(cluster.scheduler_address):
        manifest = crop_dataset("facecaption", raw, out, **{**QUICK, "jobs": 2})
    killer.join(10)
    assert killed and manifest["usable"] == SHARDS * EACH
    assert digest(out) == digest(raw.parent / "serial")


def test_an_error_on_a_worker_reaches_the_caller(raw, cluster, tmp_path):
    broken = tmp_path / "raw"
    shutil.copytree(raw, broken)
    (broken / "images/00005.tar").unlink()
    with on_cluster(cluster.scheduler_address), pytest.raises(ShardError, match="00005.tar is missing"):
        crop_dataset("facecaption", broken, tmp_path / "faces", **{**QUICK, "jobs": 2})


def test_no_scheduler_is_an_error_that_names_the_address(tmp_path):
    with pytest.raises(ClusterAbsent, match="tcp://127.0.0.1:9"), on_cluster("tcp://127.0.0.1:9", timeout=1):
        pass
