"""Configs from YAML files and `section.key=value` overrides, merged in order; to and from what a checkpoint carries."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cascade.config.options import Config, ConfigError, DecodingConfig, DistillationConfig
from cascade.config.rules import first_problem, starts_over

_MOVED = {"training.blank_penalty": "decoding.blank_penalty"}


def load_config(paths: list[str | Path] = (), overrides: list[str] = ()) -> Config:
    """Merge YAML files, then `section.key=value` overrides, over the defaults, and check every value.

    Raises:
      ConfigError: an unknown key, a value of the wrong type or out of range, or a missing or broken file.
    """
    merged = OmegaConf.structured(Config)
    OmegaConf.set_readonly(merged, False)
    for path in paths:
        if not Path(path).is_file():
            raise ConfigError(f"config file not found: {path}")
        merged = _merge_file(merged, path)
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"an override is written section.key=value, got {override!r}")
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        except OmegaConfBaseException as error:
            raise ConfigError(f"override {override!r}: {_first_line(error)}") from error
        except Exception as error:
            raise ConfigError(f"override {override!r} is not section.key=value ({_first_line(error)})") from error
    return _checked(merged)


def load_decoding(path: str | Path, base: DecodingConfig) -> DecodingConfig:
    """`base` with the options that a decoding.yaml sets, at its top or in a section `decoding`.

    Raises:
      ConfigError: as `load_config`, with the file's name.
    """
    only = OmegaConf.create({"decoding": OmegaConf.structured(base)}, flags={"struct": True})
    merged = _merge_file(only, path, "decoding")
    try:
        return _checked(OmegaConf.merge(OmegaConf.structured(Config), merged)).decoding
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def config_from_dict(values: dict[str, Any]) -> Config:
    """Rebuild a Config from `config_to_dict`'s builtin types (what a checkpoint carries)."""
    try:
        return _checked(OmegaConf.merge(OmegaConf.structured(Config), values))
    except OmegaConfBaseException as error:
        raise ConfigError(f"config of another version: {_first_line(error)}") from error


def config_to_dict(config: Config) -> dict[str, Any]:
    """The config as dicts, lists and scalars."""
    return OmegaConf.to_container(OmegaConf.create(_builtin(dataclasses.asdict(config))))


def save_config(config: Config, path: str | Path) -> None:
    Path(path).write_text(OmegaConf.to_yaml(config_to_dict(config)), encoding="utf-8")


def changed_options(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """{"section.key": (old value, new value)} of the options that differ."""
    flat_old, flat_new = _flatten(config_to_dict(old)), _flatten(config_to_dict(new))
    names = sorted(flat_old.keys() | flat_new.keys())
    return {
        name: (flat_old.get(name), flat_new.get(name)) for name in names if flat_old.get(name) != flat_new.get(name)
    }


def changed_numbers(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The options of `changed_options` that make another training; a whole section where only one config has it."""
    changed = {name: values for name, values in changed_options(old, new).items() if starts_over(name)}
    if (old.distillation is None) != (new.distillation is None):
        changed = {name: values for name, values in changed.items() if not name.startswith("distillation.")}
        changed["distillation"] = ("null", "a section") if old.distillation is None else ("a section", "null")
    return changed


def save_options(options: dict[str, Any], distillation: DistillationConfig, path: str | Path) -> None:
    """Write single options, by their dotted names, and a distillation section as YAML."""
    values = OmegaConf.create({"distillation": dataclasses.asdict(distillation)})
    for name, value in options.items():
        OmegaConf.update(values, name, value)
    Path(path).write_text(OmegaConf.to_yaml(values), encoding="utf-8")


def _merge_file(merged: Any, path: str | Path, section: str = "") -> Any:
    """Options with those of a YAML file over them; a file without `section` is what is in it."""
    try:
        values = OmegaConf.load(path)
        if section and OmegaConf.is_dict(values) and section not in values:
            values = {section: values}
        return OmegaConf.merge(merged, values)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from error
    except Exception as error:  # PyYAML's errors share no public base with OmegaConf's
        raise ConfigError(f"{path}: not a YAML mapping ({_first_line(error)})") from error


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _builtin(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _builtin(item) for key, item in value.items()}
    return [_builtin(item) for item in value] if isinstance(value, (list, tuple)) else value


def _checked(merged: Any) -> Config:
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error
    config = _tuples(config)
    error = first_problem(config)
    if error:
        raise ConfigError(error)
    return config


def _tuples(config: Any) -> Any:
    """OmegaConf returns lists for tuple fields; a frozen config holds tuples."""
    changes = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(value, list):
            changes[item.name] = tuple(value)
        elif dataclasses.is_dataclass(value):
            changes[item.name] = _tuples(value)
    return dataclasses.replace(config, **changes)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    if key in _MOVED:
        return f"{key} is called {_MOVED[key]}"
    return f"{lines[0] if lines else type(error).__name__}" + (f" (at {key})" if key else "")
