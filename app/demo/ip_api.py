"""A stand-in for ip-api.com's JSON API on loopback: its documented fields, failures, limit and headers."""

import asyncio
import ipaddress
from typing import Any

from aiohttp import web

WINDOW_S = 60.0


def location(address: str) -> dict[str, Any]:
    """What is told about an ordinary address: made up, the same every time."""
    number = int(ipaddress.ip_address(address)) % 100
    return {
        "status": "success",
        "country": "Netherlands",
        "countryCode": "NL",
        "region": "UT",
        "regionName": "Utrecht",
        "city": f"Demostad-{number}",
        "zip": "",
        "lat": 52.09,
        "lon": 5.12,
        "timezone": "Europe/Amsterdam",
        "isp": "Demo Access B.V.",
        "org": "Demo Hosting",
        "as": "AS64500 Demo Access B.V.",
        "query": address,
    }


class IpApi:
    """Serves until `stop`. `per_minute` questions are answered, the rest get 429; `asked` counts them all.

    `status` set to another than 200 breaks the server for all questions.
    """

    def __init__(self, per_minute: int = 45) -> None:
        self.url = ""
        self.asked = 0
        self.status = 200
        self._per_minute = per_minute
        self._left = per_minute
        self._window_ends_at = 0.0
        app = web.Application()
        app.router.add_get("/json/{query}", self._json)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.5, access_log=None)

    async def start(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}/json"

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _json(self, request: web.Request) -> web.Response:
        self.asked += 1
        if self.status != 200:  # noqa: PLR2004 - OK
            return web.Response(status=self.status)
        left, ttl_s = self._count()
        headers = {"X-Rl": str(max(left, 0)), "X-Ttl": str(ttl_s)}
        if left < 0:
            return web.Response(status=429, headers=headers)
        fields = request.query.get("fields", "").split(",")
        document = _answer(request.match_info["query"])
        return web.json_response({key: value for key, value in document.items() if key in fields}, headers=headers)

    def _count(self) -> tuple[int, int]:
        now = asyncio.get_running_loop().time()
        if now >= self._window_ends_at:
            self._left, self._window_ends_at = self._per_minute, now + WINDOW_S
        self._left -= 1
        return self._left, int(self._window_ends_at - now)


def _answer(query: str) -> dict[str, Any]:
    try:
        address = ipaddress.ip_address(query)
    except ValueError:
        return {"status": "fail", "message": "invalid query", "query": query}
    if address.is_loopback or address.is_multicast or address.is_unspecified:
        return {"status": "fail", "message": "reserved range", "query": query}
    if address in ipaddress.ip_network("10.0.0.0/8") or address in ipaddress.ip_network("192.168.0.0/16"):
        return {"status": "fail", "message": "private range", "query": query}
    return location(query)
