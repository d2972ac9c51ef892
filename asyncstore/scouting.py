"""In which domains a worker works: in one, or in all that there are, and in those that come up."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING, Final

from asyncstore.errors import AsyncStoreError, StoreClosed
from asyncstore.observing import HANDLER
from asyncstore.values import FIRST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from asyncstore.doorbell import Ring
    from asyncstore.feeding import Place
    from asyncstore.keys import Keys
    from asyncstore.registering import Registry
    from asyncstore.worklist import Terms

_log = logging.getLogger(__name__)

_PAUSE: Final = 1.0  # seconds after a failure


class Domains:
    """The domains of a worker; `look_at` is told where there may be something to do."""

    def __init__(
        self,
        only: str | None,
        terms: Terms,
        registry: Registry,
        keys: Keys,
        look_at: Callable[[Place], None],
    ) -> None:
        self._only = only
        self._terms = terms
        self._registry = registry
        self._keys = keys
        self._look_at = look_at
        self._known: set[str] = set()
        self._changed: set[str] = set()  # tags under which there may be new ones
        self._wake = asyncio.Event()

    @property
    def may_grow(self) -> bool:
        """Whether those that come up are ours, too, so that somebody has to scout."""
        return self._only is None

    def __contains__(self, domain: str) -> bool:
        return domain in self._known

    async def begin(self) -> None:
        """Register the handler."""
        if self._only is None:
            self._known = await self._registry.begin_everywhere(self._terms)
        else:
            await self._registry.begin(self._only, self._terms)
            self._known = {self._only}

    async def keep(self) -> None:
        """Register the handler again, if a failover has lost that."""
        await self._registry.keep(self._only, sorted(self._known), self._terms)

    async def now(self) -> list[str]:
        """Return the domains, those included that have just come up."""
        if self._only is None:
            await self._look_under(self._keys.tags())
        return sorted(self._known)

    def moved(self, tags: Iterable[str]) -> None:
        """Have what is under some tags looked at."""
        if self._only is None:
            self._changed.update(tags)
            self._wake.set()
            return
        for tag in tags:
            self._look_at((self._only, tag))

    def heard_of_another(self, ring: Ring) -> None:
        """Look for a domain that was heard of, if it is to be one of ours."""
        if self._only is None:
            self.moved(self._keys.tag_of(change.root) for change in ring.changes())

    async def scout(self) -> None:
        """Find the domains under the tags that have changed, until it is cancelled."""
        while True:
            self._wake.clear()
            tags, self._changed = self._changed, set()
            try:
                await self._look_under(sorted(tags))
            except StoreClosed:
                raise
            except AsyncStoreError as error:
                handler = self._terms.handler
                _log.warning("%s waits: %s", handler, error, extra={HANDLER: handler})
                self._changed |= tags
                await asyncio.sleep(_PAUSE * random.uniform(0.5, 1.0))  # noqa: S311
                continue
            await self._wake.wait()

    async def _look_under(self, tags: Sequence[str]) -> None:
        for tag, domains in (await self._registry.domains(tags)).items():
            for domain in domains:
                if domain not in self._known:
                    await self._registry.begin(domain, self._terms, FIRST)
                    self._known.add(domain)
                self._look_at((domain, tag))
