"""
Pictures to pixels and back, and pixels to image codes and back.

Reading order: `open_picture` and `to_rgb` turn whatever a user has into an upright RGB picture or refuse it; the
image processors resize and normalise it; `encode_pixels` and `decode_codes` cross the VQ-GAN. What codes mean to the
language model is left to the processor (`processing_mars.py`) and the model.
"""

import base64
import os
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from io import BytesIO
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    PILImageResampling,
    SizeDict,
    make_flat_list_of_images,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import is_torchvision_available

from .configuration_mars import MarsConfig

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vq_model import VQModel

DOWNLOAD_TIMEOUT = 30  # seconds
DOWNLOAD_LIMIT = 2**28  # bytes
OVERSHOOT = 0.05  # of shares of brightness that were resized
MAX_UINT8, MAX_UINT16 = 255, 65535


def check_image_size(height: int, width: int, downsample_factor: int, max_size: int | None = None) -> None:
    """
    Refuse a picture size that has no whole number of codes.

    Args:
        height (`int`): In pixels.
        width (`int`): In pixels.
        downsample_factor (`int`): Side in pixels of the square that one code stands for.
        max_size (`int`, *optional*): Largest side allowed, in pixels.

    Raises:
        ValueError: If a side is not a positive multiple of `downsample_factor`, or exceeds `max_size`.
    """
    for name, side in (("height", height), ("width", width)):
        if isinstance(side, bool) or not isinstance(side, Integral) or side <= 0:
            raise ValueError(f"`{name}` must be a positive whole number of pixels, got {side!r}.")
        if side % downsample_factor:
            lower = side // downsample_factor * downsample_factor
            near = f"{lower} or {lower + downsample_factor}" if lower else f"{downsample_factor}"
            raise ValueError(f"`{name}` must be a multiple of {downsample_factor}, got {side}: use {near}.")
        if max_size is not None and side > max_size:
            raise ValueError(f"`{name}` must be at most {max_size} pixels (`max_image_size`), got {side}.")


