"""What is said of a wrong value: its place, the value, the rule, and the nearest spelling."""

import difflib
from collections import Counter
from typing import Any

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, kind: type[BaseModel], where: str = "") -> list[str]:
    """Each fault of a pydantic error as one line: place, value, rule and, for an unknown name, the nearest."""
    lines = {}
    counts = Counter(tuple(p for p in fault["loc"] if not _is_type_tag(p)) for fault in error.errors())
    for fault in error.errors():
        path = [p for p in fault["loc"] if not _is_type_tag(p)]
        place = ".".join(str(p) for p in ([where] if where else []) + path)
        if fault["type"] == "extra_forbidden":
            known = _fields_at(kind, path[:-1])
            lines[place] = f"{place}: unknown setting{nearest(str(path[-1]), known)}; there are: {', '.join(known)}"
        elif fault["type"] == "list_type" and counts[tuple(path)] > 1 and not isinstance(fault["input"], list | str | dict):
            continue  # the other branch of "one value, or one for each member" says what is wrong
        elif fault["type"] == "missing":
            lines[place] = f"{place}: missing; give a value"
        elif fault["type"] == "value_error":
            lines[place + fault["msg"]] = f"{place}: {fault['msg'].removeprefix('Value error, ')}"
        else:
            message = _rule(fault)
            line = f"{place} = {shown(fault['input'])}: {message[0].lower()}{message[1:]}"
            lines[place] = lines[place] + ", or " + message[0].lower() + message[1:] if place in lines else line
    return list(lines.values())


def _rule(fault: Any) -> str:
    """What pydantic says of a value, without Python's words for the types of a file."""
    if fault["type"] in ("model_type", "dict_type"):
        return "should be a table"
    if fault["type"] == "too_short":
        return f"should have at least {fault['ctx']['min_length']} of them"
    if fault["type"] == "too_long":
        return f"should have at most {fault['ctx']['max_length']} of them"
    return fault["msg"].replace("Input should be", "should be")


def nearest(word: str, known: Any) -> str:
    """'; did you mean "x"?' where some known word is near, else nothing."""
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def quoted(text: Any) -> str:
    """A text in a message: in double quotes, on one line, and not long."""
    inner = str(text).encode("unicode_escape").decode("ascii") if not str(text).isprintable() else str(text)
    return f'"{inner}"' if len(inner) <= 60 else f'"{inner[:57]}..."'


def _is_type_tag(part: Any) -> bool:
    """Whether a part of a pydantic location names a branch of a union, not a field."""
    return isinstance(part, str) and (
        "[" in part or part in {"int", "float", "str", "bool", "constrained-int", "constrained-float"}
    )


def _fields_at(kind: type[BaseModel], path: list[Any]) -> list[str]:
    for part in path:
        if isinstance(part, int) or part not in kind.model_fields:
            continue
        annotation = kind.model_fields[part].annotation
        models = [a for a in (annotation, *getattr(annotation, "__args__", ())) if isinstance(a, type)]
        kind = next((m for m in models if issubclass(m, BaseModel)), kind)
    return list(kind.model_fields)


def printable(line: str) -> str:
    """A line that cannot command a terminal: names and values out of files of others stand in messages and tables."""
    return line if line.isprintable() else "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


def shown(value: Any) -> str:
    """A value in a message: on one line, and not long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
