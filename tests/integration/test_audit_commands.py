"""`lookup audit` as an auditor types it, over a real database and files."""

import asyncio
import base64
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from uuid_utils.compat import uuid7

from app.audit import verify_evidence
from app.audit.auditing import Auditor
from app.audit.evidence import VERIFIER, evidence_of
from app.audit.keys import ENDORSED_AS, fingerprint, load_public, make_key, public_path
from app.audit.timeline import timeline_of, tree_of
from app.cli import app
from app.migrate import migrate
from app.settings import Settings
from app.wiring import Wiring
from domain.address_policy import AddressPolicy
from domain.commands import lines_of
from events.bus import OUTCOMES
from events.facts import TasksDispatched
from events.memory import MemoryBus
from events.record import Cause, read
from events.store import AppendUnit, NewFacts, StreamHead
from tests.builders import (
    DOCUMENT,
    DOMAIN,
    PING,
    RDAP,
    RULES,
    Clock,
    completed,
    counts,
    dispatched,
    failed,
    job_completed,
    memory_store,
    outcome,
    submitted,
)
from tests.servers.postgres import fresh_database
from write_side.gather import Gatherer
from write_side.head_keeper import TICK_S
from write_side.sagas import Sagas
from write_side.submit import Submitter

JOBS = 5
NOW = datetime.now(UTC)


@dataclass
class Audited:
    """A database with some jobs, a key, and a file of heads that cover all of it."""

    database_url: str
    folder: Path
    jobs: list[UUID]

    @property
    def heads(self) -> Path:
        return self.folder / "heads.jsonl"


