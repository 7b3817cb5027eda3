"""How a job looks on a terminal: one line per service while it runs, one section per service when it has ended.

Whatever an answer holds was written by strangers. `safe` keeps it from steering the terminal, and it is never read as markup.
"""

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

import orjson
from pydantic import BaseModel, ConfigDict, field_validator
from pydantic.alias_generators import to_camel
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

TEXT_CHARS_MAX = 1_000
ITEMS_MAX = 32
LABEL_WIDTH = 18
LABEL_WIDTH_MAX = 30
REFRESHES_PER_S = 10
_A_SECOND_MS = 1_000

ENDED = frozenset({"Succeeded", "Failed", "TimedOut", "Skipped"})
CLOSED = frozenset({"Completed", "Failed", "Cancelled"})
STYLES = {
    "Succeeded": "green",
    "Completed": "green",
    "Failed": "red",
    "TimedOut": "yellow",
    "Deferred": "yellow",
    "Skipped": "dim",
}

Data = Mapping[str, Any]


class _Answer(BaseModel):
    """A part of the service's JSON. Fields that a newer service adds are no reason to stop."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, extra="ignore")


class TaskView(_Answer):
    """One service's part. `data` is its result document, or None; `duration_ms` is None until it ended."""

    service_type: str
    status: str
    data: Any = None
    error_message: str | None = None
    duration_ms: int | None = None
    attempt: int | None = None

    @field_validator("data")
    @classmethod
    def _parsed(cls, data: Any) -> Any:
        """A service set to the older answers sends its data as JSON text."""
        if not isinstance(data, str):
            return data
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError:
            return data


class JobView(_Answer):
    """A job as the service tells it, results in the order in which they were asked for."""

    job_id: UUID
    target: str
    target_type: str | None = None
    status: str
    created_at: datetime
    completed_at: datetime | None = None
    results: tuple[TaskView, ...]
    warnings: tuple[Any, ...] = ()

    @property
    def is_closed(self) -> bool:
        return self.status in CLOSED


def safe(value: object, chars_max: int = TEXT_CHARS_MAX) -> str:
    """The value as printable text on one line: no escapes, no control or direction characters, bounded."""
    text = value if isinstance(value, str) else orjson.dumps(value, default=str).decode()
    cut = text if len(text) <= chars_max else f"{text[:chars_max]} …"
    return "".join(_printable(character) for character in cut)


def _printable(character: str) -> str:
    if character in "\n\t":
        return " "
    # Cf has the marks that reverse the direction of what follows; Zl and Zp end a line like a line feed does.
    return "\ufffd" if unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"} else character


# ---- While it runs


@contextmanager
def progress(out: Console) -> Iterator[Callable[[JobView], None]]:
    """Gives the function to call with each new view of the job. A terminal gets live lines, anything else plain ones."""
    if not out.is_terminal:
        yield _PlainLines(out).show
        return
    lines = _LiveLines(out)
    with Live(
        lines, console=out, transient=True, refresh_per_second=REFRESHES_PER_S, redirect_stdout=False, redirect_stderr=False
    ):
        yield lines.show


@dataclass
class _PlainLines:
    """Prints each service once, when it has ended."""

    out: Console
    printed: set[str] = field(default_factory=set)

    def show(self, job: JobView) -> None:
        for task in job.results:
            if task.status in ENDED and task.service_type not in self.printed:
                self.printed.add(task.service_type)
                self.out.print(Text("  ".join(_progress_words(task)).rstrip()), soft_wrap=True)


def _progress_words(task: TaskView) -> tuple[str, str, str]:
    return f"{safe(task.service_type, 20):<12}", f"{words(task.status):<10}", duration_text(task.duration_ms)


@dataclass
class _LiveLines:
    """Drawn again many times a second by `Live`, from the last view of the job."""

    out: Console
    job: JobView | None = None

    def __post_init__(self) -> None:
        self._since_s = self.out.get_time()
        self._spinner = Spinner("dots" if self.out.encoding.lower().startswith("utf") else "line")

    def show(self, job: JobView) -> None:
        self.job = job

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        waited = duration_text(round((console.get_time() - self._since_s) * _A_SECOND_MS))
        lines = Table.grid(padding=(0, 2))
        if self.job is None:
            lines.add_row(self._spinner, "waiting for the service", Text(waited, style="dim"))
        for task in self.job.results if self.job else ():
            sign = " " if task.status in ENDED else self._spinner
            duration = duration_text(task.duration_ms) if task.status in ENDED else waited
            lines.add_row(sign, safe_text(task.service_type), status_text(task.status), Text(duration, style="dim"))
        yield lines


# ---- When it has ended


def job_report(job: JobView) -> Group:
    """The gathered answer: a headline, a section for each service, the warnings."""
    sections = [Group(Text(), _headline(task), Padding(_section(task), (0, 0, 0, 2), expand=False)) for task in job.results]
    warnings = [Text(f"Warning: {safe(warning)}", style="yellow") for warning in job.warnings[:ITEMS_MAX]]
    return Group(_job_headline(job), *sections, *([Text(), *warnings] if warnings else []))


def _job_headline(job: JobView) -> Text:
    kind = {"IPAddress": "IP address", "Domain": "domain"}.get(job.target_type or "", "")
    took = (job.completed_at - job.created_at).total_seconds() if job.completed_at else None
    line = Text(safe(job.target), style="bold")
    line.append(f"  {kind}" if kind else "", style="not bold dim")
    line.append("  ").append_text(status_text(job.status))
    line.append("" if took is None else f"  {duration_text(round(took * _A_SECOND_MS))}", style="not bold dim")
    return line


