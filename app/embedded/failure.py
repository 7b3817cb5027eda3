"""The one way in which an embedded server fails to start."""

from pathlib import Path


class EmbeddedError(Exception):
    """An embedded server cannot run; the text is ours and fit for a terminal. `log` names the server's own account, if any."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message if log is None else f"{message} The server's log: {log}")
        self.log = log