@pytest.fixture(scope="module")
def audited(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    with fresh_database(postgres) as url:
        migrate(url, uuid4(), {})
        audited = Audited(url, tmp_path_factory.mktemp("audited"), [uuid7() for _ in range(JOBS)])
        asyncio.run(_happen(audited))
        yield audited


async def _happen(audited: Audited) -> None:
    settings = Settings(database_url=audited.database_url, data_dir=audited.folder, heads_key_make=True, heads_facts=7)
    wiring = Wiring(settings)
    documents = await wiring.documents()
    for job_id in audited.jobs:
        facts = [
            submitted(PING, RDAP, job_id=job_id),
            dispatched(PING, RDAP, job_id=job_id),
            completed(PING, job_id=job_id),
            failed(RDAP, job_id=job_id),
            job_completed(counts(succeeded=1, failed=1), job_id=job_id),
        ]
        await documents.put(job_id, DOCUMENT)
        cause = Cause("alice", uuid7(), reason="asked over HTTP", request_id="req-17")
        await wiring.store.append(AppendUnit([NewFacts(job_id, StreamHead(), facts)], cause))
    signing = asyncio.create_task(wiring.sign_heads())
    async with asyncio.timeout(20 * TICK_S):
        while not audited.heads.exists() or json.loads(audited.heads.read_text().splitlines()[-1])["facts"] < 21:
            assert not signing.done()
            await asyncio.sleep(0.05)
    signing.cancel()
    await asyncio.wait([signing])
    await wiring.aclose()


@pytest.fixture
def typed(audited: Audited, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Type a command; gives exit code, what was printed, and what was said on standard error."""
    monkeypatch.setenv("LOOKUP_DATABASE_URL", audited.database_url)
    monkeypatch.setenv("LOOKUP_DATA_DIR", str(audited.folder))

    def run(*words: str) -> tuple[int, str, str]:
        code: Any = app(["audit", *words], result_action="return_value", exit_on_error=False)
        told = capsys.readouterr()
        return int(code or 0), told.out, told.err

    return run


async def on_a_thread(run: Any, *words: str) -> tuple[int, str, str]:
    """The commands have an event loop of their own."""
    done: tuple[int, str, str] = await asyncio.to_thread(run, *words)
    return done


async def test_verify_says_what_is_covered(typed: Any) -> None:
    code, out, err = await on_a_thread(typed, "verify")

    assert (code, err) == (0, "")
    assert f"{5 * JOBS} facts and {JOBS} result documents were verified" in out
    assert "Positions up to 21 are covered by head 3 of" in out
    assert "4 facts after that are covered by no signed head yet." in out
    assert "The log is what was recorded." in out


async def test_verify_names_the_first_bad_position(audited: Audited, typed: Any) -> None:
    with psycopg.connect(audited.database_url) as database:
        kept = database.execute("SELECT state FROM stored_events WHERE notification_id = 8").fetchone()
        assert kept is not None
        database.execute(
            "UPDATE stored_events SET state = %s WHERE notification_id = 8", (kept[0].replace(b"alice", b"mallo"),)
        )
        database.commit()
        try:
            code, out, _ = await on_a_thread(typed, "verify", "--json")
        finally:
            database.execute("UPDATE stored_events SET state = %s WHERE notification_id = 8", kept)

    verdict = json.loads(out)
    assert (code, verdict["sound"], verdict["first_bad"]["position"]) == (1, False, 8)


async def test_verify_takes_heads_and_keys_that_were_kept_elsewhere(audited: Audited, typed: Any, tmp_path: Path) -> None:
    """The table was cut together with the log: only who kept a head outside sees it."""
    (tmp_path / "kept.jsonl").write_bytes(audited.heads.read_bytes())
    (tmp_path / "kept.pub").write_bytes((audited.folder / "heads.key.pub").read_bytes())
    elsewhere = ("--heads", str(tmp_path / "kept.jsonl"), "--keys", str(tmp_path / "kept.pub"))
    with psycopg.connect(audited.database_url) as database:
        rows = database.execute("SELECT * FROM log_heads WHERE number = 3").fetchall()
        events = database.execute("SELECT * FROM stored_events WHERE notification_id > 20").fetchall()
        database.execute("DELETE FROM log_heads WHERE number = 3")
        database.execute("DELETE FROM stored_events WHERE notification_id > 20")
        database.commit()
        try:
            code, out, _ = await on_a_thread(typed, "verify", *elsewhere)
        finally:
            with database.cursor() as cursor:
                cursor.executemany("INSERT INTO log_heads VALUES (%s, %s, %s, %s)", rows)
                columns = ", ".join(["%s"] * len(events[0]))
                cursor.executemany(f"INSERT INTO stored_events VALUES ({columns})", events)  # noqa: S608 - columns counted here
            database.commit()

    assert code == 1
    assert "BAD    position 21: The fact that was signed at this position is missing." in out
    assert "ends with head 2" in out
    assert (await on_a_thread(typed, "verify", *elsewhere))[0] == 0


async def test_a_file_or_key_that_is_not_there_is_told(typed: Any, tmp_path: Path) -> None:
    for words in (("--heads", str(tmp_path / "none")), ("--keys", str(tmp_path / "none"))):
        code, _, err = await on_a_thread(typed, "verify", *words)
        assert code == 2
        assert err.startswith("lookup: ")


async def test_keygen_makes_and_rotates_a_key(typed: Any, tmp_path: Path) -> None:
    path = tmp_path / "new.key"

    made = await on_a_thread(typed, "keygen", "--file", str(path))
    again = await on_a_thread(typed, "keygen", "--file", str(path))
    rotated = await on_a_thread(typed, "keygen", "--file", str(path), "--rotate")

    assert (made[0], again[0], rotated[0]) == (0, 1, 0)
    assert "There is a key already" in again[2]
    assert len((tmp_path / "new.key.pub").read_text().splitlines()) == 2


# --- Evidence ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle_text(audited: Audited) -> str:
    """The evidence about a job whose facts two heads cover, and about one that begins under the last head."""

    async def made() -> str:
        wiring = Wiring(Settings(database_url=audited.database_url, data_dir=audited.folder))
        try:
            return json.dumps(await evidence_of(Auditor(wiring), audited.jobs[1], NOW))
        finally:
            await wiring.aclose()

    return asyncio.run(made())


def checked(folder: Path, bundle: str, *words: str) -> tuple[int, str]:
    """The verifier in a Python that has nothing of ours: no packages, an empty environment, another folder."""
    (folder / "bundle.json").write_text(bundle)
    alone = folder / "verify_evidence.py"
    alone.write_bytes(VERIFIER.read_bytes())
    command = [sys.executable, "-I", "-S", str(alone), str(folder / "bundle.json"), *words]
    done = subprocess.run(command, cwd=folder, env={}, capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == ""
    return done.returncode, done.stdout


async def test_evidence_is_checked_by_one_file_without_our_code(
    audited: Audited, typed: Any, tmp_path: Path, bundle_text: str
) -> None:
    key_id = json.loads((audited.folder / "heads.key.pub").read_text())["key"]

    code, _, err = await on_a_thread(typed, "export", str(audited.jobs[1]), "--out", str(tmp_path / "told.json"))
    holds = checked(tmp_path, (tmp_path / "told.json").read_text(), "--key", key_id)
    other_key = checked(tmp_path, bundle_text, "--key", "00" * 16)
    no_key = checked(tmp_path, bundle_text)

    assert (code, err.splitlines()[0]) == (0, "5 of 5 facts are covered by signed heads. To check it:")
    assert holds[0] == 0
    assert "5 facts, each what was recorded" in holds[1]
    assert "5 of them are in the log under signed heads." in holds[1]
    assert "1 result documents are what was recorded; 0 that facts tell of" in holds[1]
    assert holds[1].endswith("\nHOLDS.\n")
    assert (other_key[0], "that you trust is not among those of the bundle" in other_key[1]) == (1, True)
    assert (no_key[0], "NO KEY WAS NAMED" in no_key[1]) == (0, True)


async def test_a_fact_that_no_head_covers_yet_is_said_not_to_be_shown(typed: Any, audited: Audited, tmp_path: Path) -> None:
    await on_a_thread(typed, "export", str(audited.jobs[-1]), "--out", str(tmp_path / "told.json"))

    code, out = checked(tmp_path, (tmp_path / "told.json").read_text())

    assert code == 0
    assert "NOT SHOWN to be in the signed log (no head covered them yet): positions 22, 23, 24, 25." in out


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, (*path, name))
    else:
        yield path, value


def _changed(bundle: Any, path: tuple[Any, ...]) -> Any:
    copy = json.loads(json.dumps(bundle))
    place = copy
    for name in path[:-1]:
        place = place[name]
    value = place[path[-1]]
    if isinstance(value, int):
        place[path[-1]] = value + 1
    elif isinstance(value, str) and value:
        middle = len(value) // 2
        place[path[-1]] = value[:middle] + ("0" if value[middle] != "0" else "1") + value[middle + 1 :]
    else:
        place[path[-1]] = "0"
    return copy


def test_a_change_anywhere_in_a_bundle_breaks_it(bundle_text: str) -> None:
    """But for what it says of its own making, and of its log's name, which each head says too."""
    bundle = json.loads(bundle_text)
    key_id = bundle["keys"][0]["key"]
    own_words = {("made_at",), ("log_id",), ("keys", 0, "made_at")}
    paths = [path for path, _ in _leaves(bundle) if path not in own_words]
    held: list[tuple[Any, ...]] = []
    for path in paths:
        try:
            verify_evidence.check(_changed(bundle, path), key_id)
        except (verify_evidence.Broken, KeyError, TypeError, ValueError, AttributeError, IndexError):
            continue
        held.append(path)

    assert len(paths) > 80
    assert held == []


def test_facts_that_were_left_out_but_for_the_last_break_it(bundle_text: str) -> None:
    bundle = json.loads(bundle_text)
    for index in range(4):
        less = bundle | {"facts": bundle["facts"][:index] + bundle["facts"][index + 1 :]}
        with pytest.raises(verify_evidence.Broken):
            verify_evidence.check(less)
    assert verify_evidence.check(bundle | {"facts": bundle["facts"][:4]}), "newer facts can be left out unseen"


def test_what_was_erased_is_still_evidence(bundle_text: str) -> None:
    bundle = json.loads(bundle_text)
    for fact in bundle["facts"]:
        fact["state"] = "\n".join(fact["state"].split("\n")[:3])
    bundle["documents"] = {}

    assert "0 result documents" in " ".join(verify_evidence.check(bundle))


def test_a_rotated_key_is_trusted_through_the_one_before(tmp_path: Path, bundle_text: str) -> None:
    first = make_key(tmp_path / "k")
    second = make_key(tmp_path / "k", rotate=True)
    keys = [json.loads(key.line) for key in load_public(public_path(tmp_path / "k")).values()]

    trusted = verify_evidence.keys_of({"keys": keys}, first.key_id)
    keys[1]["endorsement"] = "00" * 64
    forged = verify_evidence.keys_of({"keys": keys}, first.key_id)

    assert trusted.keys() == {first.key_id, second.key_id}
    assert forged.keys() == {first.key_id}


def stranger_signs(bundle: Any, how: str) -> Any:
    """The same facts under heads that a stranger has signed, who puts a key of his own among those of the bundle."""
    stranger = Ed25519PrivateKey.generate()
    public = stranger.public_key().public_bytes_raw()
    (trusted,) = bundle["keys"]
    own = {"key": fingerprint(public), "public": public.hex(), "made_at": trusted["made_at"]}
    match how:
        case "under the trusted key's name":
            own["key"] = trusted["key"]
            keys = [own]
        case "endorsed by nobody":
            keys = [trusted, own]
        case _:
            endorsement = stranger.sign(ENDORSED_AS + public).hex()
            keys = [trusted, own | {"endorsed_by": trusted["key"], "endorsement": endorsement}]
    heads = [
        {name: value for name, value in head.items() if name != "signature"} | {"key": own["key"]} for head in bundle["heads"]
    ]
    for head in heads:
        signed = verify_evidence.HEAD_SIGNED_AS + json.dumps(head, sort_keys=True, separators=(",", ":")).encode()
        head["signature"] = stranger.sign(signed).hex()
    return bundle | {"keys": keys, "heads": heads}


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("under the trusted key's name", "is not the one that it is called"),
        ("endorsed by nobody", "nobody whom you trust has endorsed"),
        ("endorsed by itself", "nobody whom you trust has endorsed"),
    ],
)
def test_a_key_that_the_trusted_one_has_not_endorsed_signs_nothing(bundle_text: str, how: str, why: str) -> None:
    bundle = json.loads(bundle_text)
    forged = stranger_signs(bundle, how)

    with pytest.raises(verify_evidence.Broken, match=why):
        verify_evidence.check(forged, bundle["keys"][0]["key"])


