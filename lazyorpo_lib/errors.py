"""UserError; what the hub, a model or the disk says, in one sentence.

Nothing is fetched here, nothing heavy imported, and no token told: errors of datasets, transformers,
huggingface_hub and its HTTP library are known by the names of their kinds and by their HTTP status.
What is said or written passes `without_secrets`, and on its way to a screen `printable`.
"""

import contextlib
import errno
import functools
import os
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

_AWAY = {*"ConnectionError TimeoutError TransportError OfflineModeIsEnabled LocalEntryNotFoundError".split()}
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_RIGHTS = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}
_TORN = "PytorchStreamWriter|inline_container.* unexpected pos"  # torch.save's words, which give no number
_KIND = "is of a kind that transformers {} does not know: choose another base_model, or upgrade transformers"
_CODE = "needs code from the hub, which this kit never runs; choose one that transformers has built in"
_MODEL = {  # what a text of transformers holds: the end of "The model … "
    "does not recognize this architecture|Unrecognized model|Unrecognized configuration": _KIND,
    "custom code|trust_remote_code": _CODE,
}
_NAMES = "token|signature|secret|password|passwd|credential|api[_-]?key"
_SECRETS = [  # what may be told, and after it what lets somebody in
    re.compile(pattern)
    for pattern in (
        # A token as user; a password, after a user.
        r"""(://)[^\s/'"<>()\\@]{3,2000}(?=@)""",
        r"""(://[^\s/:'"<>()\\@]{0,200}:)[^\s'"<>()\\]{3,2000}(?=@)""",
        r"""((?<![\w/.:-])[\w.-]{2,200}:(?!//))(?=[^\s@]{0,200}\d)[^\s'"<>()\\]{3,2000}(?=@)""",
        # An address's query, any part of which may sign it.
        r"""(://[^\s?'"<>()\\]{0,2000}\?)[^\s'"<>()\\]+""",
        r"(?<![A-Za-z0-9/])(hf_)(?=[a-z0-9]*[A-Z])[A-Za-z0-9]{8,}\w*",
        r"(?<![A-Za-z0-9])(hf_|api_org_|gh[a-z]_|github_pat_|glpat-|xox[a-z]-|sk-|rpa_|AKIA|AIza|eyJ)"
        r"[\w.-]{0,64}?[A-Za-z0-9]{16}[\w.-]*",
        r"""((?i:bearer\s+|authorization['"]?\s*[:=]\s*['"]?(?:\w+\s+)?))(?=\S{0,200}\d)[\w.~+/=-]{8,}""",
        rf"""([?&](?i:[\w.-]{{0,40}}(?:{_NAMES}|sig))=)[^\s&'"<>()\\]+""",
        rf"""(?<![A-Za-z0-9])((?i:(?:\w{{1,20}}_)?(?:{_NAMES})['"]?(?:\s*[:=]\s*|\s+is\s+)['"]?))"""
        r"""(?=[^\s'"]{0,200}\d)[^\s&'"<>(),\\]{8,}""",
    )
]
_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|_KEY|CREDENTIALS?)$", re.I)  # of the environment
_GONE = "\uf8ff"  # in the place of a secret while others are looked for: of nobody's alphabet
# What a terminal obeys, what turns its neighbours around, and halves of a character, which no file takes.
_CONTROL = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)"
)
_NO_WEIGHTS = "has no weights in safetensors, the only format this kit loads; choose or convert to one"


class UserError(ValueError):
    """A mistake the user can mend: one sentence saying what was given, what is allowed and what to do."""

    def __init__(self, said: object = ""):
        super().__init__(printable(without_secrets(said)))

    def _render_traceback_(self):  # what a notebook shows in place of a traceback
        return [f"LazyORPO: {self}"]


def without_secrets(text: object) -> str:
    """Leave out of a text what lets somebody in: tokens, passwords and queries of addresses, and what the
    environment holds under such a name."""
    text = str(text)
    for name, value in os.environ.items():
        if len(value) > 7 and _SECRET_NAME.search(name):
            text = text.replace(value, _GONE)
    for secret in _SECRETS:
        text = secret.sub(rf"\1{_GONE}", text)
    return text.replace(_GONE, "(token left out)")


