from pathlib import Path

import pytest

from miniphi.models import MachineMemory, machine_memory

MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(
        tmp_path, "proc/meminfo", "MemTotal:       8192 kB\nMemFree:  1024 kB\nMemAvailable:   4096 kB\nHugePages: 0\n"
    )
    return tmp_path


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_without_control_groups_it_is_what_the_kernel_says(root: Path) -> None:
    assert machine_memory(root) == MachineMemory(total_bytes=8 * MIB, available_bytes=4 * MIB)


def test_an_old_kernel_without_an_estimate(root: Path) -> None:
    write(root, "proc/meminfo", "MemTotal: 8192 kB\nMemFree: 1024 kB\n")
    assert machine_memory(root).available_bytes == MIB


def test_version_2_counts_reclaimable_pages_as_available(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/service/worker\n")
    write(root, "sys/fs/cgroup/service/memory.max", str(3 * MIB))
    write(root, "sys/fs/cgroup/service/memory.current", str(2 * MIB))
    write(root, "sys/fs/cgroup/service/memory.stat", f"anon 5\ninactive_file {MIB}\nactive_file 7\n")
    write(root, "sys/fs/cgroup/service/worker/memory.max", "max\n")
    assert machine_memory(root) == MachineMemory(total_bytes=3 * MIB, available_bytes=2 * MIB)


def test_the_tightest_group_above_counts(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/a/b\n")
    write(root, "sys/fs/cgroup/a/memory.max", str(2 * MIB))
    write(root, "sys/fs/cgroup/a/memory.current", "0")
    write(root, "sys/fs/cgroup/a/b/memory.max", str(6 * MIB))
    write(root, "sys/fs/cgroup/a/b/memory.current", str(5 * MIB))
    assert machine_memory(root) == MachineMemory(total_bytes=2 * MIB, available_bytes=MIB)


def test_a_container_that_sees_the_hosts_path_reads_the_mounts_own_limit(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/docker/0123\n")
    write(root, "sys/fs/cgroup/memory.max", str(MIB))
    write(root, "sys/fs/cgroup/memory.current", str(MIB // 4))
    assert machine_memory(root) == MachineMemory(total_bytes=MIB, available_bytes=3 * MIB // 4)


def test_version_1(root: Path) -> None:
    write(root, "proc/self/cgroup", "5:cpu,cpuacct:/job\n4:memory:/job\n")
    write(root, "sys/fs/cgroup/memory/job/memory.limit_in_bytes", str(2 * MIB))
    write(root, "sys/fs/cgroup/memory/job/memory.usage_in_bytes", str(MIB))
    write(root, "sys/fs/cgroup/memory/job/memory.stat", f"total_inactive_file {MIB // 2}\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712")
    assert machine_memory(root) == MachineMemory(total_bytes=2 * MIB, available_bytes=3 * MIB // 2)


def test_a_group_over_its_limit_has_nothing_left(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/\n")
    write(root, "sys/fs/cgroup/memory.max", str(MIB))
    write(root, "sys/fs/cgroup/memory.current", str(2 * MIB))
    assert machine_memory(root).available_bytes == 0


def test_a_machine_without_proc_is_asked_for_its_pages(tmp_path: Path) -> None:
    memory = machine_memory(tmp_path)
    assert memory.total_bytes > 64 * MIB
    assert 0 < memory.available_bytes <= memory.total_bytes


def test_this_machine() -> None:
    memory = machine_memory()
    assert 0 < memory.available_bytes <= memory.total_bytes
