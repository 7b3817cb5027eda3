"""An RDAP server on loopback: answers like a registry for whatever it is asked, and misbehaves for some names.

| domain | what it does |
|---|---|
| `missing.org` | 404 with an RDAP error document |
| `busy.org` | 429 with Retry-After: 7 |
| `broken.org` | 500 |
| `resting.org` | 503 with Retry-After: 9 |
| `moved.org` | three redirects, then the document |
| `loop.org` | redirects to itself for ever |
| `astray.org` | redirects to a cloud's metadata address |
| `adrift.org` | redirects to another protocol |
| `page.org` | an HTML page with status 200 |
| `list.org` | JSON that is no object |
| `nameserver.org` | a document of another kind |
| `huge.org` | a body without end |
| `slow.org` | no answer |
| `dripping.org` | a body of which a byte comes now and then |
| `tangled.org` | a document of the right kind whose fields are of the wrong types |
"""

import asyncio
import json
from collections import deque
from collections.abc import Callable
from typing import Any

from aiohttp import web

from app.demo.rdap_documents import domain_document, error_document, network_document

ENDLESS = {"huge.org": (64 * 1024, 0.0), "dripping.org": (1, 0.05)}
"""Bytes of a piece, and the pause in seconds after each."""

ASTRAY = "http://169.254.169.254/latest/meta-data/"
TANGLED: dict[str, Any] = {
    "objectClassName": "domain",
    "ldhName": ["not", "text"],
    "handle": "ESC\u001b[31mAPE\u202e",
    "status": "active",
    "entities": [
        None,
        {"roles": "registrar"},
        {"roles": ["registrar"], "vcardArray": ["vcard", [[], ["fn"], ["fn", {}, "text", 7]]]},
    ],
    "nameservers": [{"ldhName": f"ns{number}.example"} for number in range(200)],
    "secureDNS": "yes",
    "events": [{"eventAction": {}, "eventDate": 2020}, "registration"],
}


class RdapServer:
    """Serves until `stop`. `served` holds the last (path, status, If-None-Match) triples and `hosts` the Host headers.

    `asked` holds the last paths as they were asked for, also those that were not answered.
    """

    def __init__(self) -> None:
        self.base_url = ""
        self.served: deque[tuple[str, int, str | None]] = deque(maxlen=1000)
        self.hosts: deque[str] = deque(maxlen=1000)
        self.asked: deque[str] = deque(maxlen=1000)
        self.bootstrap_files: dict[str, bytes] = {}
        self._app = web.Application(middlewares=[self._record])
        self._app.router.add_get("/ip/{address}", self._ip)
        self._app.router.add_get("/moved/{step}/domain/{name}", self._moved)
        self._app.router.add_get("/domain/{name}", self._domain)
        self._app.router.add_get("/bootstrap/{file}", self._bootstrap)
        self._runner = web.AppRunner(self._app, handler_cancellation=True, shutdown_timeout=0.5, access_log=None)

    async def start(self) -> None:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.base_url = f"http://{host}:{port}/"

    async def stop(self) -> None:
        await self._runner.cleanup()

    @web.middleware
    async def _record(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.hosts.append(request.host)
        self.asked.append(request.path)
        response: web.StreamResponse = await handler(request)
        self.served.append((request.path, response.status, request.headers.get("If-None-Match")))
        return response

    async def _ip(self, request: web.Request) -> web.StreamResponse:
        try:
            return _rdap(network_document(request.match_info["address"]))
        except ValueError:
            return _rdap(error_document(400, "Not an address"), status=400)

    async def _domain(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"].lower()
        if name in ENDLESS:
            return await _endless(request, *ENDLESS[name])
        if name == "slow.org":
            await asyncio.sleep(60)
        return _odd(name) or _rdap(domain_document(name))

    async def _moved(self, request: web.Request) -> web.StreamResponse:
        name, step = request.match_info["name"], int(request.match_info["step"])
        return _redirect(f"/moved/{step + 1}/domain/{name}") if step < 3 else _rdap(domain_document(name))  # noqa: PLR2004

    async def _bootstrap(self, request: web.Request) -> web.StreamResponse:
        content = self.bootstrap_files.get(request.match_info["file"])
        if content is None:
            raise web.HTTPServiceUnavailable
        response = web.Response(body=content, content_type="application/json")
        response.etag = f"{len(content)}-{sum(content)}"
        if request.if_none_match and response.etag in request.if_none_match:
            return web.Response(status=304)
        return response


def _odd(name: str) -> web.Response | None:
    # Made anew for each request: aiohttp sends a response object once.
    odd: dict[str, Callable[[], web.Response]] = {
        "missing.org": lambda: _rdap(error_document(404, "Not found"), status=404),
        "busy.org": lambda: _rdap(error_document(429, "Too many requests"), status=429, headers={"Retry-After": "7"}),
        "resting.org": lambda: _rdap(error_document(503, "Back soon"), status=503, headers={"Retry-After": "9"}),
        "broken.org": lambda: _rdap(error_document(500, "Broken"), status=500),
        "moved.org": lambda: _redirect(f"/moved/1/domain/{name}"),
        "loop.org": lambda: _redirect(f"/domain/{name}"),
        "astray.org": lambda: _redirect(ASTRAY),
        "adrift.org": lambda: _redirect("ftp://registry.example/adrift"),
        "page.org": lambda: web.Response(text="<html><h1>Under construction</h1></html>", content_type="text/html"),
        "list.org": lambda: web.Response(text="[]", content_type="application/rdap+json"),
        "nameserver.org": lambda: _rdap({"objectClassName": "nameserver", "ldhName": name}),
        "tangled.org": lambda: _rdap(TANGLED),
    }
    make = odd.get(name)
    return make() if make else None


def _rdap(document: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(text=json.dumps(document), status=status, headers=headers, content_type="application/rdap+json")


def _redirect(location: str) -> web.Response:
    return web.Response(status=302, headers={"Location": location})


async def _endless(request: web.Request, piece_bytes: int, pause_s: float) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/rdap+json"})
    await response.prepare(request)
    for _ in range(1024):
        await response.write(b" " * piece_bytes)
        await asyncio.sleep(pause_s)
    return response