def open_picture(source: Any) -> Image.Image:
    """
    Open a picture, reading no more than its header where the source allows it.

    Args:
        source (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `bytes`, `str` or `Path`):
            The picture, an encoded picture file, or where to find one: a path, an http(s) or data URL, or the file
            in base64. Arrays are `(height, width)`, `(height, width, channels)` or `(channels, height, width)`.

    Returns:
        `PIL.Image.Image`: As stored; see [`to_rgb`].

    Raises:
        ValueError: If the source is no picture.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _picture_from_array(source)
    if not isinstance(source, (bytes, str, Path)):
        raise ValueError(
            "A picture must be a PIL picture, an array, a tensor, the bytes of a file, a path or a URL, got "
            f"{type(source).__name__}."
        )
    try:
        return Image.open(_file_of(source))
    except Exception as error:  # decoders raise whatever they like
        raise ValueError(f"{_describe(source)} cannot be read as a picture: {error}") from error


def _file_of(source: bytes | str | Path) -> BytesIO | str | Path:
    if isinstance(source, bytes):
        return BytesIO(source)
    if isinstance(source, Path) or os.path.isfile(source):
        return source
    if source.startswith(("http://", "https://", "data:image/")):
        # Not the library's `load_image`: it puts transparent pictures on black and cuts 16 bits to 8.
        request = urllib.request.Request(source, headers={"User-Agent": "mars_hf"})
        with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response:
            data = response.read(DOWNLOAD_LIMIT + 1)
        if len(data) > DOWNLOAD_LIMIT:
            raise ValueError(f"it has more than {DOWNLOAD_LIMIT} bytes; download it yourself and give its path")
        return BytesIO(data)
    try:
        return BytesIO(base64.b64decode(source, validate=True))
    except ValueError:
        raise ValueError("it is neither an existing file, nor a URL, nor base64") from None


def _describe(source: Any) -> str:
    if isinstance(source, bytes):
        return f"A file of {len(source)} bytes"
    return f"{str(source)[:100]!r}" if isinstance(source, (str, Path)) else f"{source!r}"


def _picture_from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    # A picture of 3 x n x 3 values is ambiguous: tensors are read channels first, arrays channels last.
    axes = (0, -1) if isinstance(array, torch.Tensor) else (-1, 0)
    if isinstance(array, torch.Tensor):
        array = (array.float() if array.dtype == torch.bfloat16 else array).detach().cpu().numpy()
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"An array must hold a picture of 2 or 3 dimensions, got shape {array.shape}.")
    if array.ndim == 3:
        channel_axis = next((axis for axis in axes if array.shape[axis] in (1, 3, 4)), None)
        if channel_axis is None:
            raise ValueError(f"A picture must have 1, 3 or 4 channels, got shape {array.shape}.")
        array = np.moveaxis(array, channel_axis, -1)
        array = array[..., 0] if array.shape[-1] == 1 else array
    return Image.fromarray(_to_uint8(np.ascontiguousarray(array)))


def _to_uint8(array: np.ndarray) -> np.ndarray:
    """
    Scale to 8 bits by the range in use: floats up to 1 are shares of full brightness, and a little beyond as resizing
    leaves them; whole numbers above 255 (and all `uint16`) are 16-bit values.
    """
    if array.dtype == np.uint8:
        return array
    low, high = float(array.min()), float(array.max())
    if array.dtype == bool or (array.dtype.kind == "f" and -OVERSHOOT <= low and high <= 1 + OVERSHOOT):
        array, full = array.clip(0, 1), 1
    elif array.dtype != np.uint16 and 0 <= low and high <= MAX_UINT8:
        full = MAX_UINT8
    elif array.dtype.kind in "iu" and 0 <= low and high <= MAX_UINT16:
        full = MAX_UINT16
    else:
        raise ValueError(
            f"Pixel values of type {array.dtype} from {low:g} to {high:g} are in no known range: expected [0, 1], "
            "[0, 255] or, for whole numbers, [0, 65535]."
        )
    return np.round(array.astype(np.float64) * (MAX_UINT8 / full)).astype(np.uint8)


def to_rgb(picture: Image.Image) -> Image.Image:
    """
    Decode a picture, turn it upright and bring it to 8-bit RGB.

    The first frame stands for an animation, transparent parts show white, 16 bits are scaled to 8.

    Args:
        picture (`PIL.Image.Image`): In any mode.

    Returns:
        `PIL.Image.Image`: In mode RGB, turned as its EXIF orientation says.

    Raises:
        ValueError: If the file is truncated or damaged.
    """
    if getattr(picture, "n_frames", 1) > 1:
        warnings.warn(f"{picture!r} has {picture.n_frames} frames; the first is used.", stacklevel=2)  # type: ignore
        picture.seek(0)
    try:
        picture.load()
    except Exception as error:  # decoders raise whatever they like
        raise ValueError(f"{picture!r} is truncated or damaged: {error}") from error
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = Image.fromarray(_to_uint8(np.asarray(picture)))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        picture = Image.alpha_composite(white, layer)
    return picture.convert("RGB")


class MarsImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    height (`int`, *optional*):
        Exact height of the result in pixels; needs `width`. The aspect ratio is not kept.
    width (`int`, *optional*):
        Exact width of the result in pixels; needs `height`.
    downsample_factor (`int`, *optional*, defaults to 16):
        Side in pixels of the square that one image code stands for. Sizes are multiples of it.
    max_pixels (`int`, *optional*, defaults to 64,000,000):
        Largest picture accepted, in pixels; larger ones are refused before they are decoded.
    """

    height: int | None
    width: int | None
    downsample_factor: int
    max_pixels: int


