# SPDX-License-Identifier: Apache-2.0
"""Which host an address names, and whether that is this machine: what leaves it is known before anything is sent."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def is_this_machine(host: str) -> bool:
    """Whether a host name or address is the loopback; `localhost` and names below it are."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def foreign_host(address: str) -> str | None:
    """Return the host that an address names, None where it is this machine."""
    host = urlsplit(address if "//" in address else f"//{address}").hostname or address
    return None if is_this_machine(host) else host
