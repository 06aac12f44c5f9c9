"""Every config: frozen dataclasses, loaded from strict YAML, overridden with `a.b=c`, checked
before anything heavy is imported.

A run's YAML has the sections of `RunConfig`. `model.preset` fills in an architecture, which single
keys then override.
"""

from .loading import (
    DEFAULTS,
    Settings,
    build,
    dump_yaml,
    load_config,
    override,
    read_config,
    resolve,
    section_of,
    to_dict,
)
from .mesh import MeshConfig
from .model import LARGEST, LAYERS, PRESETS, ModelConfig, RopeScaling
from .reading import COMPRESSIONS, END, FORMATS, Reading, suffixes_of, without_suffixes
from .run import (
    LINE,
    SEQUENCES,
    DataConfig,
    Dataset,
    IdType,
    Loss,
    OptimConfig,
    PairConfig,
    Remat,
    RouterConfig,
    RunConfig,
    TrainConfig,
    check_microbatch,
)
from .section import expect
from .unused import without_unused

__all__ = [
    "COMPRESSIONS",
    "DEFAULTS",
    "END",
    "FORMATS",
    "LARGEST",
    "LAYERS",
    "LINE",
    "PRESETS",
    "SEQUENCES",
    "DataConfig",
    "Dataset",
    "IdType",
    "Loss",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "PairConfig",
    "Reading",
    "Remat",
    "RopeScaling",
    "RouterConfig",
    "RunConfig",
    "Settings",
    "TrainConfig",
    "build",
    "check_microbatch",
    "dump_yaml",
    "expect",
    "load_config",
    "override",
    "read_config",
    "resolve",
    "section_of",
    "suffixes_of",
    "to_dict",
    "without_suffixes",
    "without_unused",
]
