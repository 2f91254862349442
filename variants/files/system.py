"""What safetensors says of a disk, as what the system said."""

import os
import re
from pathlib import Path


def system_error(error: Exception, path: Path) -> OSError:
    """Its "... I/O error: No space left on device (os error 28)" as an OSError of that number that names the path."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is None:
        return OSError(f"{path} cannot be written: {error}")
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path))
