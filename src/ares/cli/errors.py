"""Errors that a user can correct end a command with one line and status 2, not a traceback."""

import typer

from ares import extras
from ares.models.cache import ModelError
from ares.protocol.keys import KeyFileError
from ares.terminal.errors import exit_with_error


def run_app(app: typer.Typer) -> None:
    """Run the command of a command line."""
    try:
        app()
    except ModuleNotFoundError as error:
        exit_with_error(str(extras.explain(error)))
    except (ModelError, KeyFileError, extras.MissingPackageError) as error:
        exit_with_error(str(error))
    except Exception as error:
        from ares.addresses import AddressError
        from ares.config import ConfigError
        from ares.engine.front_end_flags import FrontEndFlagError
        from ares.engine.given_flags import FlagFileError
        from ares.engine.refused_settings import RefusedSettingError
        from ares.engine.vllm_version import UnsupportedVllmError
        from ares.learner.errors import LearnerError
        from ares.local_cluster.cluster import ClusterError
        from ares.local_cluster.gpus import GpuError
        from ares.predictor.errors import PredictorError

        known = AddressError | ConfigError | ClusterError | GpuError | LearnerError | PredictorError
        flags = FrontEndFlagError | FlagFileError | RefusedSettingError
        if not isinstance(error, known | flags | UnsupportedVllmError):
            raise
        exit_with_error(str(error))
