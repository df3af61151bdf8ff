"""What the commands of one system use of another's, which they never import.

The top of the command line puts these together (`provide`) before a command runs.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import NamedTuple


class Services(NamedTuple):
    """The functions that are passed down.

    Attributes:
      write_neurons: of a model, a set of neurons, a factor, a path and `facts`, which say where
        the neurons come from: writes a patch that multiplies them.
    """

    write_neurons: Callable[..., None]


_PROVIDED: ContextVar[Services] = ContextVar("services")


def provide(services: Services) -> None:
    """Pass functions down to the command that runs next."""
    _PROVIDED.set(services)


def services() -> Services:
    """Those of the command that is running, which was started through `jaxneurons.cli`."""
    return _PROVIDED.get()
