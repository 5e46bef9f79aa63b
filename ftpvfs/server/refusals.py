"""What was refused, for the log: each login and each file transfer in one line, which a ban list can read.

The address comes first, and all that a client has said is written as Python writes text, so that neither a name nor a
path can look like the end of an entry or like another address.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)

LOGIN = {"USER", "PASS"}
FILE_TRANSFERS = {"RETR", "STOR", "STOU", "APPE"}
# What a client has called off itself is no refusal.
CALLED_OFF = "426 Aborted by the client"


def is_refusal(reply: str) -> bool:
    """Tell whether a reply says no."""
    return reply[0] in "45"


def log_refused_command(session: Any, cmd: str, argument: str, user: str, reply: str) -> bool:
    """Log the refusing reply to a command, where that is for a login or a transfer; tell whether it is.

    `user` is whom the client has named before the command.
    """
    if cmd in LOGIN:
        named = argument if cmd == "USER" else user
        logger.warning("login refused: address=%s user=%r reply=%r", session.remote_ip, named, reply)
        return True
    if cmd in FILE_TRANSFERS:
        path = argument if session.fs is None else session.fs.ftp2fs(argument)
        log_failed_transfer(session, cmd, path, reply)
        return True
    return False


def log_failed_transfer(session: Any, cmd: str, path: str, reply: str) -> None:
    """Log a file transfer that came to no good end, but for one that the client has called off."""
    if not reply.startswith(CALLED_OFF):
        logger.warning(
            "transfer refused: address=%s user=%r command=%s path=%r reply=%r",
            session.remote_ip, session.username, cmd, path, reply,
        )  # fmt: skip
