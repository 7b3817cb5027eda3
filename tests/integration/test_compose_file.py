"""compose.yaml and the Dockerfile, held to the compose specification, to the product and to each other."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from events.facts import Service
from tests.e2e.compose_harness import ONE_SHOT, REPOSITORY, Servers, VariableMissing, is_part, services

EXAMPLE = REPOSITORY / "deploy" / "compose.env.example"
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = (REPOSITORY / "compose.yaml").read_text(encoding="utf-8")

REFERENCES = re.findall(r"(?<!\$)\$\{(\w+)(:[-?])?([^}]*)\}", COMPOSE)
REQUIRED = {name for name, rule, _ in REFERENCES if rule == ":?"}
SERVICES = services(dict.fromkeys(REQUIRED, "s3cret"))
PARTS = {name: service for name, service in SERVICES.items() if is_part(service)}
WORKERS = {name for name in PARTS if name.startswith("worker-")}


def test_compose_file_follows_the_compose_specification() -> None:
    """By the schema that the `check-jsonschema` package carries."""
    checker = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]

    then = subprocess.run([*checker, "compose.yaml"], cwd=REPOSITORY, capture_output=True, check=False, timeout=60)

    assert then.returncode == 0, then.stdout.decode()


def test_every_part_of_the_design_has_its_container() -> None:
    workers = [["lookup", "worker", service.value] for service in Service]

    then = [service["command"] for service in PARTS.values()]

    assert sorted(then) == sorted(
        [*([["lookup", part] for part in ("migrate", "write", "relay", "saga", "projector", "keeper", "read")]), *workers]
    )


@pytest.mark.parametrize("word", sorted({*(part["command"][1] for part in PARTS.values()), "health"}))
def test_the_command_line_knows_the_command(word: str) -> None:
    then = subprocess.run(
        [sys.executable, "-m", "app.cli", word, "--help"], cwd=REPOSITORY, capture_output=True, check=False, timeout=60
    )

    assert then.returncode == 0, then.stderr.decode()
    assert re.match(rf"Usage: lookup {word}\b", then.stdout.decode())


@pytest.mark.parametrize("name", PARTS)
def test_every_variable_of_a_part_is_a_setting(name: str) -> None:
    from app.settings import Settings  # noqa: PLC0415 - the other tests need no product

    known = {f"LOOKUP_{field.upper()}" for field in Settings.model_fields}

    assert PARTS[name]["environment"].keys() - known == set()


@pytest.mark.parametrize("name", PARTS)
def test_a_parts_variables_are_settings_that_load(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among them those that are empty by default: empty has to mean `not set`."""
    from app.settings import Settings  # noqa: PLC0415 - likewise

    for variable, value in PARTS[name]["environment"].items():
        monkeypatch.setenv(variable, value)

    given = Settings().model_fields_set

    assert {f"LOOKUP_{field.upper()}" for field in given} >= {key for key, value in PARTS[name]["environment"].items() if value}


def test_every_variable_is_required_or_has_a_harmless_default() -> None:
    optional = {name: default for name, rule, default in REFERENCES if rule != ":?"}

    assert optional == {
        "GATEWAY_ADDRESS": "127.0.0.1",
        "GATEWAY_PORT": "8080",
        "GEOIP_MMDB": "",
        "GEOIP_FOLDER": "./deploy/geoip",
        "OUTSIDE_IPV6": "false",
    }


def test_no_password_stands_in_the_file() -> None:
    """A value that is not made of required variables would show up here, wherever it stands."""
    with_one = services(dict.fromkeys(REQUIRED, "first"))
    with_another = services(dict.fromkeys(REQUIRED, "second"))

    secrets = [(path, value) for path, value in _leaves(with_one) if re.search(r"PASS|AUTH$", path) or "@" in value]

    assert secrets
    assert [(path, value.replace("first", "second")) for path, value in secrets] == [
        (path, value) for path, value in _leaves(with_another) if re.search(r"PASS|AUTH$", path) or "@" in value
    ]
    assert [value for _, value in secrets if "first" not in value] == []


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_nothing_starts_while_a_password_is_missing_or_empty(name: str) -> None:
    given = dict.fromkeys(REQUIRED, "s3cret")

    for incomplete in ({**given, name: ""}, {key: value for key, value in given.items() if key != name}):
        with pytest.raises(VariableMissing, match=name):
            services(incomplete)


def test_the_example_names_every_password_and_holds_none() -> None:
    lines = [line for line in EXAMPLE.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]

    assert sorted(lines) == sorted(f"{name}=" for name in REQUIRED)


