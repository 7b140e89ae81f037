"""Limits on memory, over made-up /proc and /sys trees: control groups v1 and v2, nested, in containers, none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from flashmoe import cgroups
from flashmoe.engine import memory
from flashmoe.engine.memory import auto_budget

MIB, GIB = 1 << 20, 1 << 30
V1_UNLIMITED = 9223372036854771712


class Machine:
    """A tree that looks like a Linux machine of 16 GiB with 12 available and a process that holds 100 MiB."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {16 * GIB >> 10} kB\nMemAvailable: {12 * GIB >> 10} kB\n")
        self.write("proc/self/status", f"VmRSS: {150 << 10} kB\nRssAnon: {100 << 10} kB\n")

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def inside(self, cgroup: str, *mounts: str) -> None:
        """What /proc/self says of the process's groups and of what is mounted."""
        self.write("proc/self/cgroup", cgroup)
        self.write("proc/self/mountinfo", "24 1 8:1 / / rw - ext4 /dev/sda rw\n" + "".join(mounts))

    def v1(self, group: str, limit: int, usage: int, inactive_file: int = 0) -> None:
        folder = f"sys/fs/cgroup/memory/{group}"
        self.write(f"{folder}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{folder}/memory.usage_in_bytes", f"{usage}\n")
        self.write(f"{folder}/memory.use_hierarchy", "1\n")
        self.write(f"{folder}/memory.stat", f"inactive_file 7\ntotal_inactive_file {inactive_file}\n")

    def v2(self, group: str, limit: int | str, usage: int, inactive_file: int = 0, high: str = "max") -> None:
        folder = f"sys/fs/cgroup/{group}"
        self.write(f"{folder}/memory.max", f"{limit}\n")
        self.write(f"{folder}/memory.high", f"{high}\n")
        self.write(f"{folder}/memory.current", f"{usage}\n")
        self.write(f"{folder}/memory.stat", f"anon 5\ninactive_file {inactive_file}\nactive_file 9\n")


V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V2_MOUNT = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def rooms(machine: Machine) -> dict[str, int]:
    return {limit.name: limit.room for limit in cgroups.limits(machine.root)}


def test_a_machine_without_control_groups_keeps_a_tenth(machine: Machine) -> None:
    (limit,) = cgroups.limits(machine.root)
    assert (limit.name, limit.total, limit.used) == ("the machine", 16 * GIB, 4 * GIB)
    assert limit.reserve == 16 * GIB // 10
    auto = auto_budget(machine.root)
    assert auto.nbytes == 12 * GIB - 16 * GIB // 10 + 100 * MIB  # what the process holds is its own
    assert auto.reason == "the machine has 16.00 GiB: 4.00 GiB in use, 1.60 GiB kept free"
    assert cgroups.group_limit(machine.root) is None


