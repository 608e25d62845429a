# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest


@pytest.mark.parametrize("verb", ["heal", "repair"])
@pytest.mark.parametrize("first", ["pass", "import keelwright.heal.config, keelwright.repair.linear"])
def test_room_and_verb_share_their_name_whatever_is_imported_first(verb, first):
    code = (
        f"{first}; import keelwright as kw; assert callable(kw.{verb}); "
        "import keelwright.heal.search as search; search.RESOLUTION"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_calling_the_room_calls_the_verb():
    import keelwright as kw
    import keelwright.heal.config
    from keelwright.core.errors import ConfigError

    with pytest.raises(ConfigError, match="did you mean 'utility'"):
        kw.heal("a", "b", out="c", utilty="d")
