"""Processor: what a checkpoint folder says about turning examples into segments."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from data.prompts import PAPER, PROMPT_SETS, PromptSet
from data.transforms import ImageTransform
from modeling.tokenizer import Tokenizer, load_tokenizer

PREPROCESSOR_FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class Processor:
    """Tokenizer, image limits and prompts that belong to one set of weights."""

    tokenizer: Tokenizer
    transform: ImageTransform = field(default_factory=ImageTransform)
    prompts: PromptSet = PAPER

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Processor":
        """Open a checkpoint folder.

        Released folders have no `preprocessor_config.json` of this layout (one without "prompt_set"
        belongs to another library): they get the paper's image limits and prompts.
        """
        file = Path(path) / PREPROCESSOR_FILE
        config = json.loads(file.read_text()) if file.is_file() else {}
        tokenizer = load_tokenizer(path)
        if "prompt_set" not in config:
            return cls(tokenizer)
        name = config.pop("prompt_set")
        if name not in PROMPT_SETS:
            raise ValueError(f"{file}: prompt_set {name!r} is not one of {sorted(PROMPT_SETS)}")
        return cls(tokenizer, transform_from_dict(config, str(file)), PROMPT_SETS[name])

    def with_transform(self, transform: ImageTransform | None) -> "Processor":
        """The processor with the image limits of a mixture file; itself where that has none."""
        return dataclasses.replace(self, transform=transform) if transform else self

    def save_pretrained(self, path: str | Path) -> None:
        """Write tokenizer files and `preprocessor_config.json`; the prompts must be a named set."""
        if PROMPT_SETS.get(self.prompts.name) != self.prompts:
            raise ValueError(
                f"prompts {self.prompts.name!r} are not in data/prompts.py: add them there, "
                "a checkpoint stores the name only"
            )
        config = {**dataclasses.asdict(self.transform), "prompt_set": self.prompts.name}
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / PREPROCESSOR_FILE).write_text(json.dumps(config, indent=2) + "\n")
        self.tokenizer.save(path)


def transform_from_dict(config: dict, where: str) -> ImageTransform:
    """ImageTransform from its four numbers; unknown or missing keys raise ValueError."""
    known = {f.name for f in dataclasses.fields(ImageTransform)}
    if set(config) != known:
        raise ValueError(f"{where}: expected exactly {sorted(known)}, got {sorted(config)}")
    return ImageTransform(**config)
