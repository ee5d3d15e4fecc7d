"""For which of its users a company's backend asks: a claim that it signs with its key's secret.

A JWT (RFC 7519, HS256) in the header ``X-Kilotune-User``::

    {"sub": "ann", "aud": "the key's namespace", "exp": 1796000000}

``exp`` is required, and at most a day ahead. What a body says of a user is noted in the log, and decides nothing.
"""

from __future__ import annotations

import dataclasses
import time

import jwt

from ...errors import ConfigError
from ..learning.users import check_user
from .http_errors import ApiError
from .keys import Key

__all__ = ["HEADER", "claimed"]

HEADER = b"x-kilotune-user"
LONGEST = 4096  # characters of a claim
AHEAD = 86_400.0  # seconds that a claim may be good for
LEEWAY = 30.0  # seconds that clocks may be apart


def claimed(caller: Key, claim: str) -> Key:
    """A key, as that of the user whom a claim names.

    Raises:
        ApiError: 401, with what is wrong with the claim.

    """
    if caller.signs is None:
        raise _refused("this key checks no claims; kilotune keys add --signs makes one that does")
    if len(claim) > LONGEST:
        raise _refused(f"is longer than {LONGEST} characters")
    try:
        found = jwt.decode(
            claim,
            caller.signs,
            algorithms=["HS256"],
            audience=caller.namespace,
            leeway=LEEWAY,
            options={"require": ["sub", "exp", "aud"]},
        )
        if not float(found["exp"]) <= time.time() + AHEAD + LEEWAY:
            raise _refused("exp: is more than a day ahead; sign one for each session or request")
        user = check_user(found["sub"])
    except jwt.ExpiredSignatureError:
        raise _refused("has expired; sign a new one") from None
    except jwt.InvalidAudienceError:
        raise _refused(f"aud: is not this key's namespace, {caller.namespace!r}") from None
    except jwt.InvalidSignatureError:
        raise _refused("is not signed with this key's secret") from None
    except ConfigError as error:
        raise _refused(f"sub: {error}") from None
    except (jwt.PyJWTError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise _refused(f"is no JWT by HS256 with sub, aud and exp: {str(error)[:200]}") from None
    return dataclasses.replace(caller, user=user)


def _refused(why: str) -> ApiError:
    return ApiError(401, f"X-Kilotune-User: {why}", code="invalid_user_claim")
