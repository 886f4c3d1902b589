"""Read YAML by the rules of YAML 1.2, and refuse what two readers would read differently.

PyYAML follows YAML 1.1, which reads ``no`` as false, ``010`` as 8, ``1:30`` as 90 and ``1e-3`` as a text. Here these
are texts, except for ``1e-3``, which is a number. A key of a recipe that must be a number then refuses them.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from preceptor.errors import UserError

MOST_NODES = 100_000
"""Largest number of values in a document, its aliases written out."""


class Number(float):
    """A number with a point or an exponent, and its text, for a key whose value is a text (a folder named 1.10)."""

    text = ""


class _Loader(yaml.SafeLoader):
    pass


_Loader.yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """Quotes a text that the rules of either version would read as something else."""


_NUMBER = r"(?:0|[1-9][0-9]*)"
for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", rf"-?{_NUMBER}", list("-0123456789")),
    (
        "float",
        rf"[-+]?(?:(?:{_NUMBER}\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|{_NUMBER}[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
        r"|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def _construct_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Number:
    number = Number(loader.construct_yaml_float(node))
    number.text = node.value
    return number


_Loader.add_constructor("tag:yaml.org,2002:float", _construct_number)
_Dumper.add_representer(Number, yaml.SafeDumper.represent_float)


def read_yaml(text: str, place: str) -> Any:
    """Return the value of a YAML document; `place` names it in messages.

    Raises:
        UserError: the document is not valid, has a key twice, refers to itself, or is too deep or too large.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _count(node, place, {}) > MOST_NODES:
                raise UserError(f"{place} is larger than {MOST_NODES:,} values once its aliases are written out")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise UserError(f"{place} is nested too deeply to be read") from None
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        line = f" (line {mark.line + 1})" if mark else ""
        raise UserError(f"{place} is not valid YAML: {reason}{line}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an integer of thousands of digits, an invalid date
        raise UserError(f"{place} is not valid YAML: {' '.join(str(error).split())[:200]}") from error


def write_yaml(value: Any) -> str:
    """Return a value as YAML, with the keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _count(node: yaml.Node, place: str, counted: dict[int, int | None]) -> int:
    """Return the number of values below a node, each alias counted as often as it is used."""
    if id(node) in counted:
        known = counted[id(node)]
        if known is None:
            raise UserError(f"{place}, line {node.start_mark.line + 1}: an alias refers to the value that contains it")
        return known
    counted[id(node)] = None
    total = 1
    if isinstance(node, yaml.MappingNode):
        keys: set[tuple[str, str]] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    line = key.start_mark.line + 1
                    raise UserError(f"{place}, line {line}: the key {key.value!r} is given twice; remove one of them")
                keys.add((key.tag, key.value))
            total += _count(key, place, counted) + _count(value, place, counted)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count(item, place, counted) for item in node.value)
    counted[id(node)] = total
    return total
