"""Errors of parsers: vLLM's parsers read what a model wrote, and raise anything."""

import contextlib
import logging
from collections.abc import Iterator

from ares.gateway.openai.parsing import ParserFailedError

logger = logging.getLogger(__name__)

# Kinds of errors that are logged with their traceback; all others end the requests just as well.
_LOGGED_KINDS = 100


class Failures:
    """Turns what a parser raises into a `ParserFailedError`, and logs each kind once.

    Parameters
    ----------
    parsers
        Names of the parsers, for messages.
    """

    def __init__(self, parsers: str) -> None:
        self._parsers = parsers
        self._logged: set[tuple[str, str, int]] = set()

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Run a parser.

        Raises
        ------
        ParserFailedError
            It raised something.
        """
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a panic of Rust, as in openai_harmony, is no Exception
            message = f"the parser {self._parsers} failed on the model's output: {type(error).__name__}: {error}"
            self._log(message, error)
            raise ParserFailedError(message) from error

    def _log(self, message: str, error: BaseException) -> None:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = (place.tb_frame.f_code.co_filename, place.tb_lineno) if place is not None else ("", 0)
        kind = (type(error).__name__, *where)
        if kind not in self._logged and len(self._logged) < _LOGGED_KINDS:
            self._logged.add(kind)
            logger.error("%s; further ones of this kind are not logged", message, exc_info=error)
