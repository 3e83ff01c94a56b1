"""Options that several `ares simulate` commands share."""

from pathlib import Path
from typing import Annotated

import typer

from ares.policy import ADMISSIONS, DISPATCHERS, PRESETS, REBALANCERS
from ares.simulator.error_models import ERROR_MODELS
from ares.simulator.profile import profile_names
from ares.traces import FORMATS, TIME_UNITS, WORKLOADS

Trace = Annotated[
    str,
    typer.Option(
        help=f"A built-in workload ({', '.join(WORKLOADS)}) or a trace file: plain, gzip, bzip2, xz or a pipe.",
        show_default=True,
    ),
]
Format = Annotated[
    str | None, typer.Option("--format", help=f"Format of the file: {', '.join(FORMATS)}; guessed by default.")
]
TimeUnit = Annotated[
    str | None, typer.Option(help=f"Unit of the file's times: {', '.join(TIME_UNITS)}; by default the format's.")
]
Requests = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="How many requests (built-in workloads: 2000 by default); a file with fewer is repeated.",
    ),
]
PrefixCaching = Annotated[
    bool,
    typer.Option(
        "--prefix-caching", help="Instances keep the blocks of prompts, which the trace must name (mooncake, bailian)."
    ),
]
Prefill = Annotated[int, typer.Option(min=0, help="Prefill instances; with 0 the decode instances prefill.")]
Decode = Annotated[int, typer.Option(min=1, help="Decode instances.")]
ProfileName = Annotated[
    str, typer.Option("--profile", help=f"Profile of the engines: {', '.join(profile_names())}, or a JSON file.")
]
PrefillProfile = Annotated[str | None, typer.Option(help="Profile of the prefill instances, if it is a different one.")]
Presets = Annotated[
    list[str] | None,
    typer.Option(
        "--preset", help=f"Preset; may be repeated: {', '.join(PRESETS)}, or a YAML file (docs/write-a-policy.md)."
    ),
]
Predictor = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(ERROR_MODELS)}; a JSON file with start, end and tokens, or of `ares predictor evaluate`."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the synthetic workload and of the predictor's errors.")]
Period = Annotated[float, typer.Option(min=0.001, help="Seconds between two decisions of the rebalancer.")]
SloTtft = Annotated[float, typer.Option(min=0, help="TTFT objective, seconds.")]
SloTpot = Annotated[float, typer.Option(min=0, help="TPOT objective, seconds.")]
Classes = Annotated[
    Path | None,
    typer.Option(help="YAML file of classes of service and their shares of the requests (docs/simulator.md)."),
]
Out = Annotated[Path | None, typer.Option("--json", help="Write the result here ('-': standard output).")]
Dispatch = Annotated[
    str | None,
    typer.Option(help=f"Replace the preset's dispatch: {', '.join(DISPATCHERS)}, or that of --policy."),
]
Admission = Annotated[
    str | None,
    typer.Option(help=f"Replace the preset's admission: {', '.join(ADMISSIONS)}, or that of --policy."),
]
Rebalance = Annotated[
    str | None,
    typer.Option(help=f"Replace the preset's rebalance: {', '.join(REBALANCERS)}, or that of --policy."),
]
