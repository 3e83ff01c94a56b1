"""What PyYAML raises on wrong values is in the one list that all readers of a user's YAML catch."""

import pytest
import yaml

from ares.yaml_errors import MALFORMED


class Loader(yaml.SafeLoader):
    """PyYAML's own: vLLM imports a package that reads timestamps as text, for the whole process."""

    yaml_constructors = yaml.SafeLoader.yaml_constructors | {
        "tag:yaml.org,2002:timestamp": yaml.constructor.SafeConstructor.construct_yaml_timestamp
    }


@pytest.mark.parametrize("text", ["!!timestamp now", "!!bool now", "!!int x", "!!int ''", "[", "[" * 5000])
def test_malformed_yaml(text: str) -> None:
    with pytest.raises(MALFORMED):
        Loader(text).get_single_data()
