"""Hydra composition at the edge: overrides in, plain dataclasses out.

Defaults live on the dataclasses; a YAML in configs/ holds differences. Everything below this module sees
`TrainConfig`, never a `DictConfig`. Three liberties over plain Hydra: a key below a dictionary field needs no `+`, as in
`rollout.engine_args.enforce_eager=true`; `data.eval={}` empties such a field; and `recipe=` takes the path of a YAML as
well as a name, so the config.yaml of a run is a recipe too."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from qurl.config.rollout import StageConfig
from qurl.config.run import TrainConfig
from qurl.errors import ConfigError

YAML_SUFFIXES = (".yaml", ".yml")
SECTIONS = frozenset({"data.eval"})  # dictionary fields whose entries are sections of the configuration, of which none can be null
_MISSING = object()
OTHER_NAMES = {
    "wandb": "logging.wandb (disabled, offline or online)",
    "tensorboard": "logging.wandb=offline",
    "trainer": "num_steps or learner",
    "actor_rollout_ref": "learner, rollout or model",
}
"""What other frameworks call a section -> what is meant here."""


def assets_dir(name: str) -> Path:
    """The folder `configs` or `recipes`: packed into an installed wheel, else at the root of the checkout."""
    package = Path(__file__).resolve().parents[1]
    packed = package / f"_{name}"
    return packed if packed.is_dir() else package.parent / name


def compose(overrides: Sequence[str]) -> TrainConfig:
    """The configuration that `overrides` describe, in Hydra's grammar. Raises ConfigError, in one line, for anything wrong."""
    _store_schema()
    try:
        parsed = [_parse(line) for line in overrides]
        _check_keys(parsed)
        with initialize_config_dir(str(assets_dir("configs")), version_base="1.3"):
            composed = hydra_compose("train", overrides=_normalized(parsed))
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from error
    assert isinstance(config, TrainConfig)
    return config


def group_options(group: str) -> list[str]:
    """Names that a configuration group accepts, e.g. `quantization` -> fp8, fp8_block, int4, int8, ..."""
    return sorted(path.stem for path in (assets_dir("configs") / group).glob("*.yaml"))


def load_config(path: Path) -> TrainConfig:
    """The resolved configuration that a run saved as config.yaml. Raises ConfigError for a missing or foreign file."""
    return compose([f"recipe='{path}'"])


@functools.cache
def _store_schema() -> None:
    store = ConfigStore.instance()
    store.store(group="schema", name="train", node=TrainConfig)


def _parse(line: str) -> Override:
    """One override by Hydra's grammar; its errors do not name the override."""
    if "=" not in line and line.endswith(YAML_SUFFIXES):
        raise ConfigError(f"cannot read {line!r} by itself; write recipe={line} for a configuration file")
    try:
        override = OverridesParser.create().parse_override(line)
    except HydraException as error:
        raise ConfigError(f"cannot read override {line!r}: write key=value; a value with = ~ or brackets in it needs quotes that "
                          "the shell leaves, as in \"key='value'\"") from error  # fmt: skip
    if override.type is OverrideType.DEL and _dict_field(override.key_or_group) is None:
        raise ConfigError(f"{line}: keys cannot be deleted; set a value, or null where the key allows it")
    return override


def _check_keys(parsed: list[Override]) -> None:
    """Refuse unknown keys. Hydra would accept `+typo=1` and answer a plain typo with advice to add it."""
    valid = set(valid_keys())
    groups = {path.name for path in assets_dir("configs").iterdir() if path.is_dir()}
    for override in parsed:
        key = override.key_or_group
        if key in groups:
            _check_option(key, str(override.value()))
        elif key == "quantization.format":
            options = group_options("quantization")
            if override.value() in options:
                raise ConfigError(f"{override.input_line} is another option's; use quantization={override.value()}")
            raise ConfigError(f"{override.input_line} is unknown; use quantization= with one of {', '.join(options)}")
        elif key not in valid | groups and _dict_field(key) is None:
            raise ConfigError(f"{override.input_line}: unknown key {key!r}{_near(key, valid | groups)}")


def _check_option(group: str, name: str) -> None:
    """Refuse an option that the group does not have; a recipe may also be the path of a YAML."""
    options = group_options(group)
    if name in options or (group == "recipe" and name.endswith(YAML_SUFFIXES)):
        return
    if group == "recipe":
        options.append("the path of a YAML")
    raise ConfigError(f"{group}={name} is not an option; use one of {', '.join(options)}")


def _normalized(parsed: list[Override]) -> list[str]:
    """All overrides as Hydra wants them, in order. An entry of a dictionary field is removed by `~field.entry` or, where
    entries are sections of their own, `field.entry=null`; all of them by `field={}` or `~field`. Hydra would merge {} into
    what is there."""
    groups = [_normalize(o) for o in parsed if _dict_field(o.key_or_group) is None]
    entries: list[str] = []
    for override in (o for o in parsed if _dict_field(o.key_or_group) is not None):
        key = override.key_or_group
        is_deleted = override.type is OverrideType.DEL
        is_null = not is_deleted and override.value() is None and key.rpartition(".")[0] in SECTIONS
        is_emptied = key == _dict_field(key) and (is_deleted or override.value() in ({}, None))
        if not (is_deleted or is_null or is_emptied):
            entries.append(_normalize(override))
            continue
        present = OmegaConf.select(hydra_compose("train", overrides=[*groups, *entries]), _dict_field(key) or "")
        names = list(present) if is_emptied else [key.removeprefix(f"{_dict_field(key)}.")]
        for name in names:
            value = OmegaConf.select(present, name, default=_MISSING)
            if value is _MISSING:
                raise ConfigError(f"{override.input_line}: {_dict_field(key)} has {', '.join(present) or 'no entry'}")
            if value is None:  # which Hydra takes for an entry that does not exist
                entries.append(f"++{_dict_field(key)}.{name}=0")
            entries.append(f"~{_dict_field(key)}.{name}")
    return [*groups, *entries]


