"""Another folder for a cluster of our own, where the name of Ray's choice is too long for sockets.

The name of a Unix socket has 107 bytes at most. Ray would fail when it starts.
"""

import logging
import os

from roll_sft.base.errors import ResourceError
from roll_sft.base.text import shown
from roll_sft.runtime.cluster import LONGEST_FOLDER

LOG = logging.getLogger(__name__)
SHORT = "/tmp/ray"  # what Ray takes where neither variable is set


def short_folder() -> str:
    """A folder in place of one below TMPDIR, which is for any program's files.

    Raises `ResourceError` (exit 4) where RAY_TMPDIR, which is for Ray alone, is too long.
    """
    most = LONGEST_FOLDER - len("/ray")
    if (wanted := os.environ.get("RAY_TMPDIR")) is not None:
        raise ResourceError(
            f"RAY_TMPDIR: {shown(wanted)} has {len(os.fsencode(wanted))} bytes; the sockets of Ray"
            f" leave room for {most}; set it to a folder with a shorter name, or unset it"
        )
    LOG.info("Ray's sockets and logs go to %s: TMPDIR has more than %d bytes", SHORT, most)
    return SHORT
