"""What the commands of one system use of another's, which they never import.

The top of the command line puts these together and passes them down as typer's context object.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

if TYPE_CHECKING:
    from jaxneurons.checkpoints.loading import LM
    from jaxneurons.neurons.sets import NeuronSet


class Services(NamedTuple):
    """The functions that are passed down.

    Attributes:
      write_neurons: writes a patch that multiplies neurons of a model by a factor.
    """

    write_neurons: "Callable[[LM, NeuronSet, float, Path], None]"


def services(context: typer.Context) -> Services:
    """Those that a command was started with.

    Raises:
      RuntimeError: a command that was not started through `jaxneurons.cli`.
    """
    given = context.find_root().obj
    if not isinstance(given, Services):
        raise RuntimeError("this command runs as a part of the command line `jaxneurons` only")
    return given
