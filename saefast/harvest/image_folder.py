"""Folders of images, read with Pillow and made a model's input by its own image processor."""

import hashlib
import importlib.util
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.files import usable
from saefast.harvest.items import FileItems, Ref, Unreadable

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class ImageFolder(FileItems):
    """The images in a folder and all below it in the order of their paths, or one image; hidden files are left out.

    An image is turned as its EXIF data says and taken as RGB; of a moving one the first picture. Raises InputError
    where there is none.
    """

    kind = "images"

    def __init__(self, path: str | Path, processor: Any) -> None:
        super().__init__()
        if importlib.util.find_spec("PIL") is None:
            raise InputError("images are read with Pillow, which is not installed: pip install pillow")
        self._root, self._processor = usable(path), processor
        self._files = files_below(self._root, ENDINGS, "images")
        self.name = str(self._root)
        self.input = (getattr(processor, "model_input_names", None) or ["pixel_values"])[0]

    def refs(self) -> Iterator[Ref]:
        for file in self._files:
            yield Ref(name_below(self._root, file), size_of(file), file)

    def total(self) -> int:
        return sum(map(size_of, self._files))

    def digest(self, ref: Ref) -> str:
        return hashlib.blake2b(ref.place.read_bytes(), digest_size=16).hexdigest()

    def read(self, ref: Ref) -> tuple[dict[str, Tensor], Tensor | None]:
        try:
            content = ref.place.read_bytes()
        except OSError as error:
            raise Unreadable(f"cannot be read ({error.strerror or error})") from None
        try:
            image = image_of(content)
        except Exception as error:  # each of Pillow's formats has errors of its own
            why = str(error).partition(" <")[0]
            raise Unreadable(f"is no image that opens ({type(error).__name__}: {why[:80]})") from None
        return tensors_of(processed(self._processor, images=image)), None


def image_of(content: bytes) -> Any:
    """A file's content as a model's image processor is given it. Raises whatever Pillow does."""
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        # Of a picture so large that it may be an attack, Pillow warns before it refuses.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")


def processed(processor: Any, *args: Any, **kwargs: Any) -> Any:
    """What a processor makes of an item. Raises Unreadable where it fails."""
    try:
        return processor(*args, **kwargs, return_tensors="pt")
    except Exception as error:
        why = " ".join(str(error).split())[:120]
        raise Unreadable(f"is refused by the {type(processor).__name__} ({type(error).__name__}: {why})") from None


def tensors_of(made: Any) -> dict[str, Tensor]:
    """The tensors that a processor made."""
    return {str(name): value for name, value in made.items() if isinstance(value, torch.Tensor)}


def files_below(root: Path, endings: tuple[str, ...], what: str) -> list[Path]:
    """Files with these endings below a folder in the order of their paths, hidden ones left out; or the file itself.

    Raises:
        InputError: there is nothing there, or none such.
    """
    if not root.exists():
        raise InputError(f"{what} is {str(root)!r}: there is no such folder or file")
    files = [root] if root.is_file() else sorted(root.rglob("*"))
    hidden = [any(part.startswith(".") for part in file.relative_to(root).parts) for file in files]
    found = [f for f, h in zip(files, hidden, strict=True) if not h and f.suffix.lower() in endings and f.is_file()]
    if not found:
        raise InputError(f"{root} holds no {what} ({', '.join(ending[1:] for ending in endings)})")
    return found


def name_below(root: Path, file: Path) -> str:
    return file.name if file == root else file.relative_to(root).as_posix()


def size_of(file: Path) -> int:
    """Bytes of a file; 0 where it has gone."""
    try:
        return file.stat().st_size
    except OSError:
        return 0