def _headline(task: TaskView) -> Text:
    line = Text(f"{safe(task.service_type, 20):<12}", style="bold")
    line.append_text(status_text(task.status))
    attempt = f"attempt {task.attempt}" if task.attempt and task.attempt > 1 else ""
    for detail in filter(None, (duration_text(task.duration_ms), attempt)):
        line.append(f"  {detail}", style="not bold dim")
    return line


def _section(task: TaskView) -> Group | Table | Text:
    if task.error_message:
        return safe_text(task.error_message)
    if isinstance(task.data, dict):
        return _field_table(_fields_of(task.service_type, task.data))
    if task.data is not None:
        return safe_text(task.data)
    return Text("The answer is not at hand.", style="dim") if task.status == "Succeeded" else Group()


def _field_table(fields: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=LABEL_WIDTH, max_width=LABEL_WIDTH_MAX, style="dim", overflow="fold")
    table.add_column(overflow="fold")
    for label, value in fields:
        table.add_row(Text(label), Text(value))
    return table


def _fields_of(service: str, data: Data) -> list[tuple[str, str]]:
    """What matters of a result, as label and text; of an unknown service, whatever is plain."""
    fields_of = FIELDS.get(service, _any_fields)
    return [(label, text) for label, value in fields_of(data) if (text := _text(value))][:ITEMS_MAX]


Fields = Iterator[tuple[str, object]]


def _geoip(data: Data) -> Fields:
    yield "Address", data.get("ip")
    yield "Place", _joined(data.get("city"), data.get("zip"), data.get("regionName"), data.get("country"))
    yield "Country code", data.get("countryCode")
    yield "Coordinates", _joined(data.get("lat"), data.get("lon"))
    yield "Time zone", data.get("timezone")
    yield "ISP", data.get("isp")
    yield "Organisation", data.get("org")
    yield "Autonomous system", data.get("as")
    yield "Source", data.get("source")


def _ping(data: Data) -> Fields:
    yield "Address", data.get("address")
    yield "Packets", _sentence("{packetsSent} sent, {packetsReceived} received, {packetLoss} % lost", data)
    yield "Round trip", _sentence("{minRoundtripMs} / {averageRoundtripMs} / {maxRoundtripMs} ms (min / avg / max)", data)
    yield "Method", data.get("method")


def _rdap(data: Data) -> Fields:
    network, domain = _part(data, "network"), _part(data, "domain")
    yield "Handle", data.get("handle")
    yield "Name", domain.get("unicodeName") or domain.get("ldhName") or data.get("name")
    yield "Status", data.get("status")
    yield "Network", network.get("cidr")
    yield "Addresses", _sentence("{startAddress} to {endAddress}", network)
    yield "Country", network.get("country")
    yield "Type", network.get("type")
    yield "Registrar", domain.get("registrar")
    yield "Name servers", domain.get("nameservers")
    yield "DNSSEC signed", domain.get("secureDNS")
    events = data.get("events")
    for event in events[:ITEMS_MAX] if isinstance(events, list) else ():
        if isinstance(event, dict) and isinstance(action := event.get("action"), str):
            yield _label(action), event.get("date")


def _reverse_dns(data: Data) -> Fields:
    yield "Host name", data.get("hostName") if data.get("found") else "none (the address has no PTR record)"
    yield "Aliases", data.get("aliases")
    yield "Addresses", data.get("addresses")


def _any_fields(data: Data) -> Fields:
    for key, value in data.items():
        if not isinstance(value, dict):
            yield _label(words(key)), value


FIELDS: dict[str, Callable[[Data], Fields]] = {
    "GeoIP": _geoip,
    "Ping": _ping,
    "RDAP": _rdap,
    "ReverseDNS": _reverse_dns,
}


def _label(name: str) -> str:
    text = safe(name, LABEL_WIDTH_MAX)
    return text[:1].upper() + text[1:]


def _part(data: Data, key: str) -> Data:
    part = data.get(key)
    return part if isinstance(part, dict) else {}


def _joined(*values: object) -> str:
    return ", ".join(text for value in values if (text := _text(value)))


def _sentence(pattern: str, data: Data) -> str | None:
    """The pattern with the data's values in it; None when one of them is unknown."""
    try:
        return pattern.format_map({key: text for key, value in data.items() if (text := _text(value))})
    except KeyError:
        return None


def _text(value: object) -> str:
    """A value as a person reads it; empty when there is nothing to read."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        more = f" and {len(value) - ITEMS_MAX} more" if len(value) > ITEMS_MAX else ""
        return ", ".join(filter(None, map(_text, value[:ITEMS_MAX]))) + more
    return safe(f"{value:g}" if isinstance(value, float) else value)


def safe_text(value: object) -> Text:
    return Text(safe(value))


def status_text(status: str) -> Text:
    return Text(words(status), style=f"not bold {STYLES.get(status, 'cyan')}")


def words(name: str) -> str:
    """`TimedOut` and `packetsSent` in words: `timed out`, `packets sent`."""
    return "".join(f" {c.lower()}" if c.isupper() and at else c.lower() for at, c in enumerate(safe(name, 40)))


def duration_text(duration_ms: int | None) -> str:
    if duration_ms is None:
        return ""
    return f"{duration_ms} ms" if duration_ms < _A_SECOND_MS else f"{duration_ms / _A_SECOND_MS:.1f} s"
