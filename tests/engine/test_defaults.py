"""What `ares up` reads from the flags of its instances."""

import pytest

from ares.engine.defaults import given_names


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ([], []),
        (["--max-model-len", "4096"], []),
        (["--served-model-name", "a"], ["a"]),
        (["--served-model-name=a", "--port", "1"], ["a"]),
        (["--speed", "4", "--served-model-name", "a", "b", "--enforce-eager"], ["a", "b"]),
        (["--served_model_name", "a", "--served-model-name", "b"], ["b"]),
        (["--served-model-name"], []),
    ],
)
def test_the_names_of_the_model(flags: list[str], names: list[str]) -> None:
    assert given_names(flags) == names
