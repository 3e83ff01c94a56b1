"""Which running request an operator means: by the gateway's id, the client's, or a short form of either."""

import re
from collections.abc import Collection

from ares.names import matching

# What the id in a reply begins with (`generation.ReplyForm.id_prefix`).
_OF_REPLY = re.compile(r"(chatcmpl-|cmpl-|resp_|msg_)")
# The gateway's own ids, of clients that send none: no other id begins with eight digits of one.
_OWN = re.compile(r"[0-9a-f]{32}")
_BEGINNING = re.compile(r"[0-9a-f]{8,32}")


def resolve(given: str, running: Collection[str]) -> list[str]:
    """Return the ids of the running sessions that `given` means; several where it is ambiguous.

    It may be the id of a session, a short form of one with two dots, the id of a request with several choices, or what
    stands as `id` in a reply. Other ids with the same beginning do not match: the request itself may just have ended.
    """
    own = _OF_REPLY.sub("", given, count=1) if _OF_REPLY.match(given) else given
    for name in (given, own):
        if found := matching(name, running):
            return found
    # The first choice of a request that has only one.
    single = own.removesuffix("-0")
    if _OWN.fullmatch(single) and single in running:
        return [single]
    rest = r"[0-9a-f]*" if _BEGINNING.fullmatch(own) else ""
    # The choices of a request, and those that came later under the same id of the client's.
    family = re.compile(rf"{re.escape(own)}{rest}(-[0-9]+)?(#[0-9]+)?")
    return [name for name in running if family.fullmatch(name)]
