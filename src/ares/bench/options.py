"""Options that several benchmarks and checks share."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="Hugging Face id or folder of the model.")]
Port = Annotated[int, typer.Option(help="Port of the endpoint.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result here.")]
Simulate = Annotated[str | None, typer.Option(metavar="PROFILE", help="Use mock engines of this profile.")]
DecodeInstances = Annotated[int, typer.Option("--decode", min=2, help="Decode instances, with one prefill instance.")]
Dtype = Annotated[
    str, typer.Option(help="float32 makes sums independent of the batch, so that tokens must be the same.")
]
