"""What it takes for a file's name to outlive a power cut: its folder has to be on disk too."""

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Put on disk which names are in a folder: after a file was made there, or renamed into it. Raises `OSError`."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
