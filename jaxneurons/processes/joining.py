"""Joining the processes of a job: once, before anything is computed."""

import atexit
import contextlib
import dataclasses
import itertools
import platform
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import jax

from jaxneurons.errors import ConfigError, DataError
from jaxneurons.processes.channel import Coordination, initialise, place
from jaxneurons.processes.team import Processes, current, meet, working_with
from jaxneurons.processes.watching import Watch, delay_abort, end_process, leave
from jaxneurons.storage.settings import check_fields, check_number

TIMEOUT = 300.0
"""Seconds that the processes of a job may take to start."""
_HEARTBEAT, _SHUTDOWN = 120, 60
"""Seconds of JAX's own: longer than `Watch` takes, whose message says more."""
PACKAGES = ("jaxneurons", "jax", "jaxlib", "flax", "transformers", "tokenizers", "numpy")


_SESSIONS = itertools.count()
"""A key of the store is never used twice."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Which processes there are. What is left out JAX takes from SLURM, a TPU pod or Open MPI.

    Attributes:
      coordinator: HOST:PORT of process 0, at which the others find it.
      processes: how many.
      process: number of this one, from 0.
      timeout: seconds in which all must have joined.
      local_disks: each process writes to a disk of its own: `merge` joins what they wrote.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    timeout: float = TIMEOUT
    local_disks: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        given = {
            "coordinator": self.coordinator,
            "processes": self.processes,
            "process": self.process,
        }
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < 3:
            names = " and ".join(f"--{name}" for name in missing)
            raise ConfigError(f"coordinator, processes and process go together: give {names} too")
        if not 0 < self.timeout < float("inf"):
            raise ConfigError(f"timeout must be some seconds, got {self.timeout!r}")
        if self.coordinator is None or self.processes is None or self.process is None:
            return
        check_number("processes", self.processes, least=1)
        check_number("process", self.process, least=0)
        if self.process >= self.processes:
            raise ConfigError(
                f"process {self.process} of {self.processes}: processes are numbered from 0 to "
                f"{self.processes - 1}"
            )
        if not re.fullmatch(r".+:\d{1,5}", self.coordinator):
            raise ConfigError(
                f"coordinator {self.coordinator!r}: give the host of process 0 and a free port "
                "there, as in 10.0.0.1:1234"
            )


@contextlib.contextmanager
def join(
    coordinator: str | None = None,
    *,
    processes: int | None = None,
    process: int | None = None,
    timeout: float = TIMEOUT,
    local_disks: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Iterator[Processes]:
    """Work together with the other processes of a job, as long as the context lasts.

    Everything that keeps parts in a directory then shares them out, and process 0 alone writes the
    rest. When a process ends early the others end too, within 60 seconds, with a line that names
    it. Where `jax.distributed.initialize` has been called already, its processes are taken.

    Args:
      coordinator: HOST:PORT of process 0; with `processes` and `process`, or none of the three:
        SLURM, TPU pods and Open MPI are known to JAX.
      processes: how many.
      process: number of this one, from 0.
      timeout: seconds in which all must have joined.
      local_disks: results are written to a disk of each process: see `merge_runs`.
      settings: what else must be the same in all processes.

    Raises:
      ConfigError: arguments of the wrong kind, or no environment that JAX knows.
      DataError: other versions of packages, or other settings, in another process.
    """
    job = Job(coordinator, processes, process, timeout, local_disks)
    if current().count > 1:
        raise ConfigError("this process has joined others already; join once")
    ours = not jax.distributed.is_initialized()
    with working_with(_joined(job)) as team:
        atexit.register(_end, team)
        try:
            team.compare("versions", _versions())
            team.compare("settings", {"local disks": local_disks, **(settings or {})})
            yield team
        except SystemExit as stop:
            if stop.code:
                team.fail(f"it ended with code {stop.code}")
                raise
        except BaseException as error:
            team.fail(_reason(error))
            raise
        team.leave()
        if ours:
            jax.distributed.shutdown()


def _end(team: Processes) -> None:
    """At the end of Python: whoever has not left would wait in JAX for the others, and abort."""
    if not team.has_left:
        team.fail("it ended early")
        leave(1)


def _reason(error: BaseException) -> str:
    """What to tell the other processes of an error."""
    if isinstance(error, KeyboardInterrupt):
        return "it was stopped"
    text = " ".join(str(error).split())
    return text if isinstance(error, DataError | ConfigError) else f"{type(error).__name__}: {text}"


def _versions() -> dict[str, str]:
    """What numbers may depend on."""
    return {
        **{name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
    }


def _joined(job: Job) -> Processes:
    delay_abort()
    late = threading.Timer(job.timeout, _end_late, [job])
    late.daemon = True
    late.start()
    try:
        if not jax.distributed.is_initialized():
            _initialise(job)
        index, count = place()
        channel = Coordination(f"jaxneurons/{next(_SESSIONS)}")
        hosts = meet(channel, index, count, socket.gethostname())
    finally:
        late.cancel()
    watch = Watch(channel, index, hosts)
    watch.start()
    return Processes(channel, index, hosts, local_disks=job.local_disks, watch=watch)


def _initialise(job: Job) -> None:
    try:
        initialise(
            coordinator_address=job.coordinator,
            num_processes=job.processes,
            process_id=job.process,
            # The devices of a host are shared out only where JAX knows the environment.
            cluster_detection_method=None if job.coordinator is None else "deactivate",
            initialization_timeout=int(job.timeout) + 60,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_SHUTDOWN,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"JAX finds no environment of several processes ({error}); give --coordinator "
            "HOST:PORT, --processes N and --process I"
        ) from None
    except RuntimeError as error:
        where = job.coordinator or "the coordinator of the environment"
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"processes cannot be joined at {where}: {reason}") from None


def _end_late(job: Job) -> None:
    of = "" if job.processes is None else f" of {job.processes}"
    this = "" if job.process is None else f"process {job.process}{of}, "
    where = f" at {job.coordinator}" if job.coordinator else ""
    end_process(
        f"not all processes have joined{where} within {job.timeout:g} s ({this}host "
        f"{socket.gethostname()}, waited): start every process with the same coordinator and "
        "number of processes, each with its own number, where that address can be reached; or give "
        "them longer with --timeout"
    )
