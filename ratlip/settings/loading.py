"""From a profile's name and overrides to checked `Settings`, or to a SettingsError in words."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ratlip.errors import SettingsError
from ratlip.settings.sections import Settings

PROFILES = Path(__file__).parent / "profiles"


def profile_names() -> list[str]:
    """The profiles that come with ratlip."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_settings(profile: str | Path, overrides: dict[str, Any] | None = None) -> Settings:
    """Read a profile by name or path and lay dotted overrides over it (`{"model.hidden_size": 16}`; None is none).

    Raises SettingsError that lists every wrong field with its value and what would be allowed.
    """
    name, content = _read_profile(profile, (str(profile),))
    content = lay(content, {dotted: value for dotted, value in (overrides or {}).items() if value is not None})
    try:
        return Settings.model_validate(content)
    except ValidationError as error:
        raise SettingsError(_explain(name, error)) from None


def read_overrides(pairs: list[str] | None) -> dict[str, Any]:
    """`["seed=1", "model.hidden_size=16"]` -> {"seed": 1, ...}; values are read as YAML."""
    overrides = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise SettingsError(f"{pair}: should be KEY=VALUE, e.g. model.hidden_size=16")
        if not value.strip():
            raise SettingsError(f"{pair}: has no value; to keep a setting, leave the option out")
        try:
            overrides[key.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise SettingsError(f"{pair}: {value!r} is no YAML value ({error})") from error
    return overrides


def lay(content: dict, given: dict[str, Any]) -> dict:
    """Dotted settings (`{"model.hidden_size": 16}`) laid over those of a profile; a budget replaces the other."""
    for dotted, value in given.items():
        for part in reversed(dotted.split(".")):
            value = {part: value}
        content = merge(content, value)
    for budget, other in (("steps", "epochs"), ("epochs", "steps")):  # the one asked for replaces the other
        if f"training.{budget}" in given and f"training.{other}" not in given:
            content = merge(content, {"training": {other: None}})
    return content


def merge(base: dict, over: dict) -> dict:
    """`over` laid on `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _read_profile(profile: str | Path, chain: tuple[str, ...]) -> tuple[str, dict]:
    path, own, known = Path(profile), Path(profile).suffix in (".yaml", ".yml"), ", ".join(profile_names())
    if own and not path.is_file():
        raise SettingsError(f"{path}: no such profile file; give a path that exists or one of {known}")
    if not own and profile not in profile_names():
        near = difflib.get_close_matches(str(profile), profile_names(), n=1)
        hint = f"{str(profile)!r}; did you mean {near[0]!r}?" if near else f"{str(profile)!r}."
        raise SettingsError(f"there is no profile {hint} Profiles: {known}; or give the path of a .yaml file.")
    name, source = (str(path), path) if own else (f"profile {profile}", PROFILES / f"{profile}.yaml")
    try:
        content = yaml.safe_load(source.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise SettingsError(f"{name}: is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise SettingsError(f"{name}: cannot be read ({error}); mend its rights, or give another") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a number of 5,000 digits, a 30 February
        raise SettingsError(f"{name}: not readable as YAML: {error}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise SettingsError(f"{name}: should be a mapping of sections (data, clip, model, training), not {kind}")
    if parent := content.pop("extends", None):
        beside = path.parent / str(parent)  # a path is meant from the file that names it
        parent = str(beside) if beside.is_file() else str(parent)
        if parent in chain:
            raise SettingsError(f"{name}: extends {parent}, which extends this profile; break the circle")
        inherited = _read_profile(parent, (*chain, parent))[1]
        content = merge({key: value for key, value in inherited.items() if key != "profile"}, content)
    return name, {**content, "profile": content.get("profile", path.stem) if own else str(profile)}


def _explain(name: str, error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        location, message = problem["loc"], problem["msg"]
        dotted = ".".join(map(str, location))
        if problem["type"] == "extra_forbidden":
            known = _fields_at(location[:-1])
            near = difflib.get_close_matches(str(location[-1]), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            lines.append(f"{dotted}: no such setting; {hint}known here: {', '.join(known)}")
        elif problem["type"] == "missing":
            lines.append(f"{dotted}: missing")
        elif problem["type"] == "value_error":
            lines.append(f"{dotted + ': ' if dotted else ''}{message.removeprefix('Value error, ')}")
        else:
            lines.append(f"{dotted}={problem['input']!r}: {message[0].lower()}{message[1:]}")
    return f"{name}: {len(lines)} setting(s) wrong:\n" + "\n".join(f"  {line}" for line in lines)


def _fields_at(location: tuple) -> list[str]:
    model: Any = Settings
    for part in location:
        field = getattr(model, "model_fields", {}).get(part)
        model = field.annotation if field else None
    return list(getattr(model, "model_fields", {}))
