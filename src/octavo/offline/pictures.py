"""Images that a program has in memory, as URLs that the server's code reads: the same limits hold; no pixel changes."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.server.errors import bad_request

IN_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # modes that the file keeps as they are


def data_url_of(picture: object, place: str) -> str:
    """An image of Pillow as a PNG, with the way that it is turned by. Raises ApiError, which names the place."""
    from PIL import Image

    if not isinstance(picture, Image.Image):
        raise bad_request(f"{place}: {type(picture).__name__} is no image; a PIL.Image.Image is", None)
    try:
        kept = picture if picture.mode in IN_PNG else picture.convert("RGB")
        exif = picture.getexif()
        file = io.BytesIO()
        kept.save(file, "PNG", compress_level=1, **({"exif": exif} if exif else {}))
    except Exception as error:  # of Pillow, of any type: files are decoded now
        raise bad_request(f"{place}: the image can't be read: {error or type(error).__name__}", None) from error
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def with_urls(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with a URL for each of vLLM's image_pil parts. Raises ApiError."""
    return [_with_urls(message) if isinstance(message, Mapping) else message for message in messages]


def _with_urls(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    if not isinstance(content, list) or not any(map(_is_picture, content)):
        return message
    return {**message, "content": [_with_url(part) if _is_picture(part) else part for part in content]}


def _is_picture(part: object) -> bool:
    return isinstance(part, Mapping) and (part.get("type") == "image_pil" or "image_pil" in part)


def _with_url(part: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url_of(part.get("image_pil"), "messages")}}
