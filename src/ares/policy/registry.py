"""Policies by name: a class registers itself, and everything else finds it here."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Policy = TypeVar("Policy", bound=type[Any])


class Registry(Mapping[str, type[T]], Generic[T]):
    """Classes of one kind of policy.

    Parameters
    ----------
    kind
        What they are, for messages.
    check
        Raises ValueError or TypeError where a class cannot be one.
    """

    def __init__(self, kind: str, check: Callable[[type], None]) -> None:
        self._kind, self._check = kind, check
        self._known: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[Policy], Policy]:
        """Register the decorated class as `name`; ValueError where that is taken or is no name."""

        def registered(policy: Policy) -> Policy:
            if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
                raise ValueError(f"{name!r} is no name for a {self._kind} policy: give letters, digits, - and _")
            if name in self._known:
                raise ValueError(f"the {self._kind} policy {name!r} is already registered: give yours another name")
            self._check(policy)
            policy.name = name
            self._known[name] = policy
            return policy

        return registered

    def find(self, name: str) -> type[T]:
        """Return the class called `name`; ValueError lists the known names."""
        if name not in self._known:
            raise ValueError(f"unknown {self._kind} {name!r}; known: {', '.join(self._known)}")
        return self._known[name]

    def forget(self, names: Iterable[str]) -> None:
        """Take names out again: of a file that failed half way."""
        for name in names:
            del self._known[name]

    def __getitem__(self, name: str) -> type[T]:
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)
