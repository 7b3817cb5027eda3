"""Every setting, and the only place that reads the environment (prefix `LOOKUP_`)."""

from datetime import timedelta
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from domain.commands import Rules
from events.facts import Priority, Service

DEFAULT_TIMEOUT_S = {Service.GEOIP: 15.0, Service.PING: 12.0, Service.RDAP: 20.0, Service.REVERSE_DNS: 10.0}
"""Above what each lookup allows itself: what runs into these is stuck, not slow."""


class Settings(BaseSettings):
    """The settings of one process. A composite one (a list, an object) is written as JSON."""

    model_config = SettingsConfigDict(env_prefix="LOOKUP_", env_ignore_empty=True, extra="ignore", frozen=True)

    # Where the servers are. None of them given: embedded ones are started by `lookup up`.
    database_url: str | None = Field(default=None, description="PostgreSQL, as the role lookup_app.")
    database_owner_url: str | None = Field(default=None, description="PostgreSQL, as the owner; for `lookup migrate` only.")
    database_read_url: str | None = Field(default=None, description="PostgreSQL, as the role lookup_reader; for history.")
    redis_url: str | None = Field(default=None, description="Redis or Valkey: views, and the bus where no broker is given.")
    broker_url: str | None = Field(default=None, description="RabbitMQ (amqp://…); not given = Redis streams.")
    data_dir: Path = Field(default=Path(".data"), description="Where `lookup up` keeps the embedded servers' data.")

    # The passwords that `lookup migrate` gives the roles it makes. Not given: the role has none.
    app_password: str | None = None
    reader_password: str | None = None
    retention_password: str | None = None

    # HTTP.
    host: str = "127.0.0.1"
    port: int = 8080
    data_as_string: bool = Field(default=False, description="`data` of a result as JSON text, as the older service gave it.")
    log_format: Literal["text", "json"] = "text"
    log_level: str = "INFO"

    # What may be asked of whom.
    tenant: str = "default"
    probe_allow: tuple[IPv4Network | IPv6Network, ...] = Field(
        default=(), description="Special-purpose networks that may be pinged and connected to all the same."
    )
    ask_about_special: bool = Field(default=True, description="Ask GeoIP, RDAP and DNS about special-purpose addresses too.")
    nameservers: tuple[str, ...] = Field(default=(), description="`address` or `address:port`; none = the system's.")
    geoip_mmdb: Path | None = None
    ip_api_url: str | None = "http://ip-api.com/json"
    ip_api_per_minute: int = 45
    ping_method: Literal["auto", "icmp", "icmp-datagram", "tcp"] = "auto"
    rdap_bootstrap_dir: Path | None = None
    rdap_refresh: bool = True
    rdap_allow_http: bool = False

    # The two clocks.
    timeout_s: dict[Service, float] = Field(default=DEFAULT_TIMEOUT_S, description="Of one attempt, by service.")
    attempts_max: dict[Service, int] = Field(default={}, description="By service; 2 where nothing is said.")
    interactive_lifetime_s: float = 90.0
    bulk_lifetime_s: float = 3600.0
    redispatch_after_s: float = 30.0
    view_retention_h: float = 24.0
    worker_concurrency: int = 64

    @property
    def rules(self) -> Rules:
        return Rules(
            timeout_s={**DEFAULT_TIMEOUT_S, **self.timeout_s},
            attempts_max={**dict.fromkeys(Service, 2), **self.attempts_max},
            lifetime={
                Priority.INTERACTIVE: timedelta(seconds=self.interactive_lifetime_s),
                Priority.BULK: timedelta(seconds=self.bulk_lifetime_s),
            },
            redispatch_after=timedelta(seconds=self.redispatch_after_s),
        )

    @property
    def retention(self) -> timedelta:
        return timedelta(hours=self.view_retention_h)
