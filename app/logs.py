"""How the program's log looks: text for people, JSON for machines. One line an entry, on standard error."""

import json
import logging
import sys
from datetime import UTC, datetime

_CHATTY = {
    "httpx": logging.WARNING,
    "httpcore": logging.WARNING,
    "faststream": logging.WARNING,
    "stamina": logging.ERROR,
    "aiormq": logging.CRITICAL,
    "aio_pika": logging.CRITICAL,
}


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def set_up_logs(log_format: str, level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if log_format == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # These say every request, every retry, or every reconnection attempt with its trace, at levels meant for people.
    for chatty, at_least in _CHATTY.items():
        logging.getLogger(chatty).setLevel(at_least)
