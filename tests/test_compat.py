"""Deprecations."""

import pytest

from pseudolabel._compat import deprecate_parameter


@deprecate_parameter("sigma", "scale", since="0.2", until="0.3")
def double(*, scale: float = 1.0) -> float:
    """Twice the scale."""
    return 2 * scale


def test_the_old_name_works_with_a_warning() -> None:
    with pytest.warns(
        DeprecationWarning, match="double: argument 'sigma' is called 'scale' since 0.2; .* in 0.3"
    ):
        assert double(sigma=3.0) == 6.0
    assert double(scale=3.0) == 6.0
    assert double() == 2.0
    assert double.__name__ == "double"


def test_both_names() -> None:
    with pytest.raises(TypeError, match="'sigma' is the old name of 'scale', got both"):
        double(sigma=1.0, scale=1.0)