class _MarsImageProcessing:
    """What the two backends share: everything but the arithmetic on pixels, which is the library's own."""

    valid_kwargs = MarsImageProcessorKwargs
    model_input_names = ["pixel_values", "image_sizes"]

    do_resize = True
    size = {"height": 256, "width": 256}
    default_to_square = True
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    rescale_factor = 1 / MAX_UINT8
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_convert_rgb = True
    height = None
    width = None
    downsample_factor = 16
    max_pixels = 64_000_000

    # The library's arithmetic, from the backend.
    resize: Callable[..., Any]
    center_crop: Callable[..., Any]
    rescale: Callable[..., Any]
    normalize: Callable[..., Any]

    def fetch_images(self, images: Any) -> Any:
        """Open every picture of a nested list; an array of 4 dimensions is a list of pictures."""
        if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4:
            return [self.fetch_images(image) for image in images]
        return open_picture(images)

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Image.Image]:
        pictures = make_flat_list_of_images(self.fetch_images(images), expected_ndims=expected_ndims)
        if not pictures:
            raise ValueError("`images` must hold at least one picture, got none.")
        return cast(list[Image.Image], pictures)

    def process_image(self, image: Image.Image, downsample_factor: int, max_pixels: int, **kwargs: Any) -> Any:
        """Check one picture by its header and decode it to `(3, height, width)` in [0, 255]."""
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(
                f"A picture must have at most {max_pixels} pixels (`max_pixels`), got {width} x {height}. Make it "
                "smaller first, or raise the limit."
            )
        if min(width, height) < downsample_factor:
            raise ValueError(
                f"A picture's shorter side must be at least {downsample_factor} pixels, got {width} x {height}."
            )
        return np.moveaxis(np.array(to_rgb(image)), -1, 0)

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(**kwargs)  # type: ignore[misc]
        if kwargs["do_normalize"] and not kwargs["do_rescale"]:
            raise ValueError(
                "`do_rescale=False` with `do_normalize=True` would give pixels far outside of [-1, 1]: the range of "
                "what comes in is found out by itself, [0, 1] too. Leave `do_rescale` out."
            )
        height, width, factor = kwargs["height"], kwargs["width"], kwargs["downsample_factor"]
        if (height is None) != (width is None):
            raise ValueError(f"`height` and `width` go together, got height={height} and width={width}.")
        if height is not None:
            check_image_size(height, width, factor)
        elif kwargs["do_resize"]:
            size = kwargs["size"]
            if size.shortest_edge is None and (size.height is None or size.width is None):
                raise ValueError(f"`size` must have 'height' and 'width', or 'shortest_edge', got {dict(size)}.")
            check_image_size(size.height or size.shortest_edge, size.width or size.shortest_edge, factor)

    def _fit(self, image: Any, size: SizeDict, resample: Any, downsample_factor: int, max_pixels: int) -> Any:
        """Scale until the picture just covers `size`, then cut the middle out; the aspect ratio is kept."""
        height, width = image.shape[-2:]
        if size.shortest_edge is not None:
            scale = size.shortest_edge / min(height, width)
            wanted = [round(side * scale) // downsample_factor * downsample_factor for side in (height, width)]
        else:
            scale = max(size.height / height, size.width / width)
            wanted = [size.height, size.width]
        covering = [max(round(side * scale), goal) for side, goal in zip((height, width), wanted, strict=True)]
        if covering[0] * covering[1] > max_pixels:
            raise ValueError(
                f"A picture of {width} x {height} is too thin: it would be scaled to {covering[1]} x {covering[0]}, "
                f"more than {max_pixels} pixels (`max_pixels`). Cut a piece out of it first."
            )
        image = self.resize(image, SizeDict(height=covering[0], width=covering[1]), resample=resample)
        return self.center_crop(image, SizeDict(height=wanted[0], width=wanted[1]))

    def _preprocess(
        self,
        images: list[Any],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        height: int | None,
        width: int | None,
        downsample_factor: int,
        max_pixels: int,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float] | None,
        image_std: float | list[float] | None,
        return_tensors: str | None,
        **kwargs: Any,
    ) -> BatchFeature:
        pixel_values = []
        for image in images:
            if height is not None:
                image = self.resize(image, SizeDict(height=height, width=width), resample=resample)
            elif do_resize:
                image = self._fit(image, size, resample, downsample_factor, max_pixels)
            check_image_size(image.shape[-2], image.shape[-1], downsample_factor)
            image = self.rescale(image, rescale_factor) if do_rescale else image
            image = self.normalize(image, image_mean, image_std) if do_normalize else image
            pixel_values.append(image)
        return _picture_batch(pixel_values, return_tensors)

    def postprocess(self, pixel_values: torch.Tensor | Sequence[torch.Tensor]) -> list[Image.Image]:
        """
        Turn pixels back into pictures.

        Args:
            pixel_values (`torch.Tensor` of shape `(num, 3, height, width)`, or a list of `(3, height, width)`):
                As the VQ-GAN decodes them; values outside [-1, 1] are clamped.

        Returns:
            `list[PIL.Image.Image]`: One RGB picture for each.
        """
        if isinstance(pixel_values, torch.Tensor) and pixel_values.ndim == 3:
            pixel_values = pixel_values[None]
        mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (self.image_mean, self.image_std))
        pictures = []
        for pixels in pixel_values:
            shares = (torch.as_tensor(pixels).detach().cpu().float() * std + mean).clamp(0, 1)
            array = (shares * MAX_UINT8).round().to(torch.uint8)
            pictures.append(Image.fromarray(array.permute(1, 2, 0).contiguous().numpy()))
        return pictures


