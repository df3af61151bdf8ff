"""What processes agree on, over a store in memory: each process is a thread."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxneurons.errors import ConfigError, DataError
from jaxneurons.processes import watching
from jaxneurons.processes.joining import Job
from jaxneurons.processes.merging import merge_runs
from jaxneurons.processes.sharing import ToMerge, open_parts, share_parts
from jaxneurons.processes.team import ALONE, Processes, current
from jaxneurons.processes.watching import Watch
from jaxneurons.storage.store import Memory, RunDirectory

HOSTS = ("a", "b", "c")


class Box:
    """The store, as dictionaries have it."""

    def __init__(self):
        self.texts, self.lock, self.closed, self.broken = {}, threading.Lock(), False, False

    def set(self, key, value):
        if self.broken:
            raise RuntimeError("out of reach")
        with self.lock:
            self.texts[key] = value

    def read(self, directory):
        with self.lock:
            return {
                key.rpartition("/")[2]: value
                for key, value in self.texts.items()
                if key.startswith(f"{directory}/")
            }

    def delete(self, key):
        with self.lock:
            self.texts.pop(key, None)

    def is_closed(self):
        return self.closed


def together(work, count=3, **how):
    """What each of so many processes makes of `work(team)`: a result or an exception."""
    box = Box()
    teams = [Processes(box, index, HOSTS[:count], **how) for index in range(count)]

    def run(team):
        try:
            return work(team)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, teams)), box


def test_alone_agrees_with_itself():
    assert current() is ALONE
    assert ALONE.gather("x", 3) == [3]
    ALONE.compare("settings", {"a": 1})
    assert ALONE.first
    assert ALONE.writes
    assert ALONE.count == 1


def test_gather_waits_for_all_in_order():
    def work(team):
        time.sleep(0.05 * (2 - team.index))
        values = [team.gather("number", team.index * 10)]
        values.append(team.of_first("first's", lambda: "yes" if team.first else "no"))
        for _ in range(5):
            team.wait("again")
        return values

    results, box = together(work)
    assert results == [[[0, 10, 20], "yes"]] * 3
    assert len(box.texts) <= 6  # what all have read is taken away


def test_other_places_are_an_error():
    results, _ = together(lambda team: team.wait("here" if team.index != 1 else "there"))
    for error in results:
        assert isinstance(error, DataError)
        assert "process 1 (host b) is at 'there' where process 0 (host a) is at 'here'" in str(
            error
        )


def test_what_differs_is_named():
    def work(team):
        seed = 1 if team.index == 2 else 0
        team.compare("settings", {"site": "up", "quadrature": {"seed": seed}})

    results, _ = together(work)
    assert all(isinstance(error, DataError) for error in results)
    assert "quadrature.seed: 1 in process 2 (host c), 0 in process 0 (host a)" in str(results[0])
    assert "quadrature.seed: 0 in process 0 (host a), 1 in process 2 (host c)" in str(results[2])
    same, _ = together(lambda team: team.compare("settings", {"pair": (1, 2)}))
    assert same == [None] * 3


def jobs(made, count=7):
    def make(number):
        made.append(number)
        return {"value": np.array(number**2)}

    return {number: lambda number=number: make(number) for number in range(count)}


def values(store, count=7):
    return [int(store.load(number)["value"]) for number in range(count)]


def test_each_part_is_made_once(tmp_path):
    def work(team):
        made = []
        store = open_parts(tmp_path / "run", {"seed": 0}, team=team)
        calls = []
        missing = share_parts(
            store,
            jobs(made),
            sizes=[2] * 7,
            progress=lambda *done: calls.append(done),
            team=team,
        )
        assert calls == [(2 * n, 2 * len(made)) for n in range(1, len(made) + 1)]
        return made, missing, values(store)

    results, _ = together(work)
    assert [made for made, _, _ in results] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [missing for _, missing, _ in results] == [7, 7, 7]
    assert all(squares == [n**2 for n in range(7)] for _, _, squares in results)
    # Another number of processes goes on with what is missing.
    for number in (1, 3, 4):
        (tmp_path / "run" / "parts" / f"{number:05d}.npz").unlink()
    results, _ = together(work, count=2)
    assert [made for made, _, _ in results] == [[1, 4], [3]]
    # Nothing is left to be made, and one that is damaged is made again by one of them.
    (tmp_path / "run" / "parts" / "00005.npz").write_bytes(b"nothing")
    results, _ = together(work, count=2)
    assert [made for made, _, _ in results] == [[5], []]


def test_nothing_is_shared_alone_or_in_memory(tmp_path):
    made = []
    assert share_parts(RunDirectory(tmp_path / "run", {}), jobs(made)) is None
    results, _ = together(lambda team: share_parts(Memory(), jobs(made), team=team))
    assert results == [None] * 3
    assert made == []


def test_parts_that_all_are_needed_for(tmp_path):
    def work(team):
        made = []
        store = open_parts(tmp_path / "run", {}, team=team)
        share_parts(store, jobs(made), together=True, team=team)
        return made, values(store)

    results, _ = together(work)
    assert all(made == [*range(7)] for made, _ in results)


def test_other_parts_or_identity(tmp_path):
    def other_parts(team):
        store = open_parts(tmp_path / "run", {}, team=team)
        share_parts(store, jobs([], 7 - team.index // 2), team=team)

    results, _ = together(other_parts)
    assert all(isinstance(error, DataError) and "differ" in str(error) for error in results)

    def other_identity(team):
        open_parts(tmp_path / "new", {"model": "m" * (1 + team.index)}, team=team)

    results, _ = together(other_identity)
    assert all(isinstance(error, DataError) for error in results)
    assert 'model: "mm" in process 1 (host b), "m" in process 0' in str(results[0])
    assert not (tmp_path / "new").exists()  # nothing is begun


def test_a_directory_that_not_all_see(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxneurons.processes.sharing.SEEN", 0.3)

    def work(team):
        return open_parts(tmp_path / f"disk{team.index == 1}" / "run", {"seed": 0}, team=team)

    results, _ = together(work)
    for error in results:
        assert isinstance(error, DataError)
        assert "made by process 0 (host a), not seen by process 1 (host b);" in str(error)
        assert "process 2" not in str(error)
        assert "--local-disks" in str(error)
    assert not (tmp_path / "diskTrue").exists()
    left = [path.name for path in (tmp_path / "diskFalse" / "run" / "parts").iterdir()]
    assert left == ["identity.json"]


def test_local_disks_are_merged(tmp_path):
    def work(team):
        made = []
        store = open_parts(tmp_path / team.hosts[team.index], {"seed": 0}, team=team)
        (tmp_path / team.hosts[team.index] / "queries.jsonl").write_text("{}")
        share_parts(store, jobs(made), team=team)

    results, _ = together(work, local_disks=True)
    assert all(isinstance(note, ToMerge) and "jaxneurons merge" in str(note) for note in results)
    places = [tmp_path / host for host in HOSTS]
    assert merge_runs(places, tmp_path / "merged") == 7
    assert merge_runs(places, tmp_path / "merged") == 0
    store = RunDirectory(tmp_path / "merged", {"seed": 0})
    assert values(store) == [n**2 for n in range(7)]
    assert (tmp_path / "merged" / "queries.jsonl").read_text() == "{}"
    made = []
    for number, make in jobs(made).items():
        store.part(number, make)
    assert made == []
    # Into one of them; what is damaged is no part.
    (tmp_path / "b" / "parts" / "00001.npz").write_bytes(b"nothing")
    assert merge_runs(places, tmp_path / "a") == 3


def test_merging_what_does_not_belong_together(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        RunDirectory(tmp_path / name, {"seed": seed})
    with pytest.raises(DataError, match=r"b is not of the run of .*/a: .* another seed \(1 there"):
        merge_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    with pytest.raises(DataError, match="no parts of a run"):
        merge_runs([tmp_path / "a", tmp_path / "c"], tmp_path / "out")
    with pytest.raises(DataError, match="no directories"):
        merge_runs([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"coordinator": "host:1"}, "give --processes and --process too"),
        ({"processes": 2, "process": 1}, "give --coordinator too"),
        ({"coordinator": "host", "processes": 2, "process": 1}, "a free port"),
        ({"coordinator": "h:1", "processes": 2, "process": 2}, "numbered from 0 to 1"),
        ({"coordinator": "h:1", "processes": 2, "process": -1}, "process must be at least 0"),
        ({"coordinator": "h:1", "processes": 0, "process": 0}, "processes must be at least 1"),
        ({"timeout": 0.0}, "timeout must be"),
    ],
)
def test_jobs_that_cannot_be(values, message):
    with pytest.raises(ConfigError, match=message):
        Job(**values)


# --- the watch ------------------------------------------------------------------------------------


def watched(box, index, lines):
    watch = Watch(box, index, HOSTS[:2], leave=lines.append, period=0.02)
    watch.start()
    return watch


def until(lines):
    deadline = time.monotonic() + 10
    while not lines and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    return lines


def test_the_watch_lets_the_living_work():
    box, lines = Box(), []
    watches = [watched(box, index, lines) for index in range(2)]
    time.sleep(watching.SILENT * 0.02 * 2)
    assert lines == []
    for watch in watches:
        watch.stop()


def test_a_process_without_a_sign_is_named():
    box, lines = Box(), []
    watched(box, 0, lines)
    dead = watched(box, 1, [])
    time.sleep(0.1)
    assert lines == []
    dead.stop()
    assert len(until(lines)) == 1
    assert lines[0].startswith("process 1 (host b) has ended or is out of reach")
    assert "process 0 (host a) ends too" in lines[0]


def test_why_another_has_failed():
    box, lines = Box(), []
    watched(box, 0, lines)
    watched(box, 1, []).fail("no room on the disk")
    assert until(lines)[0].startswith("process 1 (host b) failed: no room on the disk; process 0")


@pytest.mark.parametrize("how", ["closed", "broken"])
def test_a_store_that_is_gone_is_process_0(how):
    box, lines = Box(), []
    if how == "closed":  # and its calls hang, as JAX's do while it aborts
        box.read = lambda directory: time.sleep(0.5) or {}
    watched(box, 1, lines)
    setattr(box, how, True)
    assert len(until(lines)) == 1
    assert lines[0].startswith("process 0 (host a) has ended or is out of reach; process 1")