def test_a_document_that_no_fact_tells_of_breaks_it(bundle_text: str) -> None:
    bundle = json.loads(bundle_text)
    bundle["documents"][sha256(b"slander").hexdigest()] = base64.b64encode(b"slander").decode()

    with pytest.raises(verify_evidence.Broken, match="no fact tells of document"):
        verify_evidence.check(bundle)


# --- Ed25519 by hand --------------------------------------------------------------------------------------------------

RFC_8032 = [  # Section 7.1: public key, message, signature.
    (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]


@pytest.mark.parametrize("vector", RFC_8032)
def test_the_verifiers_ed25519_takes_the_vectors_of_rfc_8032(vector: tuple[str, str, str]) -> None:
    public, message, signature = (bytes.fromhex(part) for part in vector)

    assert verify_evidence.ed25519_holds(public, signature, message)
    assert not verify_evidence.ed25519_holds(public, signature, message + b"x")


def test_the_verifiers_ed25519_says_what_the_library_says() -> None:
    chance = random.Random(5)
    for number in range(40):
        private = Ed25519PrivateKey.from_private_bytes(chance.randbytes(32))
        public, message = private.public_key().public_bytes_raw(), chance.randbytes(number)
        signature = bytearray(private.sign(message))
        assert verify_evidence.ed25519_holds(public, bytes(signature), message)
        signature[chance.randrange(64)] ^= 1 << chance.randrange(8)
        assert not verify_evidence.ed25519_holds(public, bytes(signature), message)
        with pytest.raises(InvalidSignature):
            private.public_key().verify(bytes(signature), message)


def test_a_signature_that_was_made_larger_by_the_order_is_refused() -> None:
    """RFC 8032 section 5.1.7: S is below the order, or one message had many signatures."""
    public, message, signature = (bytes.fromhex(part) for part in RFC_8032[1])
    larger = int.from_bytes(signature[32:], "little") + verify_evidence.ORDER

    assert not verify_evidence.ed25519_holds(public, signature[:32] + larger.to_bytes(32, "little"), message)


# --- Show and tree ----------------------------------------------------------------------------------------------------


async def test_show_tells_each_fact_with_who_why_and_on_whose_request(audited: Audited, typed: Any) -> None:
    code, out, _ = await on_a_thread(typed, "show", str(audited.jobs[0]))
    _, as_json, _ = await on_a_thread(typed, "show", str(audited.jobs[0]), "--json")

    lines = out.splitlines()
    assert (code, len(lines)) == (0, 10)
    assert "A lookup of 198.51.100.7 by Ping and RDAP was accepted" in lines[0]
    assert lines[1].strip().startswith("by alice, since asked over HTTP  (request req-17")
    told = json.loads(as_json)
    assert [line["fact"] for line in told] == ["JobSubmitted", "TasksDispatched", "TaskCompleted", "TaskFailed", "JobCompleted"]
    assert {line["request_id"] for line in told} == {"req-17"}


async def test_tree_draws_commands_below_the_fact_that_gave_them() -> None:
    clock = Clock()
    store = memory_store(clock)
    sagas = Sagas(store)
    submitter = Submitter(sagas, AddressPolicy(), RULES, clock, uuid7, "default")
    job_id = uuid7()
    cause = Cause("alice", uuid7(), request_id="req-1", reason="asked over HTTP")
    await submitter.submit(job_id, DOMAIN, [PING, RDAP], cause, requested_by=None)
    dispatched_tasks = read((await store.read([job_id]))[job_id][1]).fact
    assert isinstance(dispatched_tasks, TasksDispatched)
    bus = MemoryBus()
    gatherer = Gatherer(sagas, bus, RULES, clock, uuid7)
    inbox = gatherer.subscribe()
    for task in dispatched_tasks.tasks:
        made = outcome(task.service, job_id=job_id).model_copy(
            update={"command_id": task.command_id, "worker": f"{task.service}@a"}
        )
        await bus.publish(OUTCOMES, lines_of([made]))
        await gatherer.gather(inbox, await inbox.take(1))

    drawn = tree_of(timeline_of((await store.read([job_id]))[job_id]))

    shape = [re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", line).split(":")[0] for line in drawn]
    assert shape == [
        "request req-1, by alice",
        "├─ 1 JobSubmitted",
        "└─ 2 TasksDispatched",
        "   ◦ command ID, taken up by Ping@a",
        "      └─ 3 TaskCompleted",
        "   ◦ command ID, taken up by RDAP@a",
        "      ├─ 4 TaskCompleted",
        "      └─ 5 JobCompleted",
    ]


async def test_a_job_that_is_not_there_is_told(typed: Any) -> None:
    for command in ("show", "tree", "export"):
        assert (await on_a_thread(typed, command, str(uuid4())))[0] == 1
        assert (await on_a_thread(typed, command, "x"))[0] == 2