def _picture_batch(pixel_values: list[Any], return_tensors: str | None) -> BatchFeature:
    """Stack pictures of one size, leave others a list, and note their sizes in pixels."""
    sizes = [list(pixels.shape[-2:]) for pixels in pixel_values]
    one_size = all(size == sizes[0] for size in sizes)
    if return_tensors is not None and not one_size:
        convert = torch.as_tensor if return_tensors == "pt" else np.asarray
        pixel_values = [convert(pixels) for pixels in pixel_values]
    data = {"pixel_values": pixel_values, "image_sizes": sizes}
    return BatchFeature(
        data, tensor_type=return_tensors, skip_tensor_conversion=None if one_size else ["pixel_values"]
    )


class MarsImageProcessorPil(_MarsImageProcessing, PilBackend):
    """
    Image processor of MARS on Pillow alone.

    A picture becomes upright 8-bit RGB on white, of a size that has a whole number of image codes, in [-1, 1]:

    - with `height` and `width`: exactly that size, the aspect ratio is not kept;
    - with `size={"height": .., "width": ..}` (the default): scaled until it covers that size, the middle cut out;
    - with `size={"shortest_edge": ..}`: scaled to that shorter side, cut to multiples of `downsample_factor`.

    Args:
        kwargs: See [`MarsImageProcessorKwargs`] and transformers' `ImagesKwargs`. Pictures are always converted to
            RGB, and never padded.

    Example:
        >>> image_processor = MarsImageProcessorPil(size={"height": 64, "width": 96})
        >>> image_processor("apple.png", return_tensors="pt")["pixel_values"].shape
        torch.Size([1, 3, 64, 96])
    """


if is_torchvision_available():
    from transformers.image_processing_backends import TorchvisionBackend

    class MarsImageProcessor(_MarsImageProcessing, TorchvisionBackend):
        """
        Image processor of MARS on torchvision; decodes and converts as [`MarsImageProcessorPil`] does, resizes and
        normalises tensors. Results differ by a rounding: measure with one backend only.
        """

        def process_image(
            self, image: Image.Image, downsample_factor: int, max_pixels: int, device: Any = None, **kwargs: Any
        ) -> torch.Tensor:
            pixels = super().process_image(image, downsample_factor, max_pixels)
            return torch.from_numpy(np.ascontiguousarray(pixels)).to(device)

else:
    MarsImageProcessor = MarsImageProcessorPil  # type: ignore[misc]


def new_image_processor(config: MarsConfig, unit_pixels: bool = False) -> MarsImageProcessor:
    """
    Make the image processor of a new MARS.

    Args:
        config ([`MarsConfig`]): Says the size and what square a code stands for.
        unit_pixels (`bool`, defaults to `False`):
            Whether the VQ-GAN takes pixels in [0, 1], as those do that look codes up (aMUSEd's), and not in [-1, 1].
    """
    side = {"height": config.default_image_size, "width": config.default_image_size}
    statistics = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3} if unit_pixels else {}
    return MarsImageProcessor(size=side, downsample_factor=config.downsample_factor, **statistics)


def _positions_by_shape(
    tensors: Sequence[torch.Tensor] | torch.Tensor, slice_size: int | None = None
) -> list[list[int]]:
    """Group positions of tensors of one shape, at most `slice_size` in a group."""
    groups: dict[torch.Size, list[int]] = {}
    for position, tensor in enumerate(tensors):
        groups.setdefault(tensor.shape, []).append(position)
    return [
        group[start : start + (slice_size or len(group))]
        for group in groups.values()
        for start in range(0, len(group), slice_size or len(group))
    ]


def _without_autocast(vqgan: "VQModel") -> torch.autocast:
    """Rounded to half precision, an encoder picks other codes."""
    return torch.autocast(vqgan.device.type, enabled=False)


