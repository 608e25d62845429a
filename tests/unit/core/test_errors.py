# SPDX-License-Identifier: Apache-2.0
import pytest

from keelwright.core import errors


def test_text_names_expected_found_and_fix():
    error = errors.ModelMismatchError("They differ.", expected="27 tensors", found="29", fix="pass the adapter")
    assert str(error) == "They differ.\n  expected: 27 tensors\n  found:    29\n  fix:      pass the adapter"


def test_text_leaves_out_what_was_not_given():
    assert str(errors.DataError("No rows.", fix="add one")) == "No rows.\n  fix:      add one"


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (("ConfigError", "DataError", "ModelMismatchError", "UnsafeInputError", "NumericalError"), 2),
        (("MissingError", "OfflineError", "StorageError", "ResourceError"), 3),
        (("GateFailed",), 4),
    ],
)
def test_exit_codes_follow_the_tree(names, code):
    for name in names:
        kind = getattr(errors, name)
        assert issubclass(kind, errors.KeelwrightError)
        assert kind.exit_code == code
        assert name in errors.__doc__
