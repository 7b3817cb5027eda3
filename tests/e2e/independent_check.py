"""An auditor who shares no code with the product: reads the log, the results and the views, and holds each against the others.

Written from the layout that `events/record.py` documents. It parses the five lines of each stored fact itself, folds them by
rules of its own, and imports nothing of the saga, the projections or the event store.
"""

import hashlib
import ipaddress
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
import zstandard

from app.demo.rdap_documents import domain_document, network_document
from tests.e2e.served import PLACES, ZONE, Served

Document = dict[str, Any]
CLOSING = {"JobCompleted": "Completed", "JobFailed": "Failed"}
ENDING = {"TaskCompleted": "Succeeded", "TaskFailed": "Failed", "TaskTimedOut": "TimedOut", "TaskSkipped": "Skipped"}
ENDED_AT = {
    "TaskCompleted": "completed_at",
    "TaskFailed": "failed_at",
    "TaskTimedOut": "timed_out_at",
    "TaskSkipped": "skipped_at",
}
DOCUMENT_BYTES_MAX = 1_048_576


@dataclass(frozen=True)
class Row:
    """A stored fact: its name without `lookup.` and version, and its fields, the erasable ones put back."""

    position: int
    version: int
    hash: bytes
    name: str
    fields: Document


@dataclass(frozen=True)
class Log:
    """All that the database holds of it."""

    streams: Mapping[str, Sequence[Row]]
    documents: Mapping[str, bytes]
    relayed: Mapping[str, tuple[int, bytes]]

    @property
    def jobs(self) -> Mapping[str, Sequence[Row]]:
        """The streams of jobs. The others tell of the machinery."""
        return {stream_id: stream for stream_id, stream in self.streams.items() if stream[0].name == "JobSubmitted"}

    @property
    def head(self) -> int:
        return max((stream[-1].position for stream in self.streams.values()), default=0)


def check(database_url: str, polled: Mapping[str, Document], peers: Served) -> Log:
    """Proves that `polled` (final documents by job id) is what the log, the stored results and the peers say.

    Raises `AssertionError` with the job at fault. Jobs in the log that nobody polled are held to the same rules.
    """
    log = read_log(database_url)
    for job_id, stream in log.jobs.items():
        try:
            expected = expected_document(stream, log.documents)
            check_story(stream)
            if job_id in polled:
                _assert_same(polled[job_id], expected)
            _check_against_peers(stream[0].fields["target"], expected, peers)
        except (AssertionError, KeyError) as error:
            raise AssertionError(f"job {job_id}: {error!r}\n{_story(stream)}") from error
    assert polled.keys() <= log.jobs.keys(), f"accepted but not in the log: {polled.keys() - log.jobs.keys()}"
    return log


def check_relayed_to_the_end(log: Log) -> None:
    """The relay's running hash over (position, fact hash), made anew from the rows."""
    head = bytes(32)
    rows = sorted((row for stream in log.streams.values() for row in stream), key=lambda row: row.position)
    for row in rows:
        head = hashlib.sha256(head + row.position.to_bytes(8, "big") + row.hash).digest()
    assert log.relayed["facts"] == (rows[-1].position, head)
    assert log.relayed["commands"][0] == rows[-1].position


# --- what lies in the database ----------------------------------------------------------------------------------------


def read_log(database_url: str) -> Log:
    """The whole log, each row checked against its hash, its stream's chain and its digests."""
    with psycopg.connect(database_url) as database:
        database.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ  # All of it is of one moment.
        rows = database.execute(
            "SELECT notification_id, originator_id, originator_version, topic, state FROM stored_events ORDER BY 1"
        ).fetchall()
        documents = database.execute("SELECT key, body FROM result_documents").fetchall()
        relayed = database.execute("SELECT name, position, log_head FROM relay_checkpoints").fetchall()
    streams: dict[str, list[Row]] = defaultdict(list)
    for position, stream_id, version, topic, state in rows:
        stream = streams[str(stream_id)]
        assert version == len(stream) + 1, f"stream {stream_id} has version {version} in place {len(stream) + 1}"
        previous = stream[-1].hash if stream else bytes(32)
        stream.append(_row(position, stream_id.bytes, version, topic, bytes(state), previous))
    decompressor = zstandard.ZstdDecompressor()
    return Log(
        dict(streams),
        {key: decompressor.decompress(bytes(body), max_output_size=DOCUMENT_BYTES_MAX) for key, body in documents},
        {name: (position, bytes(log_head)) for name, position, log_head in relayed},
    )


