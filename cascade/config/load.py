"""Configs from YAML files and `section.key=value` overrides, merged in order; to and from what a checkpoint carries."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, InterpolationResolutionError, OmegaConfBaseException

from cascade.config.options import Config, ConfigError, DecodingConfig, FeatureConfig
from cascade.config.rules import FIELDS, describe_type, each_option, first_problem, starts_over

_MOVED = {"training.blank_penalty": "decoding.blank_penalty"}


def load_config(paths: list[str | Path] = (), overrides: list[str] = ()) -> Config:
    """Merge YAML files, then `section.key=value` overrides, over the defaults, and check every value.

    Raises:
      ConfigError: an unknown key, a value of the wrong type or out of range, or a missing or broken file.
    """
    merged = OmegaConf.structured(Config)
    for path in paths:
        if not Path(path).is_file():
            raise ConfigError(f"config file not found: {path}")
        merged = _merge(merged, _read(path), path)
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"an override is written section.key=value, got {override!r}")
        try:
            values = OmegaConf.from_dotlist([override])
        except Exception as error:  # PyYAML's errors share no public base with OmegaConf's
            raise ConfigError(f"override {override!r} is not section.key=value ({_problem(error)})") from error
        merged = _merge(merged, values, f"override {override!r}")
    return _checked(merged)


def read_decoding(path: str | Path) -> Any:
    """The options of `load_decoding`'s file as they stand there, not checked."""
    values = _read(path)
    return values["decoding"] if "decoding" in values else values


def load_decoding(path: str | Path, base: DecodingConfig) -> DecodingConfig:
    """`base` with the options that a decoding.yaml sets, at its top or in a section `decoding`.

    Raises:
      ConfigError: as `load_config`, with the file's name.
    """
    values = _read(path)
    values = values if "decoding" in values else {"decoding": values}
    only = OmegaConf.create({"decoding": OmegaConf.structured(base)}, flags={"struct": True})
    return _checked(OmegaConf.merge(OmegaConf.structured(Config), _merge(only, values, path)), f"{path}: ").decoding


EARLIER_LOSSES = ("intermediate_ctc_scale", "pass_kl_scale", "pass_kl_kind", "pass_kl_shift")
"""Options of the loss section that checkpoints may carry and nothing reads."""


def config_from_dict(values: dict[str, Any]) -> Config:
    """Rebuild a Config from `config_to_dict`'s builtin types (what a checkpoint carries).

    lhotse's Fbank, the extractor of earlier versions, has given way to another with the same features; losses that no
    longer exist are of no interest to a trained model.
    """
    if isinstance(loss := values.get("loss"), dict):
        values = values | {"loss": {name: value for name, value in loss.items() if name not in EARLIER_LOSSES}}
    match values:
        case {"features": {"extractor": "lhotse"} as features}:
            values = values | {"features": features | {"extractor": FeatureConfig.extractor}}
    return _checked(_merge(OmegaConf.structured(Config), values, "config of another version"))


def config_to_dict(config: Config) -> dict[str, Any]:
    """The config as dicts, lists and scalars."""
    return dataclasses.asdict(config, dict_factory=lambda pairs: {name: _builtin(value) for name, value in pairs})


def save_config(config: Config, path: str | Path) -> None:
    Path(path).write_text(OmegaConf.to_yaml(config_to_dict(config)), encoding="utf-8")


def changed_options(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """{"section.key": (old value, new value)} of the options that differ."""
    flat_old, flat_new = ({name: _builtin(value) for name, _, value in each_option(config)} for config in (old, new))
    names = sorted(flat_old.keys() | flat_new.keys())
    return {
        name: (flat_old.get(name), flat_new.get(name)) for name in names if flat_old.get(name) != flat_new.get(name)
    }


def changed_numbers(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The options of `changed_options` that make another training; a whole section where only one config has it."""
    changed = {name: values for name, values in changed_options(old, new).items() if starts_over(name)}
    for section in ("distillation", "mwer"):
        before, now = ("null" if getattr(config, section) is None else "a section" for config in (old, new))
        if before != now:
            changed = {name: values for name, values in changed.items() if not name.startswith(f"{section}.")}
            changed[section] = (before, now)
    return changed


def save_options(options: dict[str, Any], path: str | Path) -> None:
    """Write single options, by their dotted names, as YAML."""
    values = OmegaConf.create()
    for name, value in options.items():
        OmegaConf.update(values, name, value)
    Path(path).write_text(OmegaConf.to_yaml(values), encoding="utf-8")


def _builtin(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read(path: str | Path) -> Any:
    """Sections and options of a YAML file."""
    try:
        values = OmegaConf.load(path)
    except Exception as error:
        raise ConfigError(f"{path}: not a YAML mapping ({_problem(error)})") from error
    if not OmegaConf.is_dict(values):
        raise ConfigError(f"{path}: not a YAML mapping but a list")
    return values


def _merge(merged: Any, values: Any, origin: str | Path) -> Any:
    problem = _wrong_value(OmegaConf.to_container(values) if OmegaConf.is_config(values) else values)
    if problem is not None:
        raise ConfigError(f"{origin}: {problem}")
    try:
        return OmegaConf.merge(merged, values)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{origin}: {_problem(error)}") from error


def _wrong_value(values: Mapping[str, Any]) -> str | None:
    """One sentence about the first section, list or number that OmegaConf would take or refuse without its name."""
    for name, field in FIELDS.items():
        given, path = values, []
        for key in name.split("."):
            if not isinstance(given, Mapping):
                return f"{'.'.join(path)} must be a section of options, got {given!r}"
            given = given.get(key)
            if given is None:
                break
            path.append(key)
        else:
            kind, last = (*get_args(field.type), None, None)[:2]
            is_list = get_origin(field.type) is tuple
            if is_list and (
                not isinstance(given, (list, tuple)) or any(type(number) not in (int, kind) for number in given)
                or last is kind and len(given) != 2
            ) or field.type is bool and type(given) is int and given not in (0, 1):  # fmt: skip
                return f"{name} must be {describe_type(field.type)}, got {given}"
    return None


def _checked(merged: Any, origin: str = "") -> Config:
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{origin}{_problem(error)}") from error
    problem = first_problem(config)
    if problem is not None:
        raise ConfigError(f"{origin}{problem}")
    return config


def _problem(error: Exception) -> str:
    """A clause about an error of OmegaConf or PyYAML, in the words of options."""
    key, mark = getattr(error, "full_key", None), getattr(error, "problem_mark", None)
    if key in _MOVED:
        return f"{key} is called {_MOVED[key]}"
    if isinstance(error, ConfigKeyError):
        if key in FIELDS and "." in key:
            return f"{key} must stand in its section, as in `{key.replace('.', ': {')}: ...{'}' * key.count('.')}`"
        near = get_close_matches(str(key), [*FIELDS, *{name.partition(".")[0] for name in FIELDS}], 1)
        return f"there is no option {str(key)!r}" + "".join(f", did you mean {name}?" for name in near if name != key)
    if any(name.startswith(f"{key}.") for name in FIELDS):
        return f"{key} must be a section of options, got None"
    if key in FIELDS and not isinstance(error, InterpolationResolutionError):
        return f"{key} must be {describe_type(FIELDS[key].type)}, got {error.value!r}"
    if mark is not None:
        return f"line {mark.line + 1}: {error.problem}"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
