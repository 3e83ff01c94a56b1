"""Writes the tokens of a step: computes each next token and streams it to its client."""

from collections.abc import Callable

from ares.mock_engine import api
from ares.mock_engine.model import MASK, MULTIPLIER, SHIFT, MockModel
from ares.mock_engine.request import Request

# Called with a request that ends, its finish reason and vLLM's stop reason.
Finish = Callable[[Request, str, int | str | None], None]


class Writer:
    """Gives requests their next tokens, and streams them."""

    def __init__(self, model: MockModel, finish: Finish) -> None:
        self._model = model
        self._finish = finish
        self._digits = [b"%d" % token for token in model.ids]

    def write(self, samplers: list[Request]) -> None:
        """Give every request its next token. The work per token here bounds the tokens a second."""
        ids, digits, count = self._model.ids, self._digits, len(self._model.ids)
        for request in samplers:
            if request.state != "running":
                continue  # its client left during the step
            product = request.hash * MULTIPLIER & MASK
            output = request.output
            if len(output) + 1 >= request.check_from:
                self._write_checked(request, product)
                continue
            index = (product >> SHIFT) % count
            token = ids[index]
            request.hash = (product + token + 1) & MASK
            output.append(token)
            request.length += 1
            if not request.stream:
                continue
            if request.connection.paused or request.interval > 1:
                _delay(request)
                continue
            text = digits[index]
            request.connection.transport.write(request.heads[len(text)] + text + api.EVENT_TAIL)

    def _write_checked(self, request: Request, product: int) -> None:
        """Give a request a token that may be its last, or that carries more than its id."""
        position = len(request.output) + 1
        stopped = position >= request.natural_end
        if stopped:
            token = self._model.stop
        elif (scripted := request.scripted()) is not None:
            token = scripted
        else:
            token = self._model.ids[(product >> SHIFT) % len(self._model.ids)]
        request.hash = (product + token + 1) & MASK
        request.output.append(token)
        request.length += 1
        if stopped:
            self._finish(request, "stop", None)
        elif token in request.stop_tokens:
            self._finish(request, "stop", token)
        elif position >= request.end:
            self._finish(request, "length", None)
        elif request.stream:
            _delay(request)


def _delay(request: Request) -> None:
    """Keep the newest token until there are enough for an event, and the client reads; the first one does not wait."""
    output = request.output
    if request.sent is None:
        request.sent = len(output) - 1
    if not request.connection.paused and (len(output) == 1 or len(output) - request.sent >= request.interval):
        catch_up(request)


def catch_up(request: Request) -> None:
    """Send the tokens that were delayed, as one event; vLLM merges them too."""
    if request.sent is not None and request.state != "finished":
        delayed, request.sent = request.output[request.sent :], None
        request.connection.transport.write(api.event(request, delayed))
