"""What reading a user's YAML, and what stands in it, can raise: one list for all readers."""

import yaml

WRONG_VALUES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What code raises on values of another kind than it expects."""
# PyYAML raises anything on a scalar that its tag does not fit, such as `!!timestamp now`, and on deep nesting.
MALFORMED = (yaml.YAMLError, *WRONG_VALUES)
