"""What stands in for the hub while PEFT's tests run: tiny models in the hub's cache, and no network.

The cache is that of huggingface_hub, so a hub id finds its stand-in by the hub's own code. Whatever is not there is
refused at once, without the waiting of a retry, and noted.
"""

from __future__ import annotations

import re
from typing import Any


class Hub:
    """The hub that cannot be reached; ``asked`` is what it was asked for."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def refuse(self, request: Any) -> None:
        """Note a request and let it fail as one that is made offline."""
        from huggingface_hub.errors import OfflineModeIsEnabled

        path = str(request.url.path)
        found = re.match(r"/(?:api/)?(?:models/|datasets/)?([\w.-]+/[\w.-]+)", path)
        self.asked.add(found[1] if found else path)
        raise OfflineModeIsEnabled(f"{path}: PEFT's tests run without the hub")

    def close(self) -> None:
        """From here on nothing asks the network, in this process."""
        import huggingface_hub
        from huggingface_hub.utils._http import default_client_factory

        def closed() -> Any:
            client = default_client_factory()
            client.event_hooks = {**client.event_hooks, "request": [self.refuse]}
            return client

        huggingface_hub.set_client_factory(closed)