def _row(position: int, stream_id: bytes, version: int, topic: str, state: bytes, previous: bytes) -> Row:
    envelope, chained, hash_hex, *erasable = state.split(b"\n")
    hasher = hashlib.sha256(previous + stream_id + version.to_bytes(8, "big"))
    for part in (topic.encode(), envelope, chained):
        hasher.update(len(part).to_bytes(8, "big") + part)
    assert hasher.hexdigest() == hash_hex.decode(), f"the chain breaks at position {position}"
    prefix, name, schema_version = topic.split(".")
    assert prefix == "lookup"
    assert schema_version in {"v1", "v2"}, "a version that this check does not know"
    return Row(position, version, hasher.digest(), name, json.loads(chained) | _erasable_values(envelope, erasable))


def _erasable_values(envelope: bytes, erasable: Sequence[bytes]) -> Document:
    digests = json.loads(envelope).get("erasable", {})
    if not digests:
        assert not erasable, "values that no digest vouches for"
        return {}
    salts, values = (json.loads(line) for line in erasable)
    assert digests.keys() == salts.keys() == values.keys()
    for name, value in values.items():
        canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        assert hashlib.sha256(bytes.fromhex(salts[name]) + canonical).hexdigest() == digests[name], f"{name} was changed"
    return dict(values)


# --- what a job's facts mean ------------------------------------------------------------------------------------------


def check_story(stream: Sequence[Row]) -> None:
    """One beginning, one end, one ending for each requested service, and nothing after the end."""
    names = [row.name for row in stream]
    assert names[0] == "JobSubmitted"
    assert names.count("JobSubmitted") == 1
    assert [name for name in names if name in CLOSING] == [names[-1]], "not exactly one closing fact, or not the last one"
    ended = [row.fields["service"] for row in stream if row.name in ENDING]
    assert sorted(ended) == sorted(stream[0].fields["services"]), "not exactly one ending for each requested service"
    counts = {ending: sum(ENDING.get(name) == ending for name in names) for ending in ENDING.values()}
    told = stream[-1].fields["counts"]
    assert told == {
        "succeeded": counts["Succeeded"],
        "failed": counts["Failed"],
        "timed_out": counts["TimedOut"],
        "skipped": counts["Skipped"],
    }
    assert names[-1] == ("JobCompleted" if counts["Succeeded"] else "JobFailed")


def expected_document(stream: Sequence[Row], documents: Mapping[str, bytes]) -> Document:
    """What a poller must see after these facts."""
    submitted = stream[0].fields
    services = submitted["services"]
    results = {service: _result(service, 1, "Pending") for service in services}
    status, completed_at = "Pending", None
    for row in stream[1:]:
        fields = row.fields
        if row.name == "TasksDispatched":
            status = "Processing"
            for task in fields["tasks"]:
                results[task["service"]] = _result(task["service"], task["attempt"], "Pending")
        elif row.name == "TaskDeferred":
            results[fields["service"]] = _result(fields["service"], fields["attempt"], "Deferred")
            if all(result["status"] == "Deferred" for result in results.values()):
                status = "Pending"
        elif row.name in ENDING:
            results[fields["service"]] = _ended(row, documents)
        else:
            status = CLOSING[row.name]
            completed_at = fields["completed_at" if row.name == "JobCompleted" else "failed_at"]
    ended = sum(result["status"] in ENDING.values() for result in results.values())
    return {
        "jobId": submitted["job_id"],
        "target": submitted["target"]["raw"],
        "targetType": submitted["target_type"],
        "status": status,
        "createdAt": submitted["submitted_at"],
        "completedAt": completed_at,
        "completionPercentage": ended * 100 // len(services),
        "requestedServices": services,
        "results": [results[service] for service in services],
        "warnings": [],
    }


def _ended(row: Row, documents: Mapping[str, bytes]) -> Document:
    fields = row.fields
    result = _result(fields["service"], fields.get("attempt", 1), ENDING[row.name])
    result["completedAt"] = fields[ENDED_AT[row.name]]
    result["durationMs"] = fields.get("duration_ms")
    match row.name:
        case "TaskCompleted":
            result["success"] = True
            result["data"] = json.loads(_stored(fields["result"], documents))
        case "TaskFailed":
            result["errorCode"], result["errorMessage"] = fields["error"]["code"], fields["error"]["message"]
        case "TaskTimedOut":
            result["errorCode"], result["errorMessage"] = "timed_out", "No answer came in time."
        case _:
            code = fields["reason"]
            result["errorCode"] = "address_refused" if code == "policy" else code
            result["errorMessage"] = fields["message"]
    return result