def printable(text: object) -> str:
    """Write control sequences of a text in letters, so that no terminal obeys them; lines and tabs stay."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def say(text: object = "", end: str = "\n") -> None:
    """Print a text; what the console cannot show is replaced, and a console that is gone is no error."""
    code = getattr(sys.stdout, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):  # gone; closed
        print(printable(text).encode(code, "replace").decode(code), end=end, flush=True)


def expanded(path) -> Path:
    """Write the home out that a path begins with, as ~ or ~somebody; UserError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        why = "begins with a home that is not there: write the folder out"
        raise UserError(f"{str(path)!r} {why}.") from None


def dissect(error: Exception) -> tuple[set[str], set[int], str]:
    """Give kinds and HTTP statuses of an error and of those behind it; its text on a line, without tokens."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    kinds = {kind.__name__ for fault in chain for kind in type(fault).__mro__}
    status = {getattr(getattr(fault, "response", None), "status_code", None) or 0 for fault in chain}
    text = " ".join(without_secrets(str(error)[:5000]).split())[:300] or type(error).__name__
    return kinds, status, text


def explain_hub(error: Exception, page: str, instead: str) -> str:
    """Write the end of a sentence on what could not be fetched; empty if the hub is not to blame. `page`:
    "owner/name" or "datasets/owner/name"; `instead`: what can be given in its place."""
    kinds, status, text = dissect(error)
    missing = kinds & {"DatasetNotFoundError", "RepositoryNotFoundError"}
    missing = missing or 404 in status and "EntryNotFoundError" not in kinds
    gated = "GatedRepoError" in kinds or "is a gated dataset" in text or 403 in status
    if gated or 401 in status and not missing:
        token = "set HF_TOKEN to a token of that account (in Colab: the secret of that name)"
        why = f"needs a login: ask for access at https://huggingface.co/{page} and {token}"
    elif 429 in status:
        why = "is refused by the hub for now (too many requests): wait a few minutes, set HF_TOKEN"
    elif missing:
        why = "is not here and not on the hub: check the name, set HF_TOKEN if it is private"
    elif max(status) >= 500 or kinds & _AWAY:
        why = "is not here, and the hub cannot be reached: check the network"
    else:
        return ""
    return f"{why}, or give {instead}"


def around(sentence):
    """Make of `sentence(error, …)` a context manager of the other arguments: what is raised in it becomes a
    UserError with that sentence, or passes where that is empty."""

    @contextlib.contextmanager
    def explain(*given):
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if said := sentence(error, *given):
                raise UserError(said) from None  # the texts of others may hold a token
            raise

    return functools.update_wrapper(explain, sentence)


@around
def explain_model(error: Exception, name: str, way_out: str = "check base_model") -> str:
    """Say what transformers, peft and the hub raise about a model."""
    text = dissect(error)[-1]
    known = (why.format(version("transformers")) for said, why in _MODEL.items() if re.search(said, text))
    why = next(known, "") or explain_hub(error, name, "a local folder as base_model")
    if not why:
        no_weights = "safetensors" in text or "Can't load the model" in text
        why = _NO_WEIGHTS if no_weights else f"could not be loaded ({text[:200]}); {way_out}"
    return f"The model {name!r} {why}."


@around
def explain_disk(error, folder, then="run again: it goes on from the last complete checkpoint") -> str:
    """Say that the disk of `folder` is full or fails, or that it may not be used, whichever library met it;
    `then`: what to do once it is mended."""
    text = str(error).strip().split("\n")[0]
    number = re.search(r"\(os error (\d+)\)", text)  # safetensors' kind
    number = error.errno if isinstance(error, OSError) else int(number[1]) if number else None
    home, at = os.path.abspath(folder), os.path.abspath(getattr(error, "filename", None) or "/")
    if number in _RIGHTS and at != "/" and (Path(at).is_relative_to(home) or Path(home).is_relative_to(at)):
        return f"{folder} cannot be used ({text}): give another folder, then {then}."
    if number not in _DISK and not re.search(_TORN, text):
        return ""
    there = next(place for place in (Path(home), *Path(home).parents) if place.is_dir())
    why = f"({text}; {shutil.disk_usage(there).free / 2**20:,.0f} MiB are free): make room, then {then}"
    return f"Nothing more can be written to {folder} {why}."
