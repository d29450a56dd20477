"""What other tools call the model, the layer and the SAE: as the SAE says of itself, unless told otherwise.

Neuronpedia's rules are those of its server (hijohnnylin/neuronpedia, app/api/source-set/new and prisma/schema.prisma).
"""

import re
from dataclasses import dataclass

from saefast.errors import InputError
from saefast.latents.database import LatentsDB

# A source set: lower-case letters, digits and single hyphens between them.
_SET = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
# An id that is a part of an address and the name of a folder.
_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_NUMBER = re.compile(r"(?<![^._/])\d+(?![^._/])")


@dataclass
class Names:
    """Names for an export, each looked up when it is asked for.

    Args:
        db: whose SAE it is.
        model_id: of the model, instead of the name that the SAE's metadata has.
        layer: instead of the one number in the name of the SAE's hook.
        source_set: of the SAEs that this is one of; the default says how many latents it has.

    Raises:
        InputError: on reading a property that the metadata does not tell, or that the other tool would not take.
    """

    db: LatentsDB
    model_id: str | None = None
    layer: int | None = None
    source_set: str | None = None

    @property
    def model(self) -> str:
        """The model by the name that loads it."""
        name = self.model_id if self.model_id is not None else self.db.meta["sae"].get("model")
        if not isinstance(name, str) or not name.strip():
            raise InputError("the SAE does not say which model it is of: expected --model-id")
        return name.strip()

    @property
    def neuronpedia_model(self) -> str:
        """The model by its id on Neuronpedia: the last part of its name, in lower case."""
        found = self.model.rstrip("/").rpartition("/")[2].lower()
        if not _ID.fullmatch(found):
            raise InputError(f"{found!a} is no id of a model: expected letters, digits, '.', '-' and '_' in --model-id")
        return found

    @property
    def hook(self) -> str:
        """The module that the SAE reads."""
        hook = self.db.meta["sae"].get("hook")
        if not isinstance(hook, str) or not hook.strip():
            raise InputError("the SAE does not say which hook it reads: expected hook_name in its metadata")
        return hook.strip()

    @property
    def layer_number(self) -> int:
        if self.layer is not None:
            if not isinstance(self.layer, int) or self.layer < 0:
                raise InputError(f"--layer is {self.layer!a}: expected a number from 0 on")
            return self.layer
        numbers = _NUMBER.findall(self.hook)
        if len(numbers) != 1:
            raise InputError(f"the hook {self.hook!a} does not say one layer: expected its number as --layer")
        return int(numbers[0])

    @property
    def set_name(self) -> str:
        name = self.source_set if self.source_set is not None else f"saefast-{self.db.n_latents}"
        if not isinstance(name, str) or not _SET.fullmatch(name) or name == "neurons":
            seen = "expected lower-case letters and digits with single hyphens between them, and not 'neurons'"
            raise InputError(f"--source-set is {name!a}: {seen}")
        return name

    @property
    def source(self) -> str:
        """An SAE on Neuronpedia: its layer and its set."""
        return f"{self.layer_number}-{self.set_name}"