def _stored(reference: Document, documents: Mapping[str, bytes]) -> bytes:
    assert reference["location"]["$type"] == "postgres"
    document = documents[reference["location"]["key"]]
    assert len(document) == reference["size_bytes"]
    assert hashlib.sha256(document).hexdigest() == reference["sha256"], "the stored result is another one"
    return document


def _result(service: str, attempt: int, status: str) -> Document:
    return {
        "serviceType": service,
        "success": False,
        "status": status,
        "data": None,
        "errorCode": None,
        "errorMessage": None,
        "completedAt": None,
        "durationMs": None,
        "attempt": attempt,
    }


# --- what the peers say -----------------------------------------------------------------------------------------------


def _check_against_peers(target: Document, document: Document, peers: Served) -> None:
    canonical = target["canonical"]
    address = canonical if target["type"] == "IPAddress" else _addresses(f"{canonical}.")[0]
    for result in document["results"]:
        if not result["success"]:
            continue
        data = result["data"]
        match result["serviceType"]:
            case "GeoIP":
                _check_place(data, address)
            case "Ping":
                _check_echoes(data, canonical, address)
            case "RDAP":
                _check_registration(data, canonical, target["type"], peers)
            case _:
                _check_names(data, canonical, peers)


def _check_place(data: Document, address: str) -> None:
    network = next(net for net in map(ipaddress.ip_network, PLACES) if ipaddress.ip_address(address) in net)
    place = PLACES[str(network)]
    told = {key: data[key] for key in ("ip", "country", "countryCode", "city", "zip", "lat", "lon", "timezone", "source")}
    assert told == {
        "ip": address,
        "country": place["country"]["names"]["en"],
        "countryCode": place["country"]["iso_code"],
        "city": place["city"]["names"]["en"],
        "zip": place["postal"]["code"],
        "lat": place["location"]["latitude"],
        "lon": place["location"]["longitude"],
        "timezone": place["location"]["time_zone"],
        "source": "mmdb",
    }


def _check_echoes(data: Document, canonical: str, address: str) -> None:
    answered = [echo["roundtripTimeMs"] for echo in data["results"] if echo["success"]]
    assert (data["target"], data["address"]) == (canonical, address)
    assert (data["packetsSent"], data["packetsReceived"]) == (len(data["results"]), len(answered))
    assert data["packetLoss"] == round(100 * (1 - len(answered) / len(data["results"])), 1)
    assert (data["minRoundtripMs"], data["maxRoundtripMs"]) == (min(answered), max(answered))


def _check_registration(data: Document, canonical: str, target_type: str, peers: Served) -> None:
    is_address = target_type == "IPAddress"
    asked = f"/ip/{canonical}" if is_address else f"/domain/{canonical}"
    served = network_document(canonical) if is_address else domain_document(canonical)
    assert asked in peers.rdap_paths, f"the RDAP server was never asked for {asked}"
    assert data["raw"] == json.loads(json.dumps(served))
    assert data["handle"] == served["handle"]


def _check_names(data: Document, canonical: str, peers: Served) -> None:
    pointer = f"{ipaddress.ip_address(canonical).reverse_pointer}."
    names = sorted(name.rstrip(".") for name in ZONE.get((pointer, "PTR"), []))
    assert (pointer, "PTR") in peers.dns.asked, f"the DNS server was never asked for {pointer}"
    told = [data["hostName"], *data["aliases"]] if data["found"] else []
    assert told == names


def _addresses(name: str) -> Sequence[str]:
    return ZONE.get((name, "A")) or ZONE[name, "AAAA"]


def _assert_same(polled: Document, expected: Document) -> None:
    """Also in the order of keys."""
    seen, wanted = (json.dumps(document, indent=1) for document in (polled, expected))
    assert seen == wanted, _first_difference(seen.splitlines(), wanted.splitlines())


def _first_difference(seen: Sequence[str], wanted: Sequence[str]) -> str:
    for left, right in zip(seen, wanted, strict=False):
        if left != right:
            return f"polled {left.strip()}, expected {right.strip()}"
    return f"polled {len(seen)} lines, expected {len(wanted)}"


def _story(stream: Iterable[Row]) -> str:
    return "\n".join(f"{row.position:>6} v{row.version} {row.name} {json.dumps(row.fields)[:300]}" for row in stream)
