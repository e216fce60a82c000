"""Access control of the page: the Host header, the Origin of the request, and a token beyond loopback.

A page on loopback is open to users of the machine, but not to other sites in their browsers: such requests have a
foreign Host (DNS rebinding) or Origin. A page that other machines can reach requires a token as well: as
`Authorization: Bearer`, as the cookie that the page sets, or once as `?token=`. Pure. Knows nothing about sockets.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Callable, Collection
from http.cookies import CookieError, SimpleCookie
from typing import NamedTuple
from urllib.parse import parse_qs

from stream_mmrnn.core.config import is_loopback
from stream_mmrnn.core.errors import ConfigError
from stream_mmrnn.core.settings import LOOPBACK

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
_AUTHORITY = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d{1,5})?")

Headers = Callable[[str], list[str]]
"""All values of a header, by its name."""


class Refusal(NamedTuple):
    """The response to send instead of the requested one."""

    code: int
    text: str
    headers: dict[str, str]


class Access:
    """Checks requests to a page that is bound to `host`; `names`: other names of this machine."""

    def __init__(self, host: str, token: str = "", names: Collection[str] = (), *, tls: bool = False) -> None:
        """`tls`: the page is served over https, and its cookie is sent over nothing else. Raises ConfigError if other
        machines can reach the host and there is no token.
        """
        if not is_loopback(host) and not token:
            raise ConfigError(
                f"the page on {host} can be reached from other machines and needs a token; set dashboard.token_file, "
                f"or bind {LOOPBACK}"
            )
        self._open_to_others = not is_loopback(host)
        self._names = LOOPBACK_NAMES | {host.lower()} | ({n.lower() for n in names} if self._open_to_others else set())
        self._token = token.encode()
        self._cookie = "; Secure" if tls else ""
        self.denied: dict[str, int] = {}
        """Refused requests by reason: `host`, `origin`, `token`."""

    def check(self, method: str, target: str, headers: Headers, port: int) -> Refusal | None:
        """None for a request that may be served; else the response, which reveals nothing."""
        if not self._knows_host(headers("Host")):
            return self._deny("host", 403, "the Host header is not a name of this machine")
        if not self._from_here(method, headers):
            return self._deny("origin", 403, "requests from other sites are refused")
        if not self._token:
            return None
        cookie = f"stream_mmrnn_{port}"
        path, _, query = target.partition("?")
        if any(map(self._is_token, _query_tokens(query))):
            # redirect at once, so that the token stays in neither the address bar nor the history
            value = f"{cookie}={self._token.decode()}; HttpOnly; SameSite=Lax; Path=/{self._cookie}"
            return Refusal(303, "", {"Location": "/" + path.strip("/\\"), "Set-Cookie": value})
        given = [v[7:].strip() for v in headers("Authorization") if v[:7].lower() == "bearer "]
        if any(map(self._is_token, [*given, *_cookies(headers("Cookie"), cookie)])):
            return None
        return self._deny("token", 401, "this page needs its token: open it as /?token=TOKEN")

    def _deny(self, reason: str, code: int, text: str) -> Refusal:
        self.denied[reason] = self.denied.get(reason, 0) + 1
        return Refusal(code, text + "\n", {"WWW-Authenticate": "Bearer"} if code == 401 else {})

    def _is_token(self, given: str) -> bool:
        # constant time: the duration must not reveal how much of it is right
        return hmac.compare_digest(given.encode("utf-8", "replace"), self._token)

    def _knows_host(self, hosts: list[str]) -> bool:
        """Against DNS rebinding: another site whose name resolves to this machine has its own name in the header."""
        if len(hosts) != 1:
            return False
        found = _AUTHORITY.fullmatch(hosts[0].strip())
        if found is None:
            return False
        name = found.group(1).lower()
        if name in self._names:
            return True
        try:
            # an IP address cannot be rebound
            return self._open_to_others and bool(ipaddress.ip_address(name.strip("[]")))
        except ValueError:
            return False

    def _from_here(self, method: str, headers: Headers) -> bool:
        """Whether the request is from the page itself or a navigation by the user, not from another site."""
        own = headers("Host")[0].strip().lower()
        if any(o.strip().lower() not in (f"http://{own}", f"https://{own}") for o in headers("Origin")):
            return False
        elsewhere = any(site.strip() in ("cross-site", "same-site") for site in headers("Sec-Fetch-Site"))
        navigation = method == "GET" and headers("Sec-Fetch-Mode") == ["navigate"]
        return not elsewhere or navigation


def _query_tokens(query: str) -> list[str]:
    try:
        return parse_qs(query, max_num_fields=16).get("token", [])
    except ValueError:
        return []


def _cookies(lines: list[str], name: str) -> list[str]:
    found = []
    for line in lines:
        try:
            jar: SimpleCookie = SimpleCookie(line)
        except CookieError:
            continue
        if name in jar:
            found.append(jar[name].value)
    return found
