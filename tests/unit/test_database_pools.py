"""What a pool makes of a URL: the URL's own word comes first, and ours stands beside it."""

import pytest
from psycopg.conninfo import conninfo_to_dict

from events.connections import ONE_TRY_S, bounded_pool

URL = "postgresql://app@db.example/lookup"


@pytest.mark.parametrize(
    ("query", "of_session", "connect_timeout"),
    [
        ("", "-c lock_timeout=5", str(ONE_TRY_S)),
        ("?options=-c%20application_name%3Done", "-c application_name=one -c lock_timeout=5", str(ONE_TRY_S)),
        ("?connect_timeout=9", "-c lock_timeout=5", "9"),
    ],
    ids=["nothing", "settings", "a time to connect"],
)
async def test_what_the_url_says_stays(query: str, of_session: str, connect_timeout: str) -> None:
    pool = bounded_pool(URL + query, settings="-c lock_timeout=5", name="t", min_size=0, max_size=1, timeout_s=1.0)

    told = conninfo_to_dict(str(pool.conninfo))
    assert (told["options"], told["connect_timeout"]) == (of_session, connect_timeout)
    assert (told["host"], told["user"], told["dbname"]) == ("db.example", "app", "lookup")