def _normalize(override: Override) -> str:
    """One override as Hydra wants it: entries of dictionary fields are merged in, a recipe's path becomes a stored config."""
    key, line = override.key_or_group, override.input_line or ""
    field = _dict_field(key)
    if field is not None:
        value = override.get_value_element_as_str()
        for part in reversed(key.removeprefix(field).lstrip(".").split(".")):
            value = f"{{{part}:{value}}}" if part else value
        return f"++{field}={value}"
    if key == "recipe" and str(override.value()).endswith(YAML_SUFFIXES):
        return f"recipe={_store_recipe(Path(str(override.value())))}"
    return line


def _store_recipe(path: Path) -> str:
    """Make a YAML outside the package an option of the group `recipe` and return its name there."""
    try:
        content = OmegaConf.load(path)
    except (OSError, YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe={path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"recipe={path} is not a mapping of configuration keys")
    if OmegaConf.select(content, "quantization.format") is not None:  # a resolved configuration; what the user chooses must win
        option = content.quantization.pop("format")
        content.defaults = [*content.get("defaults", []), {"override /quantization": option}]
    name = re.sub(r"\W", "_", str(path.with_suffix("")))
    ConfigStore.instance().store(group="recipe", name=name, node=content, package="_global_")
    return name


def valid_keys(kind: Any = TrainConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a configuration dataclass, groups included."""
    for name, hint in typing.get_type_hints(kind).items():
        yield prefix + name
        if dataclasses.is_dataclass(hint):
            yield from valid_keys(hint, f"{prefix}{name}.")


def _dict_field(key: str, kind: Any = TrainConfig, prefix: str = "") -> str | None:
    """The dictionary field that `key` is or lies below, such as rollout.engine_args; None where there is none."""
    head, _, rest = key.partition(".")
    hint = typing.get_type_hints(kind).get(head)
    if typing.get_origin(hint) is dict:
        return prefix + head
    return _dict_field(rest, hint, f"{prefix}{head}.") if dataclasses.is_dataclass(hint) and rest else None


def _near(key: str, valid: set[str]) -> str:
    """'; did you mean ...': the same name elsewhere, a similar one in the section, or else all keys of the section."""
    if key.partition(".")[0] in OTHER_NAMES:
        return f"; did you mean {OTHER_NAMES[key.partition('.')[0]]}?"
    section, _, leaf = key.rpartition(".")
    section = section if section in valid else ""
    siblings = sorted(k for k in valid if k.rpartition(".")[0] == section)
    near = difflib.get_close_matches(f"{section}.{leaf}" if section else leaf, siblings, n=2, cutoff=0.7)
    near = [k for k in near if difflib.SequenceMatcher(None, k.rpartition(".")[2], leaf).ratio() >= 0.6]
    near += [k for k in sorted(valid) if k.rpartition(".")[2] == leaf and k not in near]
    near += [k for k in difflib.get_close_matches(key, sorted(valid), n=2, cutoff=0.85) if k not in near]
    leaves = {k.rpartition(".")[2]: k for k in sorted(valid, reverse=True)}
    near += [leaves[name] for name in difflib.get_close_matches(leaf, sorted(leaves), n=1, cutoff=0.85) if not near]
    if near:
        return f"; did you mean {' or '.join(near[:3])}?"
    return f"; {section or 'the configuration'} has {', '.join(siblings)}"


def _explain(error: BaseException, overrides: Sequence[str]) -> str:
    """One line for a Hydra or OmegaConf error: the key, what was given, what would work."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
        group, _, name = str(cause.missing_cfg_file).rpartition("/")
        return f"{group}={name} is not an option; use one of {', '.join(group_options(group))}"
    if isinstance(cause, MissingMandatoryValue):
        return f"{cause.full_key} is not set; give {cause.full_key}=<folder or hub name>, or a recipe such as recipe=quickstart"
    told = str(cause).partition("raised while composing config:\n")
    source = f"{told[0].split(chr(39))[1]}.yaml: " if told[1] and chr(39) in told[0] else ""
    if source.startswith("recipe/"):
        source = next((f"{line}: " for line in overrides if line.startswith("recipe=")), source)
    message = (told[2] or told[0]).splitlines()
    found = re.search(r"full_key: (\S+)", str(cause))
    key = found[1] if found else ""
    given = [line for line in overrides if key and line.lstrip("+").partition("=")[0] == key]
    where = source or (f"{given[-1]}: " if given else f"{key}: " if key else "")
    if key and "not in 'StageConfig'" in message[0]:
        names = ", ".join(field.name for field in dataclasses.fields(StageConfig))
        return f"{where}unknown key {key!r} of an entry of stages, which may have {names}"
    if key and "not in" in message[0]:
        return f"{where}unknown key {key!r}{_near(key, set(valid_keys()))}"
    return where + (message[0] if key else " ".join(message))
