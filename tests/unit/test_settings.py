"""A setting that is not what it must be: named in a sentence, without its value, which may be a secret."""

import pytest

from app.settings import Settings, SettingUnreadable

POSTGRES = "must be the address of a database, postgresql://…."
REDIS = "LOOKUP_REDIS_URL must be an address like redis://host:port."
BROKER = "LOOKUP_BROKER_URL must be an address like amqp://host:port."


@pytest.mark.parametrize(
    ("variable", "value", "complaint"),
    [
        ("LOOKUP_DATABASE_URL", "secret", f"LOOKUP_DATABASE_URL {POSTGRES}"),
        ("LOOKUP_DATABASE_OWNER_URL", "postgresql://me:secret@db/x?teapot=1", f"LOOKUP_DATABASE_OWNER_URL {POSTGRES}"),
        ("LOOKUP_DATABASE_READ_URL", "http://me:secret@db/x", f"LOOKUP_DATABASE_READ_URL {POSTGRES}"),
        ("LOOKUP_REDIS_URL", "secret", REDIS),
        ("LOOKUP_REDIS_URL", "redis://:secret@host:teapot", REDIS),
        ("LOOKUP_REDIS_URL", "redis://:secret@host:0", REDIS),
        ("LOOKUP_BROKER_URL", "redis://:secret@host", BROKER),
        ("LOOKUP_BROKER_URL", "amqp://:secret@host:99999", BROKER),
        ("LOOKUP_PORT", "secret", "LOOKUP_PORT: Input should be a valid integer, unable to parse string as an integer."),
        ("LOOKUP_HEADS_FACTS", "0", "LOOKUP_HEADS_FACTS: Input should be greater than or equal to 1."),
        ("LOOKUP_TIMEOUT_S", "secret", "LOOKUP_TIMEOUT_S must be JSON."),
        (
            "LOOKUP_TIMEOUT_S",
            '{"Ping": "secret"}',
            "LOOKUP_TIMEOUT_S[Ping]: Input should be a valid number, unable to parse string as a number.",
        ),
        (
            "LOOKUP_PROBE_ALLOW",
            '["10.0.0.1/8"]',
            " ".join(f"LOOKUP_PROBE_ALLOW[0]: Input is not a valid {family} network." for family in ("IPv4", "IPv6")),
        ),
    ],
)
def test_a_setting_that_cannot_be_is_named(variable: str, value: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)

    with pytest.raises(SettingUnreadable) as refused:
        Settings()

    assert str(refused.value) == complaint


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LOOKUP_DATABASE_URL", "postgresql:///lookup?host=/run/postgresql"),
        ("LOOKUP_DATABASE_URL", "host=/run/postgresql dbname=lookup"),
        ("LOOKUP_REDIS_URL", "redis://127.0.0.1"),
        ("LOOKUP_REDIS_URL", "rediss://me:secret@host:6380/3"),
        ("LOOKUP_REDIS_URL", "unix:///run/valkey.sock?db=1"),
        ("LOOKUP_BROKER_URL", "amqps://me:secret@host/lookup"),
    ],
)
def test_every_form_of_an_address_is_taken_as_it_is(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)

    assert Settings().model_dump()[variable.removeprefix("LOOKUP_").lower()] == value