def test_the_documented_line_makes_every_password(tmp_path: Path) -> None:
    documented = (REPOSITORY / "docs" / "deployment.md").read_text(encoding="utf-8")
    commands = documented.partition("<!-- makes .env -->\n```sh\n")[2].partition("```")[0]
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / EXAMPLE.name).write_bytes(EXAMPLE.read_bytes())

    subprocess.run(["sh", "-eu", "-c", commands], cwd=tmp_path, check=True, timeout=30)

    made = dict(
        line.split("=", 1) for line in (tmp_path / ".env").read_text(encoding="utf-8").splitlines() if line[:1].isupper()
    )
    assert made.keys() == REQUIRED
    assert len(set(made.values())) == len(REQUIRED)
    assert all(re.fullmatch(r"[0-9a-f]{48}", password) for password in made.values())
    assert (tmp_path / ".env").stat().st_mode & 0o077 == 0


def test_only_the_gateway_publishes_a_port() -> None:
    assert {name: service["ports"] for name, service in SERVICES.items() if "ports" in service} == {
        "gateway": ["127.0.0.1:8080:8080"]
    }


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_says_whether_it_is_healthy(name: str) -> None:
    health = SERVICES[name]["healthcheck"]

    if name == ONE_SHOT:
        assert health == {"disable": True}
    else:
        assert health["test"][0] in {"CMD", "CMD-SHELL"}
        assert health.keys() >= {"interval", "timeout", "retries", "start_period"}


@pytest.mark.parametrize("name", PARTS)
def test_a_parts_health_check_asks_about_that_part(name: str) -> None:
    part = PARTS[name]
    check = part["healthcheck"].get("test", [])

    if "LOOKUP_PORT" in part["environment"]:
        assert f"http://127.0.0.1:{part['environment']['LOOKUP_PORT']}/health/live" in check[-1]
    elif name != ONE_SHOT:
        assert check == ["CMD", "lookup", "health", *part["command"][1:]]


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_comes_back_after_a_crash(name: str) -> None:
    """Except the migration: its failure has to be seen, and holds everything else up."""
    assert SERVICES[name]["restart"] == ("no" if name == ONE_SHOT else "unless-stopped")


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_bounded(name: str) -> None:
    service = SERVICES[name]

    assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory", "pids"}
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert service["stop_grace_period"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_hardened(name: str) -> None:
    service = SERVICES[name]

    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "cap_add" not in service
    assert "privileged" not in service


def test_only_the_ping_worker_may_open_icmp_sockets() -> None:
    group = re.search(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)

    assert group
    assert {name: service["sysctls"] for name, service in SERVICES.items() if "sysctls" in service} == {
        "worker-ping": {"net.ipv4.ping_group_range": f"{group[2]} {group[2]}"}
    }


def test_servers_are_reached_by_nobody_but_the_parts() -> None:
    networks = yaml.safe_load(COMPOSE)["networks"]
    internal = {name for name, network in networks.items() if network.get("internal")}

    outside = {name: set(service["networks"]) - internal for name, service in SERVICES.items()}

    assert {name for name, reached in outside.items() if reached} == {"gateway", *WORKERS}
    assert {name for name, service in SERVICES.items() if "backend" in service["networks"]} == SERVICES.keys() - {"gateway"}


def test_each_part_knows_only_the_passwords_it_needs() -> None:
    passwords = {name: f"secret-{name.lower()}" for name in REQUIRED}

    def known_to(part: dict[str, Any]) -> set[str]:
        return {name for name, password in passwords.items() if any(password in value for _, value in _leaves(part))}

    known = {name: known_to(service) for name, service in services(passwords).items() if is_part(service)}

    migration = {f"POSTGRES_{role}_PASSWORD" for role in ("OWNER", "APP", "READER", "RETENTION")}
    assert known.pop("migrate") == migration
    assert known.pop("read") == {"POSTGRES_READER_PASSWORD", "REDIS_PASSWORD"}
    assert known.pop("keeper") == {
        "POSTGRES_APP_PASSWORD",
        "POSTGRES_RETENTION_PASSWORD",
        "REDIS_PASSWORD",
        "RABBITMQ_PASSWORD",
    }, "it seals old jobs"
    assert {frozenset(names) for names in known.values()} == {
        frozenset({"POSTGRES_APP_PASSWORD", "REDIS_PASSWORD", "RABBITMQ_PASSWORD"})
    }


def test_everything_waits_for_the_migration() -> None:
    waiting = {name for name, part in PARTS.items() if part["depends_on"].get(ONE_SHOT)}

    assert waiting == PARTS.keys() - {ONE_SHOT}
    assert {PARTS[name]["depends_on"][ONE_SHOT]["condition"] for name in waiting} == {"service_completed_successfully"}


@pytest.mark.parametrize("name", sorted(PARTS.keys() - {ONE_SHOT}))
def test_no_part_counts_as_reachable_from_its_own_machine_only(name: str) -> None:
    """Such a part may probe loopback, and a container's loopback is nobody's business."""
    assert PARTS[name]["environment"]["LOOKUP_HOST"] == "0.0.0.0"


def test_redis_keeps_what_it_was_told() -> None:
    *_, script = SERVICES["redis"]["command"]

    assert "\nappendonly yes\n" in script
    assert "\nmaxmemory-policy noeviction\n" in script
    assert "\nrequirepass $REDISCLI_AUTH\n" in script


def test_every_mounted_file_is_in_the_repository() -> None:
    mounts = [mount.split(":")[0] for service in SERVICES.values() for mount in service.get("volumes", [])]

    files = [mount for mount in mounts if mount.startswith("./") and Path(mount).suffix]

    assert len(files) == 2
    assert [file for file in files if not (REPOSITORY / file).is_file()] == []


def test_who_reads_history_sees_what_the_keeper_seals() -> None:
    """A part that looks for a sealed job in a folder of its own answers 503."""
    folders = {name: part["environment"].get("LOOKUP_SEGMENTS_DIR") for name, part in PARTS.items()}
    folder = folders["keeper"]

    mounts = {name: mount for name, part in PARTS.items() for mount in part.get("volumes", []) if mount.startswith("segments:")}

    assert {name for name, of_part in folders.items() if of_part} == mounts.keys() == {"keeper", "projector", "read"}
    assert set(folders.values()) == {folder, None}
    assert mounts.pop("keeper") == f"segments:{folder}"
    assert set(mounts.values()) == {f"segments:{folder}:ro"}, "they only read"
    assert "segments" in yaml.safe_load(COMPOSE)["volumes"]
    assert re.search(rf"install -d -o 10001 -g 10001 .*{folder}$", DOCKERFILE, re.MULTILINE), "else the volume is root's"


def test_the_image_holds_every_package() -> None:
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    packages = {name.partition(".")[0] for name in declared}
    allowed = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()

    copied = set(re.findall(r"^COPY (\w+) \1$", DOCKERFILE, re.MULTILINE))

    assert copied == packages
    assert {f"!{name}" for name in packages} <= set(allowed)


def test_the_image_runs_without_root_and_from_locked_packages() -> None:
    build, final = DOCKERFILE.split("\nFROM ")[1:]

    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) == ["python:3.13-slim-trixie"] * 2
    assert "--require-hashes --only-binary=:all: -r requirements.lock" in build
    assert "install --no-deps ." in build
    assert "pip" not in final.replace("pip --python", "")
    assert "apt-get" not in DOCKERFILE
    assert re.search(r"^USER 10001:10001$", final, re.MULTILINE)
    assert "\nHEALTHCHECK NONE\n" in final
    assert "\nSTOPSIGNAL SIGTERM\n" in final


