"""The command line of what edits did: `edit evaluate`, `sequential`, `layers` and `trace`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxneurons.edit.arguments import (
    Limit,
    Model,
    Requests,
    collect,
    numbers,
    read,
    read_facts,
)
from jaxneurons.edit.cases import MeasureSettings
from jaxneurons.edit.method import Settings
from jaxneurons.edit.method_names import METHODS, SEQUENTIAL, SINGLE
from jaxneurons.errors import ConfigError, near_matches
from jaxneurons.terminal.console import console, counting, load_and_say, warn
from jaxneurons.terminal.options import IgnoreKeys, names_of, on_mesh, settings_options

if TYPE_CHECKING:
    from jaxneurons.checkpoints.loading import LM
    from jaxneurons.edit.requests import EditRequest

Out = Annotated[Path, typer.Option(help="Run directory; a stopped run is taken up again.")]
Seed = Annotated[int, typer.Option(min=0, help="Of controls, samples and resamples.")]
Layer = Annotated[int | None, typer.Option(min=0, help="For methods that edit one layer.")]
Span = Annotated[
    str | None, typer.Option(help="For methods that edit several layers: 4-8 or 4,5,6.")
]
Prefixes = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Texts of the model's own that values are optimised after, beside the prompt alone; "
        "default: 10. Fewer are faster.",
    ),
]


def add_commands(app: typer.Typer) -> None:
    """Add `evaluate`, `sequential`, `layers` and `trace`."""
    fields = [field.name for field in dataclasses.fields(MeasureSettings) if field.name != "batch"]
    measured = settings_options(MeasureSettings, only=fields, parameter="measures")
    app.command("evaluate")(measured(evaluate_command))
    app.command("sequential")(measured(sequential_command))
    app.command("layers")(layers_command)
    app.command("trace")(trace_command)


@on_mesh
def evaluate_command(
    model: Model,
    requests: Requests,
    out: Out,
    *,
    methods: Annotated[
        str, typer.Option(help=f"Methods with commas between: {', '.join(METHODS)}; or all.")
    ] = "all",
    limit: Limit = None,
    layer: Layer = None,
    span: Span = None,
    prefixes: Prefixes = None,
    seed: Seed = 0,
    measures: MeasureSettings,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Edit each request by each method, on the untouched model, and measure what that did.

    Every method stands beside a control: changes of the same size in random directions, or random
    neurons of the same layers.
    """
    from jaxneurons.edit.evaluation import FORMAT, evaluate, request_identity
    from jaxneurons.edit.evaluation_views import show_evaluation, show_left_out

    names = chosen(methods, list(METHODS), every=SINGLE)
    of_file = read(requests, limit)
    known = {**request_identity(of_file, measures), "seed": seed, "format": FORMAT}
    lm = _loaded(model, out, ignore_key, known)
    settings = _settings(lm, of_file, names, layer, span, prefixes, out)
    covariance = collect(lm, settings.values(), out=_beside(out, "covariance"))
    with counting("Editing", "edits") as progress:
        tables = evaluate(
            lm,
            of_file,
            settings,
            covariance=covariance,
            measures=measures,
            seed=seed,
            out=out,
            progress=progress,
        )
    show_evaluation(tables.rows("summary"), tables.rows("differences"))
    show_left_out(tables.facts)
    _say_written(out)


