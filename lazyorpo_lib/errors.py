"""What goes wrong between here and the hub, in one sentence with the way out; never with a token in it.

Nothing is fetched here and nothing heavy imported: errors of datasets, transformers, huggingface_hub and whichever HTTP
library it is built on are known by the names of their kinds and by their HTTP status.
"""

import re

_AWAY = {"ConnectionError", "TimeoutError", "TransportError", "LocalEntryNotFoundError", "OfflineModeIsEnabled"}


def look(error: Exception) -> tuple[set[str], set[int], str]:
    """Kinds and HTTP statuses of an error and of those behind it; its text on one line, without what looks like a token."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    kinds = {kind.__name__ for fault in chain for kind in type(fault).__mro__}
    status = {getattr(getattr(fault, "response", None), "status_code", None) or 0 for fault in chain}
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return kinds, status, re.sub(r"(hf_|Bearer )\w+", r"\1…", text)


def fault(error: Exception, page: str, instead: str) -> str:
    """The end of a sentence that begins with what could not be fetched; empty if the hub is not to blame.

    Args:
        page: where the hub shows it, without the host: "owner/name" or "datasets/owner/name".
        instead: what can be given in its place.
    """
    kinds, status, text = look(error)
    missing = kinds & {"DatasetNotFoundError", "RepositoryNotFoundError"} or (404 in status and "EntryNotFoundError" not in kinds)
    if "GatedRepoError" in kinds or "is a gated dataset" in text or 403 in status or (401 in status and not missing):
        return (
            f"needs a login: ask for access at https://huggingface.co/{page} and set HF_TOKEN to a token of that account (in "
            f"Colab: the secret of that name), or give {instead}"
        )
    if 429 in status:
        return f"is refused by the hub for now (too many requests): wait a few minutes, set HF_TOKEN, or give {instead}"
    if missing:
        return f"is not here and not on the hub: check the name, set HF_TOKEN if it is private, or give {instead}"
    if max(status) >= 500 or kinds & _AWAY:
        return f"is not here, and the hub cannot be reached: check the network, or give {instead}"
    return ""
