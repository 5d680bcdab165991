"""How a configuration becomes flags, under headings where there are many.

tyro gives a heading only to a dataclass inside another, and configurations are flat: settings of a run are one JSON object and
one constructor call. So tyro sees a shadow of the configuration, a small dataclass for each heading and one around them, with
the same names, types, defaults and docstrings; what it reads becomes the flat configuration again. A configuration says where
its headings are by HEADINGS, from the first field of each to its title; titles stand in the order of that dictionary, fields
in that of their declaration.
"""

import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields, make_dataclass
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import tyro

Config = TypeVar("Config")


def parse_flags(config_type: type[Config], arguments: list[str], defaults: Mapping[str, Any], **texts: Any) -> Config:
    """`config_type` from `arguments` and, what they do not set, from `defaults`, else as declared. texts: of tyro.cli."""
    found: Any = tyro.cli(_shadow(config_type, defaults), args=arguments, config=(tyro.conf.OmitArgPrefixes,), **texts)
    titles = {_identifier(title) for title in headings(config_type)}
    values: dict[str, Any] = {}
    for name, value in vars(found).items():
        values |= vars(value) if name in titles else {name: value}
    return config_type(**values)


def headings(config_type: Any) -> dict[str, list[Field[Any]]]:
    """The fields below each title. Those above the first heading, and positional ones, are in none."""
    starts: Mapping[str, str] = getattr(config_type, "HEADINGS", {})
    types = get_type_hints(config_type, include_extras=True)
    below: dict[str, list[Field[Any]]] = {title: [] for title in starts.values()}
    title = None
    for one in fields(config_type):
        title = starts.get(one.name, title)
        if title is not None and tyro.conf.Positional not in get_args(types[one.name]):
            below[title].append(one)
    return below


def _shadow(config_type: Any, defaults: Mapping[str, Any]) -> Any:
    types, texts = get_type_hints(config_type, include_extras=True), docstrings(config_type)

    def entry(one: Field[Any]) -> tuple[str, Any, Any]:
        hint = Annotated[types[one.name], tyro.conf.arg(help=texts.get(one.name, ""))]
        default = defaults.get(one.name, one.default)
        return one.name, hint, field(kw_only=True) if default is MISSING else field(default=default, kw_only=True)

    groups = headings(config_type)
    grouped = {one.name for group in groups.values() for one in group}
    entries: list[Any] = [entry(one) for one in fields(config_type) if one.name not in grouped]
    for title, group in groups.items():
        made = make_dataclass(_identifier(title), [entry(one) for one in group], namespace={"__doc__": ""})
        entries.append((_identifier(title), Annotated[made, tyro.conf.arg(name=title)], field(kw_only=True)))
    return make_dataclass(config_type.__name__, entries, namespace={"__doc__": ""})


def docstrings(config_type: type) -> dict[str, str]:
    """The text under each field, in one line; that of the class it was declared in last."""
    texts: dict[str, str] = {}
    for owner in reversed(config_type.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(tree, ast.ClassDef), owner
        for one, text in zip(tree.body, tree.body[1:], strict=False):
            declared = isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
            if declared and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[one.target.id] = " ".join(str(text.value.value).split())  # pyright: ignore[reportAttributeAccessIssue]
    return texts


def _identifier(title: str) -> str:
    return title.replace(" ", "_").replace("-", "_")
