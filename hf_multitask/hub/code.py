"""Modelling code that travels with a model, so that it loads where this library is not installed.

[`write_code`] puts the modules that a saved model's scheme needs into a folder inside it, and says in `config.json`
where its classes are. Then

```python
AutoModel.from_pretrained(folder_or_hub_id, trust_remote_code=True)
```

works with Transformers alone (and PEFT, for prefixes and adapters). Where this library is installed and imported, its
own classes are used.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import CONFIG_NAME

from ..models.auto import SCHEMES
from ..models.manifest import check_named, saving

__all__ = ["CODE_FOLDER", "write_code"]

CODE_FOLDER = "hf_multitask_models"


def write_code(folder: str | Path) -> list[str]:
    """Write the modelling code of a saved model beside it, and `auto_map` into its `config.json`.

    Args:
        folder: A folder that `save_pretrained` of a multi-task model wrote.

    Returns:
        Paths of the modules, relative to the folder.

    Raises:
        FileNotFoundError: There is no `config.json`.
        ValueError: It is not that of a multi-task model, or has changed since the model was saved.
    """
    file = Path(folder, CONFIG_NAME)
    if not file.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no saved model: {CONFIG_NAME} is missing")
    check_named(folder, [CONFIG_NAME])
    config = json.loads(file.read_text(encoding="utf-8"))
    kind = config.get("model_type")
    by_type = {model.config_class.model_type: model for model in SCHEMES.values()}
    if kind not in by_type:
        raise ValueError(
            f"{str(file)!r} has the model_type {kind!r}; code is written for {', '.join(map(repr, by_type))}"
        )
    model = by_type[kind]
    home = Path(str(sys.modules[model.__module__].__file__))
    sources = sorted({home, *map(Path, get_relative_import_files(home))})
    place = Path(folder, CODE_FOLDER)
    written = [f"{CODE_FOLDER}/{source.name}" for source in sources]
    with saving(folder, only_changes=True) as recording:
        if place.is_dir():
            shutil.rmtree(place)
        place.mkdir()
        for source in sources:
            shutil.copyfile(source, place / source.name)
        names = {"AutoConfig": model.config_class.__name__, "AutoModel": model.__name__}
        config["auto_map"] = {auto: f"{CODE_FOLDER}/{home.stem}.{name}" for auto, name in names.items()}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        recording.add(CONFIG_NAME, *written)
    return written
