"""What people see of a patch: a table of its changes, and what it says of itself."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from jaxneurons.terminal.console import NAME, console, shown_name

if TYPE_CHECKING:
    from jaxneurons.edit.patch import Patch

CHANGES, REQUESTS, VALUES = 20, 5, 8
"""Changes, requests and members of a list that are shown, at most."""
_APART = {
    "optimisation",
    "targets",
    "requests",
    "base_name",
    "base_dtype",
    "method",
    "settings",
    "covariance",
    "prefixes",
}
"""Facts that are shown otherwise, or counted."""


def show_patch(patch: "Patch") -> None:
    """Base, requests, method and facts, and a line for each change."""
    from jaxneurons.edit.patch_file import contents

    table = Table(box=None, show_header=False, title=patch.name, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    facts = patch.facts
    model = f"{facts.get('base_name', 'a model')} ({facts.get('base_dtype', 'float32')})"
    table.add_row("base", f"{model}, parameters {patch.base}")
    table.add_row("reverted by", "itself" if patch.revertible else "its base")
    table.add_row("arrays", f"{len(contents(patch)[1])}, {patch.nbytes / 2**20:.2f} MiB")
    settings = facts.get("settings")
    apart = _APART | (settings.keys() & {"neurons"} if isinstance(settings, dict) else set())
    for name in sorted(facts.keys() - apart):
        table.add_row(name, _short(facts[name]))
    for name, value in _settings(settings):
        table.add_row(name, value)
    if isinstance(prefixes := facts.get("prefixes"), list):
        table.add_row("prefixes", f"{len(prefixes)}")
    for value in _covariances(facts.get("covariance")):
        table.add_row("covariance", value)
    optimisation = facts.get("optimisation")
    if isinstance(optimisation, dict) and isinstance(optimisation.get("reached"), list):
        reached = optimisation["reached"]
        table.add_row("below stop loss", f"{sum(map(bool, reached))} of {len(reached)}")
    for line in _requests(facts):
        table.add_row("request", line)
    console.print(table)
    console.print(_changes(patch))
    if len(patch.changes) > CHANGES:
        console.print(f"... and {len(patch.changes) - CHANGES} changes more.")


def _changes(patch: "Patch") -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("change", "where", "layers"):
        table.add_column(name, max_width=NAME, overflow="ellipsis", no_wrap=True)
    for name in ("rank, rows, neurons", "norm"):
        table.add_column(name, justify="right")
    for row in patch.table()[:CHANGES]:
        layers = ", ".join(map(str, row["layers"]))
        cells = (row["kind"], shown_name(row["place"]), shown_name(layers))
        table.add_row(*cells, f"{row['size']}", f"{row['norm']:.4g}")
    return table


def _requests(facts: Mapping[str, Any]) -> Iterator[str]:
    """The first requests, a line each, and how many more there are.

    Patches had `targets` before they had `requests`: id, prompt and target of each.
    """
    requests = facts.get("requests", facts.get("targets"))
    if not isinstance(requests, list) or not requests:
        return
    for request in requests[:REQUESTS]:
        if isinstance(request, dict):
            subject, prompt, target = (request.get(n, "") for n in ("subject", "prompt", "target"))
            yield f"{subject}: {prompt!r} -> {target!r}"
        elif isinstance(request, list) and len(request) == 3:
            yield f"{request[1]!r} -> {request[2]!r}"
        else:
            yield str(request)
    if len(requests) > REQUESTS:
        yield f"... and {len(requests) - REQUESTS} more"


def _settings(settings: Any, group: str = "") -> Iterator[tuple[str, str]]:
    """A row for each setting; those of a group by `group.name`."""
    for name, value in settings.items() if isinstance(settings, dict) else ():
        if name == "neurons":
            yield name, _neurons(value)
        elif isinstance(value, dict):
            yield from _settings(value, f"{group}{name}.")
        else:
            yield f"{group}{name}", "not set" if value is None else _short(value)


def _neurons(value: Any) -> str:
    """How many neurons a set, or the sets of several requests, hold."""
    sets = value if isinstance(value, list) else [value]
    sizes = [sum(map(len, one.values())) if isinstance(one, dict) else 0 for one in sets]
    return f"{sizes[0]}" if len(sizes) == 1 else f"{sum(sizes)} in {len(sizes)} sets"


def _covariances(covariance: Any) -> Iterator[str]:
    """A short line for each layer."""
    if isinstance(covariance, str):
        yield covariance
    for layer, of_layer in covariance.items() if isinstance(covariance, dict) else ():
        if not isinstance(of_layer, dict):
            yield f"{layer}: {of_layer}"
            continue
        parts = [f"layer {layer}: {of_layer.get('vectors', '?')} keys of text"]
        parts[0] += f" {of_layer.get('text', '?')!r} ({str(of_layer.get('text_sha256', '?'))[:12]})"
        for name in ("model", "tokenizer"):
            if name in of_layer:
                parts.append(f"{name} {str(of_layer[name])[:12]}")
        known = {"vectors", "text", "text_sha256", "model", "tokenizer", "dtype", "format"}
        parts += [f"{name} {_short(of_layer[name])}" for name in of_layer if name not in known]
        yield ", ".join(parts)


def _short(value: Any) -> str:
    """A fact on a line or two."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_short(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        more = f" and {len(value) - VALUES} more" if len(value) > VALUES else ""
        return ", ".join(map(_short, value[:VALUES])) + more
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
