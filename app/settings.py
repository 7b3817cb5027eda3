"""Every setting, and the only place that reads the environment (prefix `LOOKUP_`)."""

import re
from datetime import timedelta
from functools import partial
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from app.lag import Patience
from domain.commands import Rules
from events.facts import Priority, Service

DEFAULT_TIMEOUT_S = {Service.GEOIP: 15.0, Service.PING: 12.0, Service.RDAP: 20.0, Service.REVERSE_DNS: 10.0}
"""Above what each lookup allows itself: what runs into these is stuck, not slow."""
PREFIX = "LOOKUP_"


class SettingUnreadable(Exception):  # noqa: N818 - what is the case, in our words
    """A setting is not what it must be; the message names it and, as it may be a secret, not its value."""


def _of_postgres(url: str) -> str:
    import psycopg  # noqa: PLC0415 - many commands need no database
    from psycopg.conninfo import conninfo_to_dict  # noqa: PLC0415

    try:
        conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        raise ValueError("must be the address of a database, postgresql://…") from None
    return url


def _of_server(url: str, *, schemes: tuple[str, ...]) -> str:
    expected = f"must be an address like {schemes[0]}://host:port"
    try:
        parts = urlsplit(url)
        port_is_fine = parts.port != 0
    except ValueError:
        raise ValueError(expected) from None
    if parts.scheme not in schemes or not port_is_fine:
        raise ValueError(expected)
    return url


PostgresUrl = Annotated[str, AfterValidator(_of_postgres)]
RedisUrl = Annotated[str, AfterValidator(partial(_of_server, schemes=("redis", "rediss", "unix")))]
BrokerUrl = Annotated[str, AfterValidator(partial(_of_server, schemes=("amqp", "amqps")))]


class Settings(BaseSettings):
    """The settings of one process. A composite one (a list, an object) is written as JSON. Raises `SettingUnreadable`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True)

    # Where the servers are. None of them given: embedded ones are started by `lookup up`.
    database_url: PostgresUrl | None = Field(default=None, description="PostgreSQL, as the role lookup_app.")
    database_owner_url: PostgresUrl | None = Field(default=None, description="PostgreSQL, as its owner; for `lookup migrate`.")
    database_read_url: PostgresUrl | None = Field(default=None, description="PostgreSQL, as lookup_reader; for history.")
    database_retention_url: PostgresUrl | None = Field(
        default=None, description="PostgreSQL, as the role lookup_retention; seals old jobs and erases. Not given = neither."
    )
    redis_url: RedisUrl | None = Field(default=None, description="Redis or Valkey: views, and the bus if no broker is given.")
    broker_url: BrokerUrl | None = Field(default=None, description="RabbitMQ (amqp://…); not given = Redis streams.")
    data_dir: Path = Field(default=Path(".data"), description="Where `lookup up` keeps the embedded servers' data.")

    # The passwords that `lookup migrate` gives the roles it makes. Not given: the role has none.
    app_password: str | None = None
    reader_password: str | None = None
    retention_password: str | None = None

    # HTTP.
    host: str = "127.0.0.1"
    port: int = 8080
    metrics_port: int | None = Field(
        default=None, description="Where every part serves /metrics; not given = those with HTTP, on their own port."
    )
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

    raw_bytes_max: int = Field(
        default=262_144, ge=0, le=1_048_576, description="Raw answers of at most so many bytes are kept; 0 = none are."
    )

    # The two clocks.
    timeout_s: dict[Service, float] = Field(default=DEFAULT_TIMEOUT_S, description="Of one attempt, by service.")
    attempts_max: dict[Service, int] = Field(default={}, description="By service; 2 where nothing is said.")
    interactive_lifetime_s: float = 90.0
    bulk_lifetime_s: float = 3600.0
    redispatch_after_s: float = 30.0
    view_retention_h: float = 24.0
    stalled_after_s: float = Field(
        default=10.0, gt=0, description="A fact that the views do not show after so long raises the alarm `stalled`."
    )
    canary_idle_s: float = Field(
        default=10.0,
        gt=0,
        description="When nothing was appended for so long, a canary is: it shows that the views still move.",
    )
    log_retention_days: float | None = Field(
        default=None, gt=0, description="So long after their end jobs are sealed into segment files; not given = never."
    )
    retention_interval_s: float = Field(default=86_400.0, gt=0, description="How often `lookup keeper` looks for such jobs.")
    segments_dir: Path | None = Field(default=None, description="Where segment files are; not given = below the data folder.")
    heads_key_file: Path | None = Field(
        default=None,
        description="The private key that heads of the log are signed with; not given = heads.key in the data_dir.",
    )
    heads_key_make: bool = Field(default=False, description="Make that key if it is not there. `lookup up` always does.")
    heads_files: tuple[Path, ...] = Field(
        default=(), description="Where heads are written outside of the database; none = heads.jsonl in the data_dir."
    )
    heads_facts: int = Field(default=10_000, ge=1, le=100_000, description="A head is signed after so many facts,")
    heads_every_s: float = Field(default=60.0, gt=0, description="or when the last one is so old and there are new facts.")
    self_check_hour: int = Field(default=3, ge=0, le=23, description="The views are held against the log at this hour (UTC),")
    self_check_every_h: float = Field(default=24.0, ge=0, description="and so often from then on; 0 = never.")
    self_check_rate: float = Field(default=5_000.0, ge=1, description="So many facts a second are folded for it at most.")
    erasure_list: Path | None = Field(
        default=None,
        description="The file that lists what was erased; not given = below the data folder. Keep it apart from backups.",
    )
    worker_concurrency: int = 64
    claim_idle_s: float = Field(
        default=5.0, gt=1.0, description="On Redis streams: so long unheard of, a reader is taken for dead."
    )

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            complaints = dict.fromkeys(map(_complaint, error.errors()))
            raise SettingUnreadable(" ".join(complaints)) from None
        except SettingsError as error:
            field = re.search(r'field "(\w+)"', str(error))
            raise SettingUnreadable(f"{PREFIX}{field[1].upper() if field else '…'} must be JSON.") from None

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
    def patience(self) -> Patience:
        return Patience(timedelta(seconds=self.stalled_after_s), timedelta(seconds=self.canary_idle_s))

    @property
    def segments(self) -> Path:
        return self.segments_dir or self.data_dir / "segments"

    @property
    def erasures(self) -> Path:
        return self.erasure_list or self.data_dir / "erasures.jsonl"

    @property
    def log_retention(self) -> timedelta | None:
        return None if self.log_retention_days is None else timedelta(days=self.log_retention_days)

    @property
    def self_check_every(self) -> timedelta:
        return timedelta(hours=self.self_check_every_h)

    @property
    def heads_key(self) -> Path:
        return self.heads_key_file or self.data_dir / "heads.key"

    @property
    def heads_outside(self) -> tuple[Path, ...]:
        return self.heads_files or (self.data_dir / "heads.jsonl",)

    @property
    def retention(self) -> timedelta:
        return timedelta(hours=self.view_retention_h)


def _complaint(error: ErrorDetails) -> str:
    """One sentence about one setting."""
    field, *within = error["loc"]
    # Where several types are allowed, a step on the way in is the name of a validator.
    steps = "".join(f"[{step}]" for step in within if str(step).isalnum())
    if error["type"] == "value_error":
        return f"{PREFIX}{str(field).upper()}{steps} {error['ctx']['error']}."
    return f"{PREFIX}{str(field).upper()}{steps}: {error['msg'].removesuffix('.')}."
