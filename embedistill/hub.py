"""Whether the Hugging Face Hub answers, found out once and within seconds."""

from __future__ import annotations

import functools
import urllib.error
import urllib.request

from huggingface_hub import constants

from embedistill.progress import note

TIMEOUT_SECONDS = 5


@functools.cache
def reachable() -> bool:
    """Say whether the Hub (or the mirror that HF_ENDPOINT names) answers; asked once a process."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")  # noqa: S310 - the user's own endpoint
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):  # noqa: S310
            return True
    except urllib.error.HTTPError as error:
        answers = error.code in {404, 405}  # a mirror without a front page; a gateway that refuses is no Hub
    except (OSError, ValueError):
        answers = False
    if not answers:
        note(f"Hub: no answer from {constants.ENDPOINT} within {TIMEOUT_SECONDS} s; going on without it")
    return answers