@torch.no_grad()
def encode_pixels(vqgan: "VQModel", pixel_values: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.LongTensor]:
    """
    Turn pictures into image codes. Pictures of one size share a call; none is padded, since the VQ-GAN's
    normalisation and attention look at whole pictures.

    Args:
        vqgan (`diffusers.VQModel`): The image tokenizer.
        pixel_values (`torch.Tensor` of shape `(num, 3, height, width)`, or a list of `(3, height, width)`):
            Pictures in [-1, 1].

    Returns:
        `list[torch.LongTensor]`: For each picture its codes `(height / f, width / f)`, in [0, codebook_size).
    """
    _require_weights(vqgan)
    codes: dict[int, torch.Tensor] = {}
    for positions in _positions_by_shape(pixel_values):
        pixels = torch.stack([pixel_values[i] for i in positions]).to(vqgan.device, vqgan.dtype)
        with _without_autocast(vqgan):
            latents = vqgan.encode(pixels).latents  # (pictures, channels, grid_height, grid_width)
            indices = vqgan.quantize(latents)[2][2].view(latents.shape[0], *latents.shape[2:])
        codes.update(zip(positions, indices, strict=True))
    return [cast(torch.LongTensor, codes[i]) for i in range(len(codes))]


def _require_weights(vqgan: "VQModel") -> None:
    if vqgan.device.type == "meta":
        raise ValueError(
            "The VQ-GAN was offloaded, and is not called as a whole: load the model with a `device_map` that keeps it "
            'on a device, such as {"model": 0, "text_head": 0, "vision_head": 0, "vqgan": "cpu"}.'
        )


@torch.no_grad()
def decode_codes(vqgan: "VQModel", codes: Sequence[torch.Tensor], slice_size: int | None = None) -> list[torch.Tensor]:
    """
    Turn image codes into pictures. Pictures of one size share a call; none is padded.

    Args:
        vqgan (`diffusers.VQModel`): The image tokenizer.
        codes (`list[torch.LongTensor]`): For each picture its codes `(height / f, width / f)`.
        slice_size (`int`, *optional*):
            Most pictures of a call: what the VQ-GAN holds in memory grows with it, and not with `len(codes)`. It
            changes no picture. `None` sets no limit.

    Returns:
        `list[torch.Tensor]`: For each picture its pixels `(3, height, width)`, about [-1, 1].

    Raises:
        ValueError: If `slice_size` is below 1.
    """
    if slice_size is not None and slice_size < 1:
        raise ValueError(f"`slice_size` must be 1 picture or more, or None, got {slice_size}.")
    _require_weights(vqgan)
    pictures: dict[int, torch.Tensor] = {}
    for positions in _positions_by_shape(codes, slice_size):
        indices = torch.stack([codes[i] for i in positions]).long().to(vqgan.device)  # (pictures, height, width)
        latents = vqgan.quantize.get_codebook_entry(
            cast(torch.LongTensor, indices), (*indices.shape, vqgan.quantize.vq_embed_dim)
        )
        with _without_autocast(vqgan):
            # The two halves of `vqgan.decode`, which looks up anew, or not, by a switch of the checkpoint's own.
            condition = latents if vqgan.config.norm_type == "spatial" else None
            decoded = vqgan.decoder(vqgan.post_quant_conv(latents), condition)
        pictures.update(zip(positions, decoded, strict=True))
    return [pictures[i] for i in range(len(pictures))]


@torch.no_grad()
def enlarge_codes(vqgan: "VQModel", codes: Sequence[torch.Tensor], factor: int) -> list[torch.LongTensor]:
    """
    Give the codes of pictures that are enlarged by bicubic interpolation: what super-resolution has to improve on.

    Args:
        vqgan (`diffusers.VQModel`): The image tokenizer.
        codes (`list[torch.LongTensor]`): Of the small pictures, for each `(height / f, width / f)`.
        factor (`int`): How many times larger each side becomes.

    Returns:
        `list[torch.LongTensor]`: For each picture its codes `(factor * height / f, factor * width / f)`.
    """
    large: dict[int, torch.LongTensor] = {}
    for positions in _positions_by_shape(codes, slice_size=16):  # which bounds the memory
        small = torch.stack(decode_codes(vqgan, [codes[i] for i in positions]))
        pixels = F.interpolate(small, scale_factor=factor, mode="bicubic", antialias=True).clamp(-1, 1)
        large.update(zip(positions, encode_pixels(vqgan, pixels), strict=True))
    return [large[i] for i in range(len(large))]


__all__ = [
    "MarsImageProcessor",
    "MarsImageProcessorKwargs",
    "MarsImageProcessorPil",
    "check_image_size",
    "decode_codes",
    "encode_pixels",
    "enlarge_codes",
    "new_image_processor",
    "open_picture",
    "to_rgb",
]