@pytest.mark.parametrize(("total", "reserve"), [(2, 512 * MIB), (8, 8 * GIB // 10), (512, 4 * GIB)])
def test_the_reserve_is_neither_tiny_nor_huge(machine: Machine, total: int, reserve: int) -> None:
    kilobytes = total * GIB >> 10
    machine.write("proc/meminfo", f"MemTotal: {kilobytes} kB\nMemAvailable: {kilobytes} kB\n")
    assert cgroups.limits(machine.root)[0].reserve == reserve


def test_v1_counts_neighbours_but_not_cache_that_can_be_reclaimed(machine: Machine) -> None:
    machine.inside("4:memory:/job\n3:cpu:/other\n", V1_MOUNT)
    machine.v1("job", 4 * GIB, 3 * GIB, inactive_file=GIB)
    machine.v1("", V1_UNLIMITED, 9 * GIB)
    assert rooms(machine)["control group /job"] == 2 * GIB - 4 * GIB // 20
    assert len(rooms(machine)) == 2  # the root limits nothing
    assert auto_budget(machine.root).nbytes == 2 * GIB - 4 * GIB // 20 + 100 * MIB
    assert cgroups.group_limit(machine.root) == 4 * GIB


def test_v2_counts_neighbours_but_not_cache_that_can_be_reclaimed(machine: Machine) -> None:
    machine.inside("0::/user.slice/job\n", V2_MOUNT)
    machine.v2("user.slice/job", 4 * GIB, 3 * GIB, inactive_file=GIB)
    assert rooms(machine)["control group /user.slice/job"] == 2 * GIB - 4 * GIB // 20
    assert "user.slice/job has 4.00 GiB: 2.00 GiB in use" in auto_budget(machine.root).reason


def test_a_parent_that_neighbours_have_filled_decides(machine: Machine) -> None:
    machine.inside("0::/a/b/c\n", V2_MOUNT)
    machine.v2("a/b/c", 4 * GIB, 100 * MIB)
    machine.v2("a/b", "max", 8 * GIB)
    machine.v2("a", 10 * GIB, 9 * GIB)
    assert list(rooms(machine)) == ["the machine", "control group /a/b/c", "control group /a"]
    assert auto_budget(machine.root).nbytes == GIB - 512 * MIB + 100 * MIB
    assert cgroups.group_limit(machine.root) == 4 * GIB


def test_v1_parents_without_hierarchy_do_not_count(machine: Machine) -> None:
    machine.inside("4:memory:/a/b\n", V1_MOUNT)
    machine.v1("a/b", 4 * GIB, GIB)
    machine.v1("a", 2 * GIB, 2 * GIB)
    assert auto_budget(machine.root).nbytes < 0 + 100 * MIB
    machine.write("sys/fs/cgroup/memory/a/memory.use_hierarchy", "0\n")
    assert rooms(machine)["control group /a/b"] == min(rooms(machine).values()) == 3 * GIB - 4 * GIB // 20


def test_v2_slows_a_group_down_at_high_so_that_is_a_limit_too(machine: Machine) -> None:
    machine.inside("0::/job\n", V2_MOUNT)
    machine.v2("job", 4 * GIB, GIB, high=str(2 * GIB))
    assert rooms(machine)["control group /job"] == GIB - 2 * GIB // 20
    machine.v2("job", "max", GIB, high="0")
    assert cgroups.group_limit(machine.root) == 0
    assert auto_budget(machine.root).nbytes == 0


def test_a_container_sees_its_own_group_under_another_name(machine: Machine) -> None:
    # v1 without a namespace: the mount begins at the container's group, the path is the host's.
    machine.inside("4:memory:/docker/abc\n", V1_MOUNT.replace(" / ", " /docker/abc ", 1))
    machine.v1("", 4 * GIB, GIB)
    assert rooms(machine)["control group /"] == 3 * GIB - 4 * GIB // 20
    # ... or at a group beside it, of which the path says nothing
    machine.inside("4:memory:/docker/abc\n", V1_MOUNT.replace(" / ", " /kubepods/xyz ", 1))
    assert cgroups.group_limit(machine.root) == 4 * GIB
    # a namespace whose root is not above us
    machine.inside("0::/../other\n", V2_MOUNT)
    machine.v2("", 2 * GIB, GIB)
    assert cgroups.group_limit(machine.root) == 2 * GIB


def test_both_versions_at_once(machine: Machine) -> None:
    unified = V2_MOUNT.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")
    machine.inside("4:memory:/job\n0::/job\n", V1_MOUNT, unified)
    machine.v1("job", 4 * GIB, GIB)
    machine.write("sys/fs/cgroup/unified/job/cgroup.procs", "1\n")
    assert cgroups.group_limit(machine.root) == 4 * GIB


def test_a_mount_with_a_blank_in_its_path(machine: Machine) -> None:
    machine.inside("0::/job\n", V2_MOUNT.replace("/sys/fs/cgroup ", r"/my\040groups "))
    machine.write("my groups/job/memory.max", str(GIB))
    machine.write("my groups/job/memory.current", "0")
    assert cgroups.group_limit(machine.root) == GIB


def test_without_mountinfo_the_usual_places_are_looked_at(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/job\n")
    machine.v2("job", GIB, 0)
    assert cgroups.group_limit(machine.root) == GIB
    machine.write("proc/self/cgroup", "4:cpu,memory:/job\n")
    machine.v1("job", 2 * GIB, 0)
    assert cgroups.group_limit(machine.root) == 2 * GIB


def test_a_system_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cgroups.limits(tmp_path) == []
    assert cgroups.own_memory(tmp_path) == 0
    monkeypatch.setattr(memory.env, "memory_available", lambda: 10 * GIB)
    assert auto_budget(tmp_path) == memory.AutoBudget(8 * GIB, "four fifths of what is available")


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m.write("proc/self/cgroup", "nonsense\n::\n0::\n:memory:/x"),
        lambda m: m.write("proc/self/mountinfo", "1 2 3 - cgroup2\n - \n35 31 0:32 / /sys - cgroup2"),
        lambda m: m.write("sys/fs/cgroup/job/memory.max", "9" * 5000),
        lambda m: m.write("sys/fs/cgroup/job/memory.current", ""),
        lambda m: (m.root / "sys/fs/cgroup/job/memory.max").unlink(),
        lambda m: m.write("sys/fs/cgroup/job/memory.max", "\u0663\n"),
    ],
)
def test_what_cannot_be_read_limits_nothing(machine: Machine, damage: Callable[[Machine], object]) -> None:
    machine.inside("0::/job\n", V2_MOUNT)
    machine.v2("job", GIB, 0)
    damage(machine)
    assert next(iter(rooms(machine))) == "the machine"
    assert auto_budget(machine.root).nbytes > GIB


def test_reclaimable_cache_is_never_more_than_what_is_used(machine: Machine) -> None:
    machine.inside("0::/job\n", V2_MOUNT)
    machine.v2("job", GIB, 100, inactive_file=GIB)  # the two files are read one after the other
    assert cgroups.limits(machine.root)[1].used == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="of Linux")
def test_the_real_machine_leaves_something_and_keeps_something() -> None:
    auto = auto_budget()
    assert 0 < auto.nbytes < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert cgroups.own_memory() > MIB
