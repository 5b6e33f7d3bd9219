"""Processor name and number of cores."""

import math
import os
import sys

import pytest

from llmc_cli.machine import cores


@pytest.mark.parametrize(("limit", "threads"), [("1", 1), ("100000", None), ("0", 1), ("", None), ("many", None)])
def test_default_threads_respects_numba_num_threads(monkeypatch, limit, threads):
    monkeypatch.setenv("NUMBA_NUM_THREADS", limit)
    monkeypatch.setattr(cores, "available_cores", lambda: 3)
    assert cores.default_threads() == (threads or 3)
    monkeypatch.delenv("NUMBA_NUM_THREADS")
    assert cores.default_threads() == 3


def test_available_cores_respects_affinity_and_quota(monkeypatch):
    assert cores.available_cores() >= 1
    if hasattr(os, "sched_getaffinity"):
        assert cores.available_cores() <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(cores, "cpu_quota", lambda: 0.4)
    assert cores.available_cores() == 1
    monkeypatch.setattr(cores, "cpu_quota", lambda: math.inf)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.available_cores() == 1
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cores.available_cores() == 6


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        (
            "0::/a/b\n",
            {"cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n", "a/b/cpu.max": "300000 100000\n"},
            2.0,
        ),
        ("0::/not/visible\n", {"cpu.max": "50000 100000\n"}, 0.5),
        (
            "4:memory:/x\n3:cpu,cpuacct:/\n",
            {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            4.0,
        ),
        ("3:cpu:/j\n", {"cpu/j/cpu.cfs_quota_us": "-1\n", "cpu/j/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("1:name=systemd:/\n", {}, math.inf),
        (None, {}, math.inf),
    ],
)
def test_cpu_quota_is_read_from_cgroups(tmp_path, groups, files, quota):
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if groups is not None:
        (tmp_path / "self").write_text(groups)
    assert cores.cpu_quota(tmp_path / "cgroup", tmp_path / "self") == quota


def test_processor_name_is_known():
    assert cores.processor_name() or sys.platform == "win32"
