"""JSON files that a user names."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from flashmoe.errors import FlashmoeError
from flashmoe.types import format_size


def read_json_file(path: Path, most: int, error: type[FlashmoeError]) -> Any:
    """The value in a file of at most so many bytes.  Raises `error`, with one line that names the file."""
    try:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise error(f"{path} is no regular file: give a file with JSON")
            if info.st_size > most:
                raise error(f"{path} is larger than {format_size(most)}: such a file is not")
            # One byte more than there should be, if it grows meanwhile; read() allocates what it is asked for.
            return json.loads(file.read(info.st_size + 1))
    except OSError as failure:
        raise error(f"{path} cannot be read: {failure.strerror}") from failure
    except (ValueError, RecursionError) as failure:
        raise error(f"{path} is no JSON ({failure}): correct it") from failure