@on_mesh
def sequential_command(
    model: Model,
    requests: Requests,
    out: Out,
    *,
    methods: Annotated[str, typer.Option(help="Methods with commas between, or all.")] = (
        ",".join(SEQUENTIAL)
    ),
    sizes: Annotated[str, typer.Option(help="Edits after which the model is measured.")] = (
        "1,10,100,1000"
    ),
    batch: Annotated[int, typer.Option(min=1, help="Requests that are edited together.")] = 1,
    sample: Annotated[int, typer.Option(min=1, help="Of all edits, measured at each size.")] = 50,
    limit: Limit = None,
    layer: Layer = None,
    span: Span = None,
    prefixes: Prefixes = None,
    seed: Seed = 0,
    measures: MeasureSettings,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Edit one model request after request, and measure it after 1, 10, 100, ... edits."""
    from jaxneurons.edit.evaluation import request_identity
    from jaxneurons.edit.evaluation_views import said_left_out, show_left_out, show_sequential
    from jaxneurons.edit.sequential import FORMAT, KIND, evaluate_sequential, fitting_sizes

    names, stops = chosen(methods, list(METHODS)), numbers(sizes)
    of_file = read(requests, limit)
    _, beyond = fitting_sizes(stops, len(of_file))
    if beyond:
        warn(said_left_out(beyond))
    known = {"batch": batch, "sample": sample, "seed": seed, "format": FORMAT, "kind": KIND}
    lm = _loaded(model, out, ignore_key, {**request_identity(of_file, measures), **known})
    settings = _settings(lm, of_file, names, layer, span, prefixes, out)
    covariance = collect(lm, settings.values(), out=_beside(out, "covariance"))
    with counting("Editing", "edits") as progress:
        tables = evaluate_sequential(
            lm,
            of_file,
            settings,
            sizes=stops,
            batch=batch,
            sample=sample,
            covariance=covariance,
            measures=measures,
            seed=seed,
            out=out,
            progress=progress,
        )
    show_sequential(tables.rows("sequential"))
    show_left_out(tables.facts)
    _say_written(out)


@on_mesh
def layers_command(
    model: Model,
    requests: Requests,
    out: Out,
    *,
    method: Annotated[str, typer.Option(help="A method that edits layers.")] = "rome",
    candidates: Annotated[
        str | None,
        typer.Option(help="Layers or spans with commas between: 3,5,8 or 3-5,4-8; default: ten."),
    ] = None,
    limit: Limit = 10,
    seed: Seed = 0,
    ignore_key: IgnoreKeys = None,
) -> None:
    """On a few requests, which layers' edit serves best?"""
    from jaxneurons.edit.evaluation_views import show_layers
    from jaxneurons.edit.layer_scores import name_of
    from jaxneurons.edit.layers import (
        choose_layers,
        default_candidates,
        known_identity,
        with_layers,
    )

    (name,) = chosen(method, [n for n in METHODS if n not in ("learn", "surgery")], most=1)
    of_file = read(requests, limit)
    settings: Any = METHODS[name]
    lm = _loaded(model, out, ignore_key, known_identity(of_file, settings))
    spans = (
        default_candidates(settings, lm.config)
        if candidates is None
        else [numbers(part) for part in names_of(candidates)]
    )
    needed = [with_layers(settings, span) for span in spans]
    covariance = collect(lm, needed, out=_beside(out, "covariance"))
    with counting("Editing", "edits") as progress:
        choice = choose_layers(
            lm,
            of_file,
            settings,
            candidates=spans,
            covariance=covariance,
            seed=seed,
            out=out,
            progress=progress,
        )
    show_layers(
        choice.tables.rows("layers"),
        type(choice.settings).__name__,
        name_of(choice.layers),
        requests=len(of_file),
    )
    _say_written(out)


@on_mesh
def trace_command(
    model: Model,
    facts: Annotated[
        str,
        typer.Option(
            help="Facts: JSON of known_id, subject, attribute, prompt; any file of requests that "
            "edit evaluate reads (their old answers are traced); or 'lab'."
        ),
    ],
    out: Out,
    *,
    limit: Annotated[int, typer.Option(min=1, help="Only the first so many facts.")] = 100,
    noise: Annotated[float, typer.Option(help="In standard deviations of subjects.")] = 3.0,
    samples: Annotated[int, typer.Option(min=1, help="Of the noise, for each fact.")] = 10,
    seed: Seed = 0,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Causal tracing: which layer and token, restored, bring a noised subject's answer back?"""
    from jaxneurons.edit.evaluation_views import show_trace
    from jaxneurons.edit.tracing import known_identity, trace

    known = read_facts(facts, limit)
    lm = _loaded(model, out, ignore_key, known_identity(known))
    with counting("Tracing", "facts") as progress:
        tables = trace(
            lm, known, noise=noise, samples=samples, seed=seed, out=out, progress=progress
        )
    show_trace(tables.rows("summary"), tables.rows("facts"))
    _say_written(out)


def chosen(
    text: str, known: Sequence[str], *, every: Sequence[str] = (), most: int | None = None
) -> list[str]:
    """Names of methods with commas between, or "all" for `every` (default: all that are known).

    Raises:
      ConfigError: a name that is not known, none, or too many.
    """
    every = every or known
    names = list(every) if text.strip() == "all" else list(dict.fromkeys(names_of(text)))
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown method {name!r}; {near_matches(name, known)}")
    if not names or (most is not None and len(names) > most):
        raise ConfigError(f"{text!r}: give {'a method' if most == 1 else 'some methods'}")
    return names


def _loaded(model: str, out: Path, ignore_keys: list[str] | None, known: Mapping[str, Any]) -> "LM":
    """The model; before it, and before anything else that is slow, the run directory is checked.

    Args:
      model: its source.
      out: the run directory.
      ignore_keys: of the model's configuration.
      known: what is known of the run's identity.
    """
    from jaxneurons.plots.figures import check_places
    from jaxneurons.storage.store import RunDirectory, check_writable

    RunDirectory.check(out, known)
    check_places(out, "tables", "figures")
    check_writable(out)
    lm = load_and_say(model, ignore_keys=ignore_keys)
    RunDirectory.check(out, {**lm.identity(), **known})
    return lm


def _settings(
    lm: "LM",
    requests: Sequence["EditRequest"],
    names: Sequence[str],
    layer: int | None,
    span: str | None,
    prefixes: int | None,
    out: Path,
) -> dict[str, Settings]:
    from jaxneurons.edit.method_names import named_methods

    with counting("Locating neurons", "requests") as progress:
        return named_methods(
            lm,
            requests,
            names,
            layer=layer,
            layers=None if span is None else numbers(span),
            prefixes=prefixes,
            out=_beside(out, "neurons"),
            progress=progress,
        )


def _beside(out: Path, what: str) -> Path:
    """Where covariances and located neurons are kept, since other runs may use them."""
    return out.with_name(f"{out.name}-{what}")


def _say_written(out: Path) -> None:
    console.print(
        f"Written: {out / 'tables'} (CSV, Parquet) and {out / 'figures'} (PNG)", soft_wrap=True
    )
