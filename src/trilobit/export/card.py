"""The model card of an export: where the model comes from, how it was made and measured, how its reading agrees."""

import json
import re
from pathlib import Path
from typing import Any

from trilobit import __version__
from trilobit.errors import TrilobitError
from trilobit.export.check import Check
from trilobit.infer.hub import HUB_SECONDS, names_a_place
from trilobit.storage import read_json

RUN = {
    "native": "trilobit generate {place} 'Once upon a time'",
    "gguf": "llama-cli -m {name}.gguf -p 'Once upon a time'",
    "hf": "AutoModelForCausalLM.from_pretrained('{place}')",
    "bf16": "AutoModelForCausalLM.from_pretrained('{place}')",
    "compressed-tensors": "AutoModelForCausalLM.from_pretrained('{place}')",
}
PARTS = ("model", "latent")  # of a run: what they are called says nothing
EMBEDDED = Path(__file__).resolve().parents[1] / "assets" / "model"
TERNARY_TAGS = ("ternary", "1.58-bit")
LICENCE = ("license", "license_name", "license_link")  # in a card's metadata; the others say which one `other` is
LIBRARY = {"native": "trilobit", "gguf": "gguf"}  # all else: transformers


def write_card(
    card: Path, source: Path, name: str, to: str, form: str, check: Check, asked: str | None = None,
    place: str | None = None, ternary: bool = True,
) -> None:  # fmt: skip
    """Write the file `card` for the export of `source`: a run, or model/ or latent/ in it, or what somebody else has
    made, which is then its own base. asked: what the user called it, if that is not where it lies. place: where what is
    written will be found, a repository or a directory. ternary: whether the model is."""
    runs = (folder for folder in (source, source.parent) if (folder / "run.json").exists())
    record = read_json(folder / "run.json") if (folder := next(runs, None)) is not None else {}
    settings, result = record.get("config", {}), record.get("result", {})
    base = settings.get("model") if record else asked or str(source)
    lies = record.get("base_place")
    shown, repository = named(base, lies) if base else (settings.get("architecture"), None)
    tags = [to] if to == "compressed-tensors" else [*TERNARY_TAGS] if ternary else []
    front = [
        "---",
        f"library_name: {LIBRARY.get(to, 'transformers')}",
        f"tags: [{', '.join([*tags, 'trilobit'])}]",
    ]
    if repository is not None:
        front.append(f"base_model: {repository}")
    licence = licence_of(base, lies)
    front += [f"{key}: {_yaml(value)}" for key, value in licence.items()]
    front.append("---")
    parts = [
        "\n".join(front),
        f"# {name}",
        _origin(shown, settings, result, base is not None and not licence),
        f"Form: {form}. Run it with\n\n    {RUN[to].format(name=name, place=place or name)}",
    ]
    if measured := _measured(result):
        parts.append(measured)
    parts.append("## What was written, read back\n\n" + "\n".join(check.table()))
    card.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def is_hub_id(base: str, lies: str | None = None) -> bool:
    """Whether a --model names a repository rather than a place on someone's disk. lies: what run.json says of that: "hub" or
    "directory"; a relative place may not be seen from here."""
    if lies is not None:
        return lies == "hub"
    return base.count("/") == 1 and not names_a_place(base)


def licence_of(base: str | None, lies: str | None = None) -> dict[str, Any]:
    """What the base model's own card says of its licence; empty if it has no card, or the hub cannot be reached."""
    from huggingface_hub import HfApi, ModelCard

    if base is None:
        return {}
    try:
        if lies != "hub" and Path(base).is_dir():
            found = ModelCard.load(Path(base) / "README.md").data
        elif is_hub_id(base, lies):
            found = HfApi().model_info(base, timeout=HUB_SECONDS).card_data  # one question: fetching tries for half a minute
        else:
            return {}
    except Exception:  # the hub client raises nearly every kind there is
        return {}
    said = {key: value for key in LICENCE if (value := getattr(found, key, None)) is not None}
    if is_hub_id(base, lies) and "://" not in (link := str(said.get("license_link", "://"))):
        said["license_link"] = f"https://huggingface.co/{base}/blob/main/{link}"  # a file there, not beside our card
    return said if "license" in said else {}


def named(base: str, lies: str | None = None) -> tuple[str, str | None]:
    """What to call a base model, and its repository if it is one: a directory is called by its name, or that of the folder
    above where it is the model/ of something, with what its card or configuration says it was made from or is a copy of."""
    if is_hub_id(base, lies):
        return base, base
    place = Path(base)
    if place.resolve() == EMBEDDED:
        return "the 3.5 M Llama that comes with trilobit", None
    name = place.resolve().name
    if name in PARTS:
        name = place.resolve().parent.name
    try:
        if isinstance(origin := _front(place / "README.md").get("base_model"), str) and is_hub_id(origin):
            return f"{name} (made from {origin}, says its card)", None  # a generation further back than our base
        origin = read_json(place / "config.json").get("_name_or_path")
    except (OSError, ValueError, TrilobitError):
        return name, None
    return (f"{name} ({origin}, says its config.json)" if isinstance(origin, str) and is_hub_id(origin) else name), None


def _yaml(value: Any) -> str:
    """A value of the metadata, quoted if it is not one plain word."""
    return value if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w.+/:-]*\w", value) else json.dumps(value)


def _front(card: Path) -> dict[str, Any]:
    """The metadata on top of a card; none where there is no card."""
    from huggingface_hub import ModelCard

    return ModelCard.load(card).data.to_dict() if card.is_file() else {}


def _origin(shown: str | None, settings: dict[str, Any], result: dict[str, Any], unknown: bool) -> str:
    said = {
        "recipe": settings.get("recipe"), "placement": settings.get("placement"), "gain": settings.get("gain"),
        "scale": settings.get("scale"), "activations": settings.get("activations"), "cover": settings.get("cover"),
        "schedule": settings.get("schedule"), "optimizer": settings.get("optimizer"), "lr": settings.get("lr"),
        "tokens": f"{result['tokens']:,}" if "tokens" in result else None,
    }  # fmt: skip
    listed = ", ".join(f"{key} {value}" for key, value in said.items() if value is not None)
    text = f"Made from {shown} by trilobit {__version__}{f': {listed}' if listed else ''}."
    return f"{text} The licence of the base model applies; it could not be read here." if unknown else text


def _measured(result: dict[str, Any]) -> str | None:
    """Held-out loss of the original and of this model, from run.json."""
    rows = [("original", "base_nats_per_token", "base_perplexity"), ("this model", "nats_per_token", "perplexity")]
    if any(key not in result for _, *keys in rows for key in keys):
        return None
    lines = [f"| {name} | {result[nats]:.4f} | {result[ppl]:.2f} |" for name, nats, ppl in rows]
    counted = f"{result['heldout_tokens']:,} " if "heldout_tokens" in result else ""
    head = f"## Measured on {counted}held-out tokens\n\n| | nats per token | perplexity |\n|---|---|---|"
    return "\n".join([head, *lines])
