"""A chat template -> Ollama's Modelfile: the texts between turns, cut out, put together again, compared.

A template that writes the same texts around every turn is translated, and no other. Nothing runs but the
template, under a limit of time and memory.
"""

import re

from ..errors import UserError
from ..rows import limits

_S, _U, _A, _V = (f"lazyorpo{word}mark" for word in ("system", "first", "answer", "second"))
# The two talks that both must write alike: (role, text) of each turn.
_TALKS = (
    [("user", "What is the sky?")],
    [("system", "Be brief."), ("user", "Hello!"), ("assistant", "Hi."), ("user", "Why?"),
     ("assistant", "So."), ("user", "And now?")],
)  # fmt: skip
_NAME = re.compile(r"(?:[\w.-]+/)?(?:[\w-]+/)?[\w.-]+(?::[\w.-]+)?", re.ASCII)


def check_name(name: str) -> None:
    """Raise UserError where Ollama takes no model of that name."""
    if not _NAME.fullmatch(name) or len(name) > 128 or ".." in name:
        allowed = "letters, digits, . _ - as in my-model, me/my-model or my-model:v2"
        raise UserError(f"{name!r} is no name of a model in Ollama: give one of {allowed}.")


def modelfile(tokenizer, ends: list[int]) -> str:
    """Write the Modelfile for a folder of safetensors; "" where the chat template cannot be translated.
    `ends`: the tokens that end an answer."""
    try:
        with limits.seconds(10), limits.memory():
            texts = _texts(lambda talk: _written(tokenizer, talk))
            same = all(_put(texts, talk) == _written(tokenizer, talk) for talk in _TALKS)
    except (Exception, limits.OverLimit):  # whatever a stranger's template raises
        return ""
    template = _go(**texts)
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    stops = tokenizer.convert_ids_to_tokens(ends)
    stops += [token for token in special if texts["next_user"].lstrip().startswith(token)]
    said = "".join(texts[name] for name in texts if name != "at_last")
    if not same or "{{" in said or '"' in "".join(stops) or '"""' in template or template[0] == '"':
        return ""  # it is not what the template writes, or would not be read as it is written
    lines = ["# In this folder: ollama create NAME -f Modelfile", "FROM .", f'TEMPLATE """{template}"""']
    return "\n".join([*lines, *(f'PARAMETER stop "{token}"' for token in dict.fromkeys(stops)), ""])


def _written(tokenizer, talk) -> str:
    """Write a talk and the start of its next answer as the chat template does, but for a first token that
    Ollama adds itself; a system turn that the template does not take begins the user's, as in training."""
    text, bos = "", tokenizer.bos_token
    messages = [{"role": role, "content": text} for role, text in talk]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:  # as a template does at what it does not take
        if talk[0][0] != "system":
            raise
    if talk[0][0] == "system" and talk[0][1] not in text:
        return _written(tokenizer, [("user", f"{talk[0][1]}\n\n{talk[1][1]}"), *talk[2:]])
    adds = bos and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if adds else text


def _cut(text: str, *marks: str) -> list[str]:
    """Give what is around marks, each of which must be there once, in this order; else nothing."""
    found = re.fullmatch("(.*)".join(["", *marks, ""]), text, re.DOTALL)
    return list(found.groups()) if found and all(text.count(mark) == 1 for mark in marks) else []


def _texts(write) -> dict:
    """Give the texts that a template puts between turns: before the first user's, of each kind of step from
    one turn to the next, before and after a system text, and whether that goes with the last turn."""
    talk = [("user", _U), ("assistant", _A), ("user", _V)]
    bare, text = _cut(write(talk), _U, _A, _V), write([("system", _S), *talk])
    first, last = _cut(text, _S, _U, _A, _V), _cut(text, _U, _A, _S, _V)
    around = first[:2] or [last[2].removeprefix(bare[2]), last[3]]  # IndexError where it is neither
    names = ("head", "answer", "next_user", "start", "before", "after", "at_last")
    return dict(zip(names, [*bare, *around, not first], strict=True))


def _put(t: dict, talk) -> str:
    """Put a talk together from the texts, as Ollama does from the template of `_go`."""
    turns = [turn for turn in talk if turn[0] != "system"]
    system = "".join(t["before"] + text + t["after"] for role, text in talk if role == "system")
    out = t["head"] if t["at_last"] or not system else system
    for role, text in turns[:-1]:
        out += text + t["answer" if role == "user" else "next_user"]
    return out + system * t["at_last"] + turns[-1][1] + t["start"]


def _go(head, answer, next_user, start, before, after, at_last) -> str:
    """Write the texts as a template of Go's."""
    system = f"{before}{{{{ $.System }}}}{after}"
    begin = head if at_last else f"{{{{ if .System }}}}{system}{{{{ else }}}}{head}{{{{ end }}}}"
    with_last = f"{{{{ if and $.System $last }}}}{system}{{{{ end }}}}" * at_last
    follows = start if start == answer else f"{{{{ if $last }}}}{start}{{{{ else }}}}{answer}{{{{ end }}}}"
    return (
        f"{begin}{{{{ range $i, $_ := .Messages }}}}{{{{ $last := eq (len (slice $.Messages $i)) 1 }}}}"
        f'{{{{ if eq .Role "user" }}}}{with_last}{{{{ .Content }}}}{follows}'
        f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}'
        f"{{{{ if not $last }}}}{next_user}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"
    )
