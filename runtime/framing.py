"""How the picture that a request starts from is drawn."""

from engine.errors import RequestError
from runtime.images.canvas import MAX_SIDE, extend
from runtime.images.frame import Frame
from runtime.request import MASKED, Request

__all__ = ["frame_of"]


def frame_of(request: Request, side: int, multiple: int) -> Frame:
    """Return how a request's picture is drawn: as a whole, resized, or what is masked of it.

    side: of the model's own pictures, in pixels; multiple: of which drawn sides are
    Raises RequestError for a picture that is too large.
    """
    image, mask = request.image, request.mask
    assert image is not None
    assert not isinstance(mask, str)
    if request.extend is not None:
        left, top, right, bottom = request.extend
        image, mask = extend(image, left=left, top=top, right=right, bottom=bottom, mask=mask)
    if mask is not None and request.inpaint_area == MASKED:
        height, width = request.size((side, side), multiple)
        return Frame.masked(image, mask, height, width, request.mask_padding)
    frame = Frame.padded(image, mask, multiple)
    if max(frame.height, frame.width) > MAX_SIDE:
        raise RequestError(
            f"the image has {image.width} x {image.height} pixels; each side may have {MAX_SIDE}, "
            "give a smaller one, or height and width"
        )
    if request.height is None and request.width is None:
        return frame
    scale = (request.height or 0) / image.height or (request.width or 0) / image.width
    sides = (max(round(s * scale / multiple), 1) * multiple for s in (image.height, image.width))
    height, width = sides
    return Frame.resized(image, mask, *request.size((height, width), multiple))
