"""Short texts that processes leave for each other: the key-value store of JAX's coordination.

It needs no device and no collective, so that processes can talk while their devices work. JAX has
no public name for it; this file is the only one that knows where it is.
"""

import inspect
import socket
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Channel(Protocol):
    """A store of texts by key that all processes see."""

    def set(self, key: str, value: str) -> None:
        """Leave a text; one that is there is replaced."""
        ...

    def read(self, directory: str) -> dict[str, str]:
        """The texts below `directory/`, by the last part of their key."""
        ...

    def delete(self, key: str) -> None:
        """Take a text away, or all below a key."""
        ...

    def is_closed(self) -> bool:
        """Whether the host of the store says that nobody keeps it any more."""
        ...


class Coordination:
    """The store of `jax.distributed`, which must be initialised.

    Args:
      prefix: of all keys.
    """

    def __init__(self, prefix: str) -> None:
        from jax._src import distributed  # as Orbax takes it

        client: Any = distributed.global_state.client
        assert client is not None
        self._client, self._prefix = client, prefix
        host, _, port = str(distributed.global_state.coordinator_address).rpartition(":")
        self._address = host.strip("[]"), int(port)

    def set(self, key: str, value: str) -> None:
        """Leave a text; one that is there is replaced."""
        self._client.key_value_set(f"{self._prefix}/{key}", value, allow_overwrite=True)

    def read(self, directory: str) -> dict[str, str]:
        """The texts below `directory/`, by the last part of their key."""
        entries = self._client.key_value_dir_get(f"{self._prefix}/{directory}/")
        return {key.rpartition("/")[2]: value for key, value in entries}

    def delete(self, key: str) -> None:
        """Take a text away, or all below a key."""
        self._client.key_value_delete(f"{self._prefix}/{key}")

    def is_closed(self) -> bool:
        """Whether the host of the store says that nobody keeps it any more.

        Asked beside the client, whose calls hang while it aborts.
        """
        try:
            socket.create_connection(self._address, timeout=1).close()
        except ConnectionRefusedError:
            return True
        except OSError:  # no answer: it may be busy
            return False
        return False


def initialise(**options: Any) -> None:
    """`jax.distributed.initialize` with those of the options that this JAX knows, None left out."""
    import jax

    known = inspect.signature(jax.distributed.initialize).parameters
    given = {name: value for name, value in options.items() if value is not None and name in known}
    jax.distributed.initialize(**given)


def place() -> tuple[int, int]:
    """Number of this process, and of all, as the coordination has them: no backend is started."""
    from jax._src import distributed

    return distributed.global_state.process_id, distributed.global_state.num_processes
