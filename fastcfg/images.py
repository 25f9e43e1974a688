"""From samples to files: uint8 pixels, labelled PNG grids, npz in the ADM layout, safetensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastcfg.errors import Error, missing_extra
from fastcfg.files import is_dir, reading, write_file, write_safetensors

SUFFIXES = (".png", ".npz", ".safetensors")
CELL = 64  # least width of a grid's cell, in pixels


def check_finite(x: Tensor) -> Tensor:
    """x [N, ...] itself. Raises Error where a sample holds NaN or infinity, as of a network that overflows its dtype."""
    wrong = (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if wrong:
        raise Error(
            f"{len(wrong)} of {len(x)} samples, the first of them row {wrong[0]}, hold NaN or infinity: the model overflowed, "
            "where dtype fp32 or bf16 may not, or its weights do"
        )
    return x


def to_uint8(x: Tensor) -> NDArray[np.uint8]:
    """Pixels of samples in [-1, 1], [N, C, H, W] -> uint8 [N, H, W, C]: clamp(127.5 x + 128) truncated, as the official DiT.

    Raises Error as `check_finite` does: NaN would be black.
    """
    x = check_finite(x)
    pixels = (127.5 * x.float() + 128.0).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def read_image(file: Path, shape: tuple[int, ...] | None = None) -> NDArray[np.uint8]:
    """An image file's pixels, uint8 [H, W, 1] of a grey image or [H, W, 3]; Error unless of `shape`, where that is given.

    A grey image becomes three channels where `shape` has three. Raises Error for more than 8 bits a channel.
    """
    with reading(f"the image {file}"), Image.open(file) as image:
        if image.mode.startswith(("I", "F")):
            raise Error(f"{file} has more than 8 bits a channel (mode {image.mode}): want 8")
        grey = image.mode in ("1", "L") and (shape is None or shape[2] == 1)
        pixels = np.asarray(image.convert("L" if grey else "RGB"))
    pixels = pixels[..., None] if grey else pixels
    if shape is not None and pixels.shape != shape:
        raise Error(f"{file} is {list(pixels.shape)}, but the first image is {list(shape)} (H, W, C)")
    return pixels


def load_vae(folder: Path, channels: int) -> Any:
    """The diffusers AutoencoderKL saved in `folder`, for latents of so many channels. Needs the extra `diffusers`."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise missing_extra("diffusers", "decoding latents", error) from error
    if not is_dir(folder):
        raise Error(f"no VAE at {folder}: want the folder of a diffusers AutoencoderKL")
    try:
        vae = AutoencoderKL.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise Error(f"{folder} holds no diffusers AutoencoderKL: {str(error).splitlines()[0]}") from error
    if vae.config["latent_channels"] != channels:
        raise Error(f"the VAE decodes {vae.config['latent_channels']} channels, the latents have {channels}")
    return vae


def decode(latents: Tensor, vae: Any, batch: int = 8) -> Tensor:
    """Pixels in [-1, 1], [N, 3, 8H, 8W], of latents [N, 4, H, W], by `load_vae`'s, which moves to their device.

    Latents are divided by the VAE's own scaling factor (0.18215 for DiT's).
    """
    vae.to(latents.device)
    with torch.no_grad():
        parts = [vae.decode(z / vae.config["scaling_factor"]).sample for z in latents.to(vae.dtype).split(batch)]
    return torch.cat(parts)


def save_npz(
    path: Path, images: NDArray[np.uint8], labels: NDArray[np.int64], scales: NDArray[np.float32] | None = None
) -> None:
    """The layout of ADM's sample files: arr_0 uint8 [N, H, W, C], arr_1 int64 [N]; and arr_2, the scales [N], where given."""
    arrays = {"arr_0": images, "arr_1": labels} | ({} if scales is None else {"arr_2": scales})

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # an open file keeps numpy from adding a suffix
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_file(path, write)


def save_samples(path: Path, samples: Tensor, labels: Tensor, scales: Tensor, seed: int, metadata: dict[str, str]) -> None:
    """float32 samples (or latents) [N, C, H, W] with labels [N], scales [N]; seed and metadata as strings beside them.

    Raises Error as `check_finite` does.
    """
    write_safetensors(
        path, {"samples": check_finite(samples), "labels": labels, "scales": scales}, {"seed": str(seed), **metadata}
    )


def save_grid(
    path: Path,
    images: NDArray[np.uint8],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
) -> None:
    """A PNG of images [R * C, H, W, channels], row by row, with a name beside each row and above each column.

    Small images are enlarged by a whole factor, pixel for pixel.
    """
    height, width = images.shape[1:3]
    factor = max(1, -(-CELL // width))
    font = ImageFont.load_default(size=13)
    gap, head = 4, (22 if title else 0) + 20
    left = 8 + max((int(font.getlength(name)) for name in rows), default=0) + 8
    step_x, step_y = width * factor + gap, height * factor + gap
    canvas = Image.new("RGB", (left + len(columns) * step_x, head + len(rows) * step_y), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((8, 4), title, fill="black", font=font)
    for c, name in enumerate(columns):
        draw.text((left + c * step_x + width * factor / 2, head - 10), name, fill="black", font=font, anchor="mm")
    for r, name in enumerate(rows):
        y = head + r * step_y
        draw.text((left - 8, y + height * factor / 2), name, fill="black", font=font, anchor="rm")
        for c in range(len(columns)):
            pixels = images[r * len(columns) + c]
            image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels[:, :, :3])
            canvas.paste(image.resize((width * factor, height * factor), Image.Resampling.NEAREST), (left + c * step_x, y))
    write_file(path, lambda temporary: canvas.save(temporary, format="PNG"))
