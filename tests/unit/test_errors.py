"""What commands refuse of their own options."""

import pytest

from vswin_dist.errors import ConfigError, at_least


def test_options_below_their_least_value_are_named() -> None:
    at_least(1, clips=1, crops=3)
    at_least(0, workers=0)
    with pytest.raises(ConfigError, match=r"^--crops=0: must be 1 or more$"):
        at_least(1, clips=4, crops=0)
