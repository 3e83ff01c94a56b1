import importlib
import sys

import pytest

from ares.extras import MissingPackageError


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ares.ray.app", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingPackageError, match=r"^ray is missing: .*'\.\[ray\]'"):
        importlib.import_module("ares.ray.app")