def test_on_loopback_a_part_keeps_its_role_and_changes_its_server() -> None:
    """What the harness gives a part is what compose.yaml gives it, but for the addresses."""
    here = Servers(
        database_owner_url="postgresql://me:mine@127.0.0.1:5555/lookup_7?application_name=t",
        redis_url="redis://127.0.0.1:6666/3",
        broker_url="amqp://guest:guest@127.0.0.1:5666/v",
        ports={"write": 7777},
        data_dir=Path("work/data"),
    )

    write = here.environment_of("write", PARTS["write"]["environment"])
    migrate = here.environment_of("migrate", PARTS["migrate"]["environment"])

    assert write == {
        "LOOKUP_DATABASE_URL": "postgresql://lookup_app:s3cret@127.0.0.1:5555/lookup_7?application_name=t",
        "LOOKUP_REDIS_URL": "redis://127.0.0.1:6666/3",
        "LOOKUP_BROKER_URL": "amqp://guest:guest@127.0.0.1:5666/v",
        "LOOKUP_LOG_FORMAT": "json",
        "LOOKUP_HOST": "127.0.0.1",
        "LOOKUP_PORT": "7777",
        "LOOKUP_METRICS_PORT": "0",
    }
    assert migrate["LOOKUP_DATABASE_OWNER_URL"] == here.database_owner_url


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every plain value of a document with the path of names that leads to it."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{path}/{key}")
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _leaves(value, f"{path}/{number}")
    else:
        yield path, str(node)
