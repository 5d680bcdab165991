"""The model card of an export: where the model comes from, how it was made and measured, how its reading agrees."""

from pathlib import Path
from typing import Any

from trilobit import __version__
from trilobit.errors import TrilobitError
from trilobit.export.verification import Check
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
TAGS = {"compressed-tensors": "compressed-tensors"}
HUB_SECONDS = 10.0
LIBRARY = {"native": "trilobit", "gguf": "gguf"}  # all else: transformers


def write_card(
    card: Path, source: Path, name: str, to: str, form: str, check: Check, asked: str | None = None,
    place: str | None = None,
) -> None:  # fmt: skip
    """Write the file `card` for the export of `source`: a run, or model/ or latent/ in it, or what somebody else has
    made, which is then its own base. asked: what the user called it, if that is not where it lies. place: where what is
    written will be found, a repository or a directory."""
    runs = (folder for folder in (source, source.parent) if (folder / "run.json").exists())
    record = read_json(folder / "run.json") if (folder := next(runs, None)) is not None else {}
    settings, result = record.get("config", {}), record.get("result", {})
    base = settings.get("model") if record else asked or str(source)
    shown, repository = named(base) if base else (settings.get("architecture"), None)
    front = [
        "---",
        f"library_name: {LIBRARY.get(to, 'transformers')}",
        f"tags: [{TAGS.get(to, 'ternary, 1.58-bit')}, trilobit]",
    ]
    if repository is not None:
        front.append(f"base_model: {repository}")
    if (licence := licence_of(base) or licence_of(repository)) is not None:
        front.append(f"license: {licence}")
    front.append("---")
    parts = [
        "\n".join(front),
        f"# {name}",
        _origin(shown, settings, result, base is not None and licence is None),
        f"Form: {form}. Run it with\n\n    {RUN[to].format(name=name, place=place or name)}",
    ]
    if measured := _measured(result):
        parts.append(measured)
    parts.append("## What was written, read back\n\n" + "\n".join(check.table()))
    card.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def is_hub_id(base: str) -> bool:
    """Whether a --model names a repository rather than a place on someone's disk."""
    return base.count("/") == 1 and not base.startswith((".", "/", "~", "out/")) and not Path(base).exists()


def licence_of(base: str | None) -> str | None:
    """What the base model's own card says its licence is; None if it has no card, or the hub cannot be reached."""
    from huggingface_hub import HfApi, ModelCard

    if base is None:
        return None
    try:
        if Path(base).is_dir():
            return ModelCard.load(Path(base) / "README.md").data.license  # pyright: ignore[reportAttributeAccessIssue]
        if not is_hub_id(base):
            return None
        card = HfApi().model_info(base, timeout=HUB_SECONDS).card_data  # one question: downloads are tried for half a minute
        return None if card is None else card.license
    except Exception:  # the hub client raises nearly every kind there is
        return None


def named(base: str) -> tuple[str, str | None]:
    """What to call a base model, and its repository if it is known to have one: of a directory what its own card names, else
    its name, and that of the folder above where it is the model/ of something."""
    if is_hub_id(base):
        return base, base
    place = Path(base)
    if place.resolve() == EMBEDDED:
        return "the 3.5 M Llama that comes with trilobit", None
    name = place.resolve().name
    if name in PARTS:
        name = place.resolve().parent.name
    try:
        if isinstance(origin := _front(place / "README.md").get("base_model"), str) and is_hub_id(origin):
            return f"{name} ({origin})", origin
        origin = read_json(place / "config.json").get("_name_or_path")
    except (OSError, ValueError, TrilobitError):
        return name, None
    return (f"{name} ({origin}, says its config.json)" if isinstance(origin, str) and is_hub_id(origin) else name), None


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
