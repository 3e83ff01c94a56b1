"""Policies by name: a class registers itself, and everything else finds it here."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from ares.policy.base import DecisionError, Policy
from ares.policy.settings import check_settings_type

T = TypeVar("T", bound=Policy)
Class = TypeVar("Class", bound=type[Any])


class Registry(Mapping[str, type[T]], Generic[T]):
    """Classes of one kind of policy.

    Parameters
    ----------
    base
        Their base class.
    decides
        Signature of the method that decides; a class must define it.
    optional
        Whether a class need not define it, because it is never called.
    """

    def __init__(self, base: type[T], decides: str, optional: Callable[[type[T]], bool] = lambda _: False) -> None:
        self.base = base
        self._kind, self._decides, self._optional = base.part, decides, optional
        self._known: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[Class], Class]:
        """Register the decorated class as `name`; ValueError where that is taken or not a valid name."""

        def registered(policy: Class) -> Class:
            if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
                raise ValueError(
                    f"{name!r} is not a valid name for a {self._kind} policy: use letters, digits, - and _"
                )
            if name in self._known:
                raise ValueError(f"the {self._kind} policy {name!r} is already registered: give yours another name")
            self._check(policy)
            policy.name = name
            self._known[name] = policy
            return policy

        return registered

    def _check(self, policy: type) -> None:
        base = self.base
        if not issubclass(policy, base):
            raise TypeError(f"{policy.__name__} must be a subclass of ares.policy.{base.__name__}")
        check_settings_type(policy.Settings)
        method = self._decides.partition("(")[0]
        if getattr(policy, method) is getattr(base, method) and not self._optional(policy):
            raise TypeError(f"{policy.__name__} must define {self._decides}")

    def find(self, name: str) -> type[T]:
        """Return the class called `name`; ValueError lists the known names."""
        if name not in self._known:
            raise ValueError(f"unknown {self._kind} {name!r}; known: {', '.join(self._known)}")
        return self._known[name]

    def make(self, name: str, settings: Any = None) -> T:
        """Make the policy called `name`, ready to decide.

        Raises
        ------
        ValueError
            There is none; the message lists the known names.
        DecisionError
            It cannot be made.
        """
        policy = self.find(name)
        try:
            policy.prepare()
            return policy(settings)
        except Exception as error:
            message = f"cannot be made: {type(error).__name__}: {error}"
            raise DecisionError(name, "raised", message, self._kind) from error

    def forget(self, names: Iterable[str]) -> None:
        """Remove names that a file registered before it failed."""
        for name in names:
            del self._known[name]

    def __getitem__(self, name: str) -> type[T]:
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)
