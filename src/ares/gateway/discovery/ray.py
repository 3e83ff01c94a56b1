"""Instances of an application of Ray Serve (ares/ray), by its directory."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from ares.gateway.discovery.base import SourceError, checked
from ares.gateway.tuning import DEFAULT, Tuning


class RaySource:
    """The instances that an application's Directory knows.

    Parameters
    ----------
    name
        The setting that it is made from.
    application
        Name of the application.
    tuning
        The gateway's times and limits.
    """

    def __init__(self, name: str, application: str, tuning: Tuning = DEFAULT) -> None:
        self.name = name
        self._application = application
        self._tuning = tuning
        self._known: list[str] = []
        self._directory: Any = None

    async def states(self) -> AsyncGenerator[list[str]]:
        """Yield all URLs now, and when they have changed; SourceError where the directory does not answer."""
        told = None
        while True:
            urls, complete = await self._ask()
            # A directory that has just been started again has not heard of all of them yet.
            self._known = checked(urls if complete else [*self._known, *urls])
            if self._known != told:
                told = self._known
                yield told
            await asyncio.sleep(self._tuning.ray_period_s)

    async def _ask(self) -> tuple[list[str], bool]:
        import ray
        from ray import serve

        try:
            async with asyncio.timeout(self._tuning.ray_answer_s):
                if not ray.is_initialized():  # a gateway outside of the application
                    await asyncio.to_thread(ray.init, "auto", log_to_driver=False, configure_logging=False)
                if self._directory is None:
                    self._directory = serve.get_deployment_handle("Directory", self._application)
                urls, complete = await self._directory.urls.remote()
                return urls, complete
        except TimeoutError:
            raise SourceError(f"its directory has not answered for {self._tuning.ray_answer_s:g} s") from None
        except Exception as error:  # Ray has no common one
            raise SourceError(f"its directory cannot be asked ({type(error).__name__}: {error})") from None
