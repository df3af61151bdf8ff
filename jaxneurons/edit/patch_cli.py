"""The command line of patches: made of neurons, applied, reverted, looked at."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxneurons.edit.arguments import Model
from jaxneurons.errors import ConfigError, DataError, near_matches
from jaxneurons.storage.printable import counted
from jaxneurons.terminal.console import console, counting_bytes, gib, load_and_say
from jaxneurons.terminal.options import IgnoreKeys, on_mesh, placement

if TYPE_CHECKING:
    from jaxneurons.checkpoints.loading import LM
    from jaxneurons.edit.patch import Patch
    from jaxneurons.neurons.sets import NeuronSet

TO = ("hf", "native", "lora")
Directory = Annotated[Path, typer.Option(help="Directory to write; must not exist.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")
]


def add_commands(app: typer.Typer) -> None:
    """Add `neurons`, `apply`, `revert` and `inspect`."""
    for name, command in (
        ("neurons", neurons_command),
        ("apply", apply_command),
        ("revert", revert_command),
        ("inspect", inspect_command),
    ):
        app.command(name)(command)


@on_mesh
def neurons_command(
    model: Model,
    neurons: Annotated[Path, typer.Option(help="CSV of site, layer, index: the neurons.")],
    out: Annotated[Path, typer.Option(help="Patch to write: safetensors.")],
    factor: Annotated[float, typer.Option(help="They are multiplied by; 0 turns them off.")] = 0.0,
    keep_base: Annotated[
        bool, typer.Option(help="Carry the base's entries, to be reverted without the base.")
    ] = True,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Multiply neurons of a list, as `qrnca` and `relspec` write it: a patch."""
    from jaxneurons.neurons.sets import read_neurons
    from jaxneurons.storage.store import check_new_file

    check_new_file(out, neurons)
    located = read_neurons(neurons)
    if not len(located):
        raise DataError(f"{neurons}: holds no neurons")
    lm = load_and_say(model, ignore_keys=ignore_key)
    write_neurons(lm, located, factor, out, keep_base=keep_base, facts={"neurons": str(neurons)})


def write_neurons(
    lm: "LM",
    neurons: "NeuronSet",
    factor: float,
    out: Path,
    *,
    keep_base: bool = True,
    facts: dict[str, Any] | None = None,
) -> None:
    """Write a patch that multiplies neurons, and show it; `facts` say where they come from."""
    from jaxneurons.edit.patch import make_patch
    from jaxneurons.edit.patch_file import write_patch
    from jaxneurons.edit.patch_views import show_patch

    patch = make_patch(lm, neurons, factor=factor, keep_base=keep_base, facts=facts)
    write_patch(patch, out)
    show_patch(patch)
    console.print(f"Written: {out} ({gib(out.stat().st_size)})", soft_wrap=True)


@on_mesh
def apply_command(
    patches: Annotated[list[Path], typer.Argument(help="Patches, in order.", show_default=False)],
    model: Model,
    out: Directory,
    to: Annotated[
        str, typer.Option(help="hf (safetensors), native (Orbax), or lora (an adapter of PEFT).")
    ] = "hf",
    dtype: Dtype = None,
    allow_conflicts: Annotated[
        bool,
        typer.Option(
            "--allow-conflicts", help="Apply patches that touch the same entries, in order."
        ),
    ] = False,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Apply patches to a model and write what comes out; the model itself stays as it is."""
    from jaxneurons.edit.adapter import write_adapter
    from jaxneurons.edit.applying import apply_patches
    from jaxneurons.edit.patch_file import read_patch

    _check_to(to, TO)
    read = [read_patch(path) for path in patches]
    lm = _load(model, out, dtype, ignore_key)
    if to == "lora":
        write_adapter(lm, read, out)
        _say_written(out, to, f"{counted(len(read), 'patch', 'patches')}, on {lm.source}")
        return
    edited = apply_patches(lm, read, allow_conflicts=allow_conflicts)
    _save(edited, out, to)
    _say_patches("Applied", read)


@on_mesh
def revert_command(
    patches: Annotated[
        list[Path], typer.Argument(help="The patches to take out.", show_default=False)
    ],
    model: Annotated[str, typer.Option(help="The edited model.")],
    out: Directory,
    base: Annotated[
        str | None,
        typer.Option(help="The model before; needed if a patch does not carry its entries."),
    ] = None,
    keep: Annotated[
        list[Path] | None,
        typer.Option(
            help="A patch of the edited model that stays, may be repeated; all that are in it are "
            "needed.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[str, typer.Option(help="hf (safetensors) or native (Orbax).")] = "hf",
    dtype: Dtype = None,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Take patches out of an edited model again, bit for bit, and write the model without them."""
    from jaxneurons.checkpoints.loading import load
    from jaxneurons.edit.patch_file import read_patch
    from jaxneurons.edit.reverting import revert

    _check_to(to, TO[:2])
    read = [read_patch(path) for path in patches]
    others = [read_patch(path) for path in keep or ()]
    lm = _load(model, out, dtype, ignore_key)
    before = None
    if base is not None:
        with counting_bytes("Reading the base") as progress:
            before = load(
                base,
                dtype=lm.dtype,
                progress=progress,
                ignore_keys=ignore_key or (),
                **placement(),
            )
    _save(revert(lm, read, base=before, others=others), out, to)
    _say_patches("Reverted", read)


def inspect_command(
    patch: Annotated[Path, typer.Argument(help="A patch.", show_default=False)],
) -> None:
    """What a patch changes, of which model, and how it was found."""
    from jaxneurons.edit.patch_file import read_patch
    from jaxneurons.edit.patch_views import show_patch

    show_patch(read_patch(patch))


def _check_to(to: str, known: tuple[str, ...]) -> None:
    if to not in known:
        raise ConfigError(f"unknown format {to!r}; {near_matches(to, known)}")


def _load(source: str, out: Path, dtype: str | None, ignore_keys: list[str] | None) -> "LM":
    """A model, once it is clear that what comes out has a place."""
    from jaxneurons.checkpoints.loading import load
    from jaxneurons.checkpoints.saving import check_free

    check_free(out)
    with counting_bytes("Reading") as progress:
        return load(
            source, dtype=dtype, progress=progress, ignore_keys=ignore_keys or (), **placement()
        )


def _save(lm: "LM", out: Path, to: str) -> None:
    from jaxneurons.checkpoints.saving import check_format, save

    with counting_bytes("Writing") as progress:
        save(lm, out, to=check_format(to), progress=progress)
    _say_written(out, to, f"{lm.dtype}, from {lm.source}")


def _say_patches(what: str, patches: "list[Patch]") -> None:
    from jaxneurons.edit.patch_file import contents

    for patch in patches:
        base = patch.facts.get("base_name", "a model")
        arrays = len(contents(patch)[1])
        console.print(
            f"{what}: {patch.name}, for {base} ({patch.base[:12]}), {arrays} arrays",
            soft_wrap=True,
        )


def _say_written(out: Path, to: str, what: str) -> None:
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    console.print(f"Written: {out} ({to}, {gib(size)}; {what})", soft_wrap=True)
