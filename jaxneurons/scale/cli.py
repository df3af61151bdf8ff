"""The command line of planning: `plan`."""

import json
from typing import Annotated, Any

import typer

from jaxneurons.scale.programs import Work, check_job
from jaxneurons.terminal.console import console, errors
from jaxneurons.terminal.options import settings_options


@settings_options(Work, parameter="work")
def plan(
    model: Annotated[
        str,
        typer.Option(help="1B, 7B, 8B, 13B, 70B, a config.json, a directory, a .gguf or a hub id."),
    ],
    *,
    job: Annotated[
        str, typer.Option(help="locate, evaluate, responses, relspec, edit or sweep.")
    ] = "locate",
    target: Annotated[
        str, typer.Option(help="here, cpu:8, h100:8, h200:8, v5e:16x16, v5p:4x4x4, v6e:8x8, ...")
    ] = "here",
    work: Work,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the parameters; default: float32 on a CPU, else bfloat16."),
    ] = None,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the real programs for the target too (TPUs: extra tpu-plan), and show "
            "the compiler's own analysis. Minutes.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Whether a job fits on a machine or pod, how it would run, and how long. Loads no weight."""
    from jaxneurons.scale.ahead_of_time import compile_plan
    from jaxneurons.scale.planning import plan as make_plan
    from jaxneurons.scale.views import show_plan

    made = make_plan(model, job=check_job(job), target=target, work=work, dtype=dtype)
    compiled = []
    if compile:
        with errors.busy(f"Compiling for {target} ..."):
            compiled = list(compile_plan(made, model))
    if not as_json:
        show_plan(made, compiled)
        return
    values: dict[str, Any] = made.as_dict()
    if compile:
        values["compiled"] = [{**vars(each), "peak": each.peak} for each in compiled]
    console.out(json.dumps(values, indent=2), highlight=False)
