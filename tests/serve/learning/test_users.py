"""Who can be a user: whoever can be a part of a model's name."""

from __future__ import annotations

import pytest

from kilotune.errors import ConfigError
from kilotune.serve.learning.users import check_user, model_of


@pytest.mark.parametrize("user", ["", " ann", "a/b", "a\x00", "\ud800", "x" * 300, "e\u0301", "a\u202eb"])
def test_what_cannot_name_a_model_is_no_user(user: str) -> None:
    with pytest.raises(ConfigError, match="user"):
        check_user(user)
    assert check_user("ann@example.com") == "ann@example.com"
    assert model_of("ann") == "personal:ann"
